"""Questions about needles: their lengths, depths, seeds and answers, read back as text."""

import re
import types

import numpy as np
import pytest

from sparsejax import errors
from sparsejax.data import tokenizers
from sparsejax.evaluation.needles import associations, haystacks, kinds, questions, task, words

TEXT = "Of all that was said, little is known. Whoever asks is told: wait, or go!\n"
VOCAB = 512


@pytest.fixture(scope="module", params=["byte", "bpe"])
def tokenizer(request):
  if request.param == "byte":
    return tokenizers.ByteTokenizer()
  seen = [haystacks.NOISE, TEXT, "The code of apple is 31415.", *words.FILLER]
  return tokenizers.train_bpe(seen * 4, 400)


def make_haystack(name, tokenizer):
  if name == "corpus":
    return haystacks.passages(np.array(tokenizer.encode(TEXT * 200), np.int32))
  return dict(noise=haystacks.noise, repeated=haystacks.repeated)[name](tokenizer)


def make(tokenizer, kind="single", haystack="noise", **changes):
  options = dict(length=320, depth=50, seed=0, number=0) | changes
  if kind == associations.KIND:
    ids = np.arange(3000) % 100 if haystack == "corpus" else None
    return associations.Maker(VOCAB, haystack, ids).make(**options)
  return questions.Maker(tokenizer, make_haystack(haystack, tokenizer)).make(kind, **options)


def needle_texts(question, tokenizer):
  return [tokenizer.decode(question.prompt[a:b]) for a, b in question.needles]


def hay_of(question):
  """What is left of the prompt before its question, without needles."""
  is_hay = np.ones(len(question.prompt), bool)
  for first, end in question.needles:
    is_hay[first:end] = False
  return question.prompt[is_hay]


@pytest.mark.parametrize("haystack", haystacks.NAMES)
@pytest.mark.parametrize("kind", task.KINDS)
@pytest.mark.parametrize("length", [256, 257, 1000])
def test_a_question_with_its_answer_is_as_long_as_asked(tokenizer, kind, haystack, length):
  for depth in (0, 33, 100):
    question = make(tokenizer, kind, haystack, length=length, depth=depth)
    assert len(question.prompt) + len(question.continuation) == length
    assert question.prompt.dtype == question.continuation.dtype == np.int32
    assert question.kind == kind


@pytest.mark.parametrize("haystack", haystacks.NAMES)
@pytest.mark.parametrize("kind", kinds.KINDS)
def test_the_text_has_its_needles_question_and_answers(tokenizer, kind, haystack):
  question = make(tokenizer, kind, haystack, length=600, number=3)
  text = tokenizer.decode(question.prompt)
  assert question.prompt[0] == tokenizer.bos_id
  found = needle_texts(question, tokenizer)
  counts = dict(single=1, multi_key=4, multi_value=4, multi_query=4, variable_tracking=8)
  assert len(found) == len(set(found)) == counts[kind]
  for needle in found:
    assert needle.startswith("\n")
    assert needle.endswith(".\n")
    assert text.count(needle) == 1
  asked = text.rpartition("\n")[2]
  assert re.match(r"(What|Which) .*\? .*(is|are)$", asked)
  expected = f" {', '.join(question.answers)}."
  assert tokenizer.decode(question.continuation) == expected
  assert re.findall(question.pattern, expected) == list(question.answers)
  hay = tokenizer.decode(hay_of(question))
  for answer in question.answers:
    assert answer in "".join(found)
    assert answer not in hay


def test_what_is_asked_for_is_what_needles_say(tokenizer):
  def read(kind, number):
    question = make(tokenizer, kind, number=number)
    text = tokenizer.decode(question.prompt)
    return question, text.rpartition("\n")[2], "".join(needle_texts(question, tokenizer))

  for number in range(5):
    for kind in ("single", "multi_key", "multi_query"):
      question, asked, needles = read(kind, number)
      values = dict(re.findall(r"The code of (\w+) is (\d+)\.", needles))
      keys = [key for key in values if re.search(rf"\b{key}\b", asked)]
      assert tuple(values[key] for key in keys) == question.answers
      # Distractors: other keys with other values.
      assert len(values) == len(set(values.values())) == (1 if kind == "single" else 4)
      assert len(keys) == (4 if kind == "multi_query" else 1)
    question, asked, needles = read("multi_value", number)
    ((key, _), *_) = pairs = re.findall(r"One code of (\w+) is (\d+)\.", needles)
    assert f"codes of {key}?" in asked
    assert {k for k, _ in pairs} == {key}
    assert sorted(value for _, value in pairs) == sorted(set(question.answers))


