"""Which slots on the device hold which pages while a model decodes: an exact LRU cache."""
