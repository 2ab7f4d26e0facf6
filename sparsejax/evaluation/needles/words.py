"""Words that questions are made of; no word is in both lists."""

# What has a code in a needle, and is asked for.
KEYS = (
  *("anchor", "apple", "badger", "barrel", "basket", "beetle", "bottle", "bridge", "bucket"),
  *("button", "candle", "carrot", "castle", "cherry", "circus", "cobra", "comet", "copper"),
  *("crow", "dagger", "donkey", "dragon", "engine", "falcon", "ferry", "fiddle", "forest"),
  *("garden", "goblet", "guitar", "hammer", "harbor", "helmet", "island", "jacket", "jaguar"),
  *("kettle", "ladder", "lemon", "lizard", "lynx", "magnet", "marble", "meadow", "mirror"),
  *("monkey", "needle", "orchid", "otter", "oyster", "parrot", "pebble", "pepper", "pigeon"),
  *("planet", "rabbit", "ribbon", "rocket", "saddle", "salmon", "temple", "turtle", "violin"),
)

# What a haystack of random words is made of.
FILLER = (
  *("about", "after", "again", "along", "always", "among", "before", "began", "below"),
  *("bring", "clear", "close", "common", "could", "early", "either", "enough", "every"),
  *("first", "follow", "found", "general", "given", "great", "group", "happen", "heavy"),
  *("important", "indeed", "large", "later", "learn", "leave", "letter", "little", "making"),
  *("matter", "might", "moment", "morning", "never", "number", "often", "order", "other"),
  *("people", "perhaps", "place", "point", "public", "quite", "rather", "reason", "return"),
  *("second", "seems", "several", "simple", "small", "sound", "still", "story", "taken"),
  *("thing", "think", "toward", "under", "until", "usual", "water", "where", "while"),
)