def test_chains_lead_to_the_variables_and_go_on_deeper(tokenizer):
  for number in range(5):
    question = make(tokenizer, "variable_tracking", number=number, length=500, depth=30)
    text = tokenizer.decode(question.prompt)
    set_to = dict(re.findall(r"VAR ([A-Z]{3}) = (\w+)\.", text))
    assert len(set_to) == 8
    value = re.search(r"Which variables are (\d+)\?", text)[1]

    def resolve(name, set_to=set_to):
      return resolve(set_to[name]) if name in set_to else name

    assert {name for name in set_to if resolve(name) == value} == set(question.answers)
    assert len(question.answers) == 4
    # An assignment comes after the one that it reads.
    places = [text.index(f"VAR {name} = ") for name in question.answers]
    assert places == sorted(places)


@pytest.mark.parametrize("haystack", haystacks.NAMES)
@pytest.mark.parametrize("kind", task.KINDS)
def test_the_needle_is_at_its_depth(tokenizer, kind, haystack):
  length = 2000
  for depth in (0, 10, 50, 90, 100):
    question = make(tokenizer, kind, haystack, length=length, depth=depth)
    # By what is found in the prompt: hay before the first needle.
    first = question.needles[0][0]
    is_hay = np.ones(len(question.prompt), bool)
    for a, b in question.needles:
      is_hay[a:b] = False
    num_asked = 1 if kind == "mqar" else len(tokenizer.encode(asked_text(question, tokenizer)))
    opening = 0 if kind == "mqar" else 1
    num_hay = is_hay.sum() - opening - num_asked
    before = is_hay[:first].sum() - opening
    assert before / num_hay == pytest.approx(question.depths[0])
    late = depth / 100 * num_hay - before
    assert -1 < late <= questions.MOST_BEFORE
    if depth in (0, 100):
      assert before == depth / 100 * num_hay
    if kind != "mqar" and 0 < before < num_hay:
      # A needle does not break a sentence, where sentences are short enough.
      assert tokenizer.decode(question.prompt[:first]).rstrip(" ")[-1] in ".!?\n"


def asked_text(question, tokenizer):
  return "\n" + tokenizer.decode(question.prompt).rpartition("\n")[2]


def test_another_depth_is_the_same_question_elsewhere(tokenizer):
  for kind in ("single", "multi_key", "mqar"):
    early, late = (make(tokenizer, kind, "repeated", depth=depth) for depth in (10, 90))
    assert sorted(early.prompt) == sorted(late.prompt)
    np.testing.assert_array_equal(early.continuation, late.continuation)
    assert early.needles[0][0] < late.needles[0][0]


@pytest.mark.parametrize("kind", task.KINDS)
def test_every_number_and_seed_is_a_question_of_its_own(tokenizer, kind):
  """And it is the same whatever was made before it."""
  again = make(tokenizer, kind, "repeated", seed=3, number=7)
  series = [make(tokenizer, kind, "repeated", seed=3, number=number) for number in range(9)]
  np.testing.assert_array_equal(series[7].prompt, again.prompt)
  assert series[7].answers == again.answers
  prompts = {question.prompt.tobytes() for question in series}
  assert len(prompts) == 9
  other = make(tokenizer, kind, "repeated", seed=4, number=7)
  assert other.prompt.tobytes() not in prompts


def test_pairs_lie_in_noise_as_in_the_data_recall():
  quarter = VOCAB // 4
  question = make(None, "mqar", length=300, depth=40)
  pairs = [question.prompt[a:b].tolist() for a, b in question.needles]
  assert len(pairs) == 8
  keys, values = map(set, zip(*pairs, strict=True))
  assert len(keys) == len(values) == 8
  assert all(quarter <= key < 2 * quarter for key in keys)
  assert all(2 * quarter <= value < VOCAB for value in values)
  assert [question.prompt[-1], question.continuation[0]] == pairs[0]
  hay = hay_of(question)[:-1]
  assert hay.max() < quarter
  assert len(set(hay)) > 64


def test_pairs_in_text_are_of_ids_that_it_lacks():
  ids = np.setdiff1d(np.arange(VOCAB), [128, 140, *range(160, 166), *range(300, 309)])
  maker = associations.Maker(VOCAB, "corpus", np.resize(ids, 2000))
  question = maker.make(length=1000, depth=50, seed=0, number=0)
  pairs = [question.prompt[a:b].tolist() for a, b in question.needles]
  keys, values = map(set, zip(*pairs, strict=True))
  assert keys == {128, 140, *range(160, 166)}
  assert values < set(range(300, 309))
  full = associations.Maker(VOCAB, "corpus", np.arange(2000) % VOCAB)
  with pytest.raises(errors.DataError, match=r"leaves 0 of 128 to 255 for 8 pairs of mqar"):
    full.make(length=1000, depth=50, seed=0, number=0)


def test_repeated_words_are_repeated_and_noise_is_the_same():
  tokenizer = tokenizers.ByteTokenizer()
  rng = np.random.default_rng(0)
  text = tokenizer.decode(haystacks.repeated(tokenizer)(rng, 1500))
  period = text.index("\n", text.index("\n") + 1) - text.index("\n")
  assert text[:-period] == text[period:]
  assert set(re.findall(r"\w+", text[-period:].lower())) <= set(words.FILLER)
  other = tokenizer.decode(haystacks.repeated(tokenizer)(rng, 1500))
  assert other != text
  noise = tokenizer.decode(haystacks.noise(tokenizer)(rng, 200))
  assert noise == (haystacks.NOISE * 3)[-200:]
  assert not set(words.KEYS) & set(words.FILLER)
  assert len(set(words.KEYS)) == len(words.KEYS)


def test_an_answer_that_the_haystack_has_is_drawn_again(monkeypatch):
  """The haystack has the first number that would be drawn; the question has another."""
  tokenizer = tokenizers.ByteTokenizer()
  (first,) = make(tokenizer).answers
  text = np.array(tokenizer.encode(f"It is {first}, they say. " * 100), np.int32)
  maker = questions.Maker(tokenizer, haystacks.passages(text))
  question = maker.make("single", length=320, depth=50, seed=0, number=0)
  assert first in tokenizer.decode(question.prompt)
  assert question.answers != (first,)
  monkeypatch.setattr(kinds, "_numbers", lambda rng, count: (first,) * count)
  with pytest.raises(errors.DataError, match=r"100 draws .* single question of 320 tokens"):
    maker.make("single", length=320, depth=50, seed=0, number=0)


def test_a_kind_that_does_not_fit_says_what_would():
  tokenizer = tokenizers.ByteTokenizer()
  with pytest.raises(
    errors.ConfigError,
    match=r"--lengths=190 is too short for a multi_query question, which has 2\d\d tokens",
  ):
    make(tokenizer, "multi_query", length=190)
  with pytest.raises(errors.ConfigError, match=r"vocabulary of at least 32 ids.* has 16"):
    associations.Maker(16, "noise")


def test_a_token_across_question_and_answer_is_the_models_to_write():
  """As tokenizers may have that merge the last word with what follows."""

  class Greedy(tokenizers.ByteTokenizer):
    def encode(self, text):
      merged = re.sub(r"is (?=\d{5}\.\Z)", "\x01", text)
      return list(merged.encode())

    def decode(self, ids):
      return super().decode(ids).replace("\x01", "is ")

  question = make(Greedy())
  assert Greedy().decode(question.prompt).endswith("The code of " + asked_key(question) + " ")
  assert Greedy().decode(question.continuation) == f"is {question.answers[0]}."
  assert len(question.prompt) + len(question.continuation) == 320


def asked_key(question):
  text = tokenizers.ByteTokenizer().decode(question.prompt)
  return re.search(r"What is the code of (\w+)\?", text)[1]


def test_haystack_text_is_held_out_text_without_marks():
  row = types.SimpleNamespace(
    inputs=np.array([256, 65, 66, 257, 256, 67, 0, 0]),
    segments=np.array([1, 1, 1, 1, 2, 2, 0, 0]),
  )
  corpus = types.SimpleNamespace(
    tokenizer=tokenizers.ByteTokenizer(),
    sources=(
      types.SimpleNamespace(validation=[row], tokenizer=None),
      types.SimpleNamespace(validation=None, tokenizer=tokenizers.ByteTokenizer()),
      types.SimpleNamespace(validation=[row, row], tokenizer=tokenizers.ByteTokenizer()),
    ),
  )
  assert haystacks.corpus_ids(corpus, 6).tolist() == [65, 66, 67] * 2
  with pytest.raises(
    errors.DataError, match=r"has 6 tokens of held-out text, fewer than the 7"
  ):
    haystacks.corpus_ids(corpus, 7)
  corpus.sources = corpus.sources[:2]
  with pytest.raises(errors.DataError, match=r"--haystack=corpus needs held-out text.*noise"):
    haystacks.corpus_ids(corpus, 1)
