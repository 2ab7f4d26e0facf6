"""Scores of oracles whose probabilities are known, under every protocol."""

import dataclasses
import math
import pathlib
import types

import jax
import numpy as np
import pytest

from sparsejax import errors, scoring, sharding
from sparsejax.configuration import build
from sparsejax.data import rows, tokenizers
from sparsejax.evaluation import by_position, perplexity, plans
from sparsejax.evaluation import subject as subjects
from sparsejax.evaluation.protocols import held_out, parts
from sparsejax.evaluation.protocols import settings as protocols
from tests import small

BYTES = tokenizers.ByteTokenizer()
LENGTH = 32
# Every byte occurs once, so that it tells where it comes from.
DOCUMENTS = ["abcdefghijklmnop qrs", "ABCDEFG", "0123456789\t-+*/"]


class Oracle:
  """In place of a model: a target costs a hundredth of a nat for each token read before it."""

  def __init__(self):
    # Of each stream: what was read before every counted target.
    self.contexts = {}

  def make(self, transformer, stream, chunk_length):
    del transformer, chunk_length
    seen = self.contexts.setdefault(stream, {})

    def score(params, batch):
      del params
      batch = jax.device_get(batch)
      for row, place in zip(*np.nonzero(batch.weights), strict=True):
        own = batch.segments[row] == batch.segments[row, place]
        own[place + 1 :] = False
        assert batch.positions[row, place] == own.sum() - 1
        target = int(batch.targets[row, place])
        seen.setdefault(target, []).append(batch.inputs[row][own].tolist())
      # Sparse inference is worse by a hundredth for each token of context.
      factor = 0.01 if stream == "full" else 0.0101
      return factor * (batch.positions + 1.0), batch.targets % 2 == 0

    return score


@pytest.fixture
def oracle(monkeypatch):
  found = Oracle()
  monkeypatch.setattr(scoring, "make_token_score", found.make)
  return found


def make_subject(sources=(), length=LENGTH, tokenizer=BYTES, params=None, **changes):
  config = small.make_config(data__sequence_length=length, data__batch_size=4, **changes)
  return subjects.Subject(
    path=pathlib.Path("runs/a/checkpoints/3"),
    step=3,
    config=config,
    transformer=build.make_model(config, max_documents=4),
    backends=[],
    params=params or {},
    corpus=types.SimpleNamespace(sources=sources, tokenizer=tokenizer),
    mesh=sharding.make_mesh(data=-1, fsdp=1, tensor=1),
  )


@pytest.fixture
def corpus(tmp_path):
  folder = tmp_path / "texts"
  folder.mkdir()
  for number, text in enumerate(DOCUMENTS):
    (folder / f"{number}.txt").write_text(text)
  return str(folder)


def ask(subject, corpus, protocol, *, modes=("full",), **options):
  own = {name: options.pop(name) for name in ("stride", "decode") if name in options}
  settings = protocols.Settings(protocol=protocol, corpus=(corpus,), **own)
  return perplexity.run(subject, settings, modes=modes, **options)


STREAM = [i for text in DOCUMENTS for i in (256, *text.encode(), 257)]


def test_sliding_windows_read_all_text_end_to_end(oracle, corpus):
  """Windows of 8 tokens, 3 apart: after the first, targets follow 6, 7 or 8 others."""
  (cell,) = ask(make_subject(), corpus, "sliding", lengths=(8,), stride=3)
  targets = STREAM[1:]
  context = [*range(1, 9)] + [6, 7, 8] * 20
  # Marks that open documents are read, but predicted by nobody.
  expected = {
    place: n for place, n in enumerate(context[: len(targets)]) if targets[place] != 256
  }
  assert cell.num_tokens == len(expected) == len(STREAM) - 3
  assert cell.loss == pytest.approx(sum(expected.values()) / 100 / len(expected), rel=1e-12)
  assert cell.perplexity == pytest.approx(math.exp(cell.loss))
  for place, n in expected.items():
    seen = oracle.contexts["full"][targets[place]]
    assert STREAM[place + 1 - n : place + 1] in seen
  assert sum(map(len, oracle.contexts["full"].values())) == len(expected)
  assert (cell.num_samples, cell.length, cell.stride) == (1 + -(-(len(targets) - 8) // 3), 8, 3)
  num_bytes = sum(map(len, DOCUMENTS))
  assert cell.bits_per_byte == pytest.approx(
    sum(expected.values()) / 100 / math.log(2) / num_bytes
  )
  assert cell.accuracy == np.mean([targets[place] % 2 == 0 for place in expected])
  # Of text end to end there are no words of its own.
  assert cell.word_perplexity is None


@pytest.mark.parametrize(
  ("protocol", "differs"), [("rows", True), ("sliding", True), ("documents", False)]
)
def test_whether_first_tokens_count_tells_readings_apart(corpus, protocol, differs):
  """Samples of two checkpoints that count them differently are not the same."""
  settings = protocols.Settings(protocol=protocol, corpus=(corpus,))
  found = [
    parts.find(make_subject(loss__ignore_first_tokens=ignored), settings, lengths=(8,), most=0)
    for ignored in (True, False)
  ]
  (first,), (second,) = found
  counts = [sum(row.weights.sum() for row in part.reading.rows) for part in (first, second)]
  assert (counts[0] != counts[1]) == differs
  assert (first.fingerprint != second.fingerprint) == differs


def test_documents_know_nothing_of_each_other(oracle, corpus):
  """Rolling windows of 8: the last of a document goes back to read 8 tokens."""
  (cell,) = ask(make_subject(), corpus, "documents", lengths=(8,))
  nats, num_tokens = 0, 0
  for text in DOCUMENTS:
    whole, n = [256, *text.encode()], len(text)
    for place in range(1, n + 1):
      begin = (place - 1) // 8 * 8
      if begin + 8 > n and begin:
        begin = n - 8
      context = whole[begin:place]
      assert oracle.contexts["full"][whole[place]] == [context]
      nats, num_tokens = nats + len(context) / 100, num_tokens + 1
  assert cell.num_tokens == cell.num_bytes == num_tokens == 42
  assert cell.loss == pytest.approx(nats / num_tokens, rel=1e-12)
  assert (cell.num_samples, cell.num_words) == (3, 2 + 1 + 2)
  assert cell.word_perplexity == pytest.approx(math.exp(nats / 5))
  assert cell.byte_perplexity == pytest.approx(math.exp(nats / 42))
  assert cell.bits_per_byte == pytest.approx(nats / 42 / math.log(2))
  # Rows of documents are the independent units.
  seen = oracle.contexts["full"]
  by_document = [sum(len(seen[i][0]) / 100 for i in text.encode()) for text in DOCUMENTS]
  residual = [x - cell.loss * len(t) for x, t in zip(by_document, DOCUMENTS, strict=True)]
  assert cell.loss_se == pytest.approx(math.sqrt(1.5 * np.square(residual).sum()) / 42)


def test_overlapping_windows_give_documents_more_context(oracle, corpus):
  (cell,) = ask(make_subject(), corpus, "documents", lengths=(8,), stride=1)
  expected = [min(8, place) for text in DOCUMENTS for place in range(1, len(text) + 1)]
  assert cell.loss == pytest.approx(np.mean(expected) / 100)


def test_packed_rows_are_those_of_training(oracle, corpus):
  cells = ask(make_subject(), corpus, "rows", modes=("full", "sparse"))
  full, sparse = cells
  packed = rows.PackedRows(
    held_out.Held([held_out.tokenize(text, BYTES) for text in DOCUMENTS]),
    sequence_length=LENGTH,
    seed=None,
    ignore_first_tokens=True,
  )
  weights = np.concatenate([packed[row].weights for row in range(len(packed))])
  positions = np.concatenate([packed[row].positions for row in range(len(packed))])
  assert full.num_tokens == weights.sum() == len(STREAM) - 3
  assert full.num_samples == 2
  assert full.loss == pytest.approx((weights * (positions + 1)).sum() / 100 / weights.sum())
  assert sparse.gap == pytest.approx(0.01 * full.loss)
  assert 0 < sparse.gap_se < sparse.loss_se
  assert (full.protocol, full.length, full.stride) == ("rows", LENGTH, None)


def test_a_number_of_rows_is_of_rows_windows_or_documents(oracle, corpus):
  subject = make_subject()
  limited = dict(lengths=(8,), max_rows=2)
  (cell,) = ask(subject, corpus, "sliding", stride=4, **limited)
  assert (cell.num_samples, cell.num_tokens) == (2, 12)
  (cell,) = ask(subject, corpus, "rows", **limited)
  assert (cell.num_samples, cell.num_tokens) == (2, 16)
  (cell,) = ask(subject, corpus, "documents", **limited)
  assert (cell.num_samples, cell.num_tokens, cell.num_words) == (2, 27, 3)


def test_samples_of_books_end_alike_at_every_length(oracle, tmp_path):
  """PG19's protocol: the last 256 tokens of every window, and of one document alone."""
  book = np.random.default_rng(0).integers(32, 127, 1500).astype(np.uint8).tobytes()
  (tmp_path / "book.txt").write_bytes(book)
  (tmp_path / "short.txt").write_text("x" * 600)
  subject = make_subject(length=1024)
  lengths = (512, 1024)
  short, long = ask(subject, str(tmp_path), "pg19", lengths=lengths)
  # Windows of 1024 of the book's 1501 tokens begin at 0 and 256.
  assert [cell.num_samples for cell in (short, long)] == [2, 2]
  assert [cell.num_tokens for cell in (short, long)] == [512, 512]
  assert [cell.stride for cell in (short, long)] == [256, 256]
  assert short.loss == pytest.approx(np.mean(range(257, 513)) / 100)
  assert long.loss == pytest.approx(np.mean(range(769, 1025)) / 100)
  # Of the same targets, as many have even ids.
  assert short.accuracy == long.accuracy
  (one,) = ask(subject, str(tmp_path), "pg19", lengths=(1024,), max_rows=1)
  assert (one.num_samples, one.loss_se) == (1, None)
  with pytest.raises(errors.DataError, match=r"no document of .* has the 1025 tokens .* 601\."):
    ask(subject, str(tmp_path / "short.txt"), "pg19", lengths=(1024,))


def test_pages_of_wikitext_are_scored_per_word_of_the_original(oracle, tmp_path):
  (tmp_path / "wiki.txt").write_text(" \n = A = \n 1 @,@ 2 \n = B = \n x , y \n")
  subject = make_subject(length=16)
  (cell,) = ask(subject, str(tmp_path / "wiki.txt"), "wikitext", lengths=(16,))
  mended = [" = A =\n1,2 ", " = B =\nx, y\n"]
  nats = sum(n * (n + 1) / 200 for n in map(len, mended))
  assert cell.num_tokens == sum(map(len, mended))
  assert cell.num_words == 16
  assert cell.num_bytes == len(" = A = \n 1 @,@ 2 ") + len(" = B = \n x , y \n")
  assert cell.word_perplexity == pytest.approx(math.exp(nats / 16))
  assert cell.bits_per_byte == pytest.approx(nats / cell.num_bytes / math.log(2))


def test_losses_by_position_are_of_tokens_with_so_much_context(oracle, corpus):
  full, sparse = ask(make_subject(), corpus, "documents", modes=("full", "sparse"))
  # One window each: 20, 7 and 15 tokens.
  assert [(p.last, p.num_tokens) for p in full.positions] == [(16, 16 + 7 + 15), (32, 4)]
  first, last = full.positions
  nats = sum(n * (n + 1) / 200 for n in (16, 7, 15))
  assert first.loss == pytest.approx(nats / 38)
  assert last.loss == pytest.approx((17 + 18 + 19 + 20) / 400)
  assert last.gap is None
  assert [p.gap for p in sparse.positions] == pytest.approx([0.01 * nats / 38, 0.00185])
  # Of these only one document has some: there is no telling how much documents differ.
  assert first.loss_se > 0
  assert sparse.positions[0].gap_se == pytest.approx(0.01 * first.loss_se)
  assert (last.loss_se, sparse.positions[1].gap_se) == (None, None)
  (cell,) = ask(make_subject(length=16), corpus, "documents")
  assert [p.last for p in cell.positions] == [16]


def test_lengths_are_rows_of_the_table_and_scores_are_kept(oracle, corpus):
  subject, settings = make_subject(), protocols.Settings(protocol="documents", corpus=(corpus,))
  planned = perplexity.plan(subject, settings, lengths=(8, 32), budgets=(8, 16))
  values = plans.measure(planned.units, subject)
  cells = perplexity.cells(planned.units, values)
  assert [(cell.mode, cell.budget, cell.length) for cell in cells] == [
    ("full", None, 8),
    ("full", None, 32),
    ("sparse", 8, 8),
    ("sparse", 8, 32),
    ("sparse", 16, 8),
    ("sparse", 16, 32),
  ]
  for unit, value, cell in zip(planned.units, values, cells, strict=True):
    whole = by_position.scores(value)
    assert [len(field) for field in whole] == [3] * 4
    assert whole.nll.sum() / whole.num_tokens.sum() == pytest.approx(cell.loss)
    parts = np.sum([position["nll"] for position in value["positions"]], axis=0)
    np.testing.assert_allclose(parts, whole.nll)
    loss, bits = unit.samples(value)
    assert (loss.sums, loss.weights) == (tuple(whole.nll), tuple(whole.num_tokens))
    assert sum(bits.sums) / sum(bits.weights) == pytest.approx(cell.bits_per_byte)
    assert unit.key["length"] == cell.length
  assert scoring.compare(by_position.scores(values[3]), by_position.scores(values[1])) == (
    cells[3].gap,
    cells[3].gap_se,
  )
  header, *table = perplexity.rows(cells)
  assert header[:6] == ("data", "inference", "budget", "length", "perplexity", "per word")
  assert [row[3] for row in table] == ["8", "32"] * 3


def test_keys_tell_what_was_scored_apart(corpus, tmp_path):
  """Units that are taken from before are of the same text, read in the same way."""
  subject = make_subject()

  def key(protocol="sliding", path=corpus, **options):
    own = {name: options.pop(name) for name in ("stride", "decode") if name in options}
    settings = protocols.Settings(protocol=protocol, corpus=(path,), **own)
    options = dict(modes=("full",), lengths=(16,)) | options
    (unit,) = perplexity.plan(subject, settings, **options).units
    return plans.digest(unit.key)

  other = tmp_path / "other.txt"
  other.write_text(DOCUMENTS[0])
  keys = [
    key(),
    key(stride=4),
    key(lengths=(8,)),
    key(max_rows=1),
    key(decode=True),
    key("documents"),
    key("rows"),
    key(path=str(other)),
  ]
  assert len({*keys}) == len(keys)
  assert key() == keys[0]
  other.write_text(DOCUMENTS[1])
  assert key(path=str(other)) != keys[-1]


def source(texts=DOCUMENTS, tokenizer=BYTES):
  ids = [held_out.tokenize(text, tokenizer) for text in texts]
  packed = rows.PackedRows(
    held_out.Held(ids), sequence_length=LENGTH, seed=None, ignore_first_tokens=True
  )
  return types.SimpleNamespace(
    name="own",
    fingerprint="own",
    train=packed,
    validation=packed,
    tokenizer=tokenizer,
    bytes_per_id=np.array([1] * 256 + [0, 0]),
  )


@pytest.mark.parametrize("protocol", ["sliding", "documents"])
def test_validation_splits_are_scored_as_their_text_is(oracle, corpus, protocol):
  subject = make_subject(sources=(source(),))
  settings = protocols.Settings(protocol=protocol)
  (own,) = perplexity.run(subject, settings, modes=("full",), lengths=(8,))
  (text,) = ask(subject, corpus, protocol, lengths=(8,))
  assert own.source == "own"
  for name in ("loss", "loss_se", "num_tokens", "num_words", "num_bytes", "word_perplexity"):
    assert getattr(own, name) == getattr(text, name)


def test_where_nothing_opens_documents_the_mark_before_them_does(oracle, monkeypatch):
  class Closing(tokenizers.ByteTokenizer):
    bos = bos_id = None

  tokenizer = Closing()
  subject = make_subject(sources=(source(tokenizer=tokenizer),), tokenizer=tokenizer)
  settings = protocols.Settings(protocol="documents")
  (cell,) = perplexity.run(subject, settings, modes=("full",), lengths=(8,))
  assert cell.num_tokens == 42
  for text in DOCUMENTS:
    assert oracle.contexts["full"][ord(text[0])] == [[257]]
    assert oracle.contexts["full"][ord(text[1])] == [[257, ord(text[0])]]


def test_a_uniform_model_is_as_perplexed_as_it_has_ids(corpus):
  """Through the real forward pass: logits of zero."""
  subject = make_subject()
  params = jax.tree.map(np.zeros_like, small.make_params(subject.transformer))
  subject = make_subject(params=params)
  for protocol in ("rows", "sliding", "documents"):
    full, sparse = ask(subject, corpus, protocol, modes=("full", "sparse"), lengths=(16,))
    assert full.perplexity == pytest.approx(320, rel=1e-5)
    assert sparse.gap == pytest.approx(0.0, abs=1e-6)
  assert full.word_perplexity == pytest.approx(320 ** (42 / 5), rel=1e-4)


@pytest.mark.parametrize("length", [8, 32])
def test_perplexity_per_word_is_that_of_the_harness(corpus, length):
  """By its own task on the same texts, cut and scored by the adapter to it."""
  pytest.importorskip("lm_eval")
  from sparsejax.evaluation import harness_model

  subject = make_subject(length=length)
  params = small.make_params(subject.transformer, scale=4.0)
  subject = dataclasses.replace(subject, params=params)
  adapter = harness_model.of_subject(subject, mode="sparse", budget=8, progress=False)
  requests = [types.SimpleNamespace(args=(text,)) for text in DOCUMENTS]
  totals = adapter.loglikelihood_rolling(requests)
  num_words = sum(held_out.count_words(text) for text in DOCUMENTS)
  (cell,) = ask(subject, corpus, "documents", modes=("sparse",), budgets=(8,))
  assert cell.word_perplexity == pytest.approx(math.exp(-sum(totals) / num_words), rel=1e-4)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(protocol="slidding"), r"unknown --protocol 'slidding'\. Did you mean 'sliding'\?"),
    (dict(stride=4), r"--stride=4 is of windows that overlap, and --protocol=rows has none"),
    (dict(protocol="sliding", stride=0), r"--stride=0 must be at least 1"),
    (dict(corpus=("a", "b", "a")), r"--corpus=a,b,a names a text twice"),
    (dict(protocol="wikitext"), r"--protocol=wikitext reads pages of WikiText; name the file"),
  ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
  with pytest.raises(errors.ConfigError, match=message):
    protocols.Settings(**settings)


@pytest.mark.parametrize(
  ("protocol", "options", "message"),
  [
    ("sliding", dict(lengths=(8, 64)), r"--lengths=64 exceeds the model's rows of 32 tokens"),
    ("pg19", dict(), r"=pg19 reads windows of 4096 tokens, .* --lengths=32 --stride=32,"),
    ("wikitext", dict(), r"--protocol=wikitext reads windows of 8192 tokens"),
    ("pg19", dict(lengths=(32,)), r"a stride of 256 exceeds windows of 32 tokens.*--stride=32"),
    ("sliding", dict(lengths=(8,), stride=9), r"a stride of 9 exceeds windows of 8 tokens"),
    ("rows", dict(decode=True), r"--decode reads a row as one document, and .* have up to 3;"),
  ],
)
def test_what_a_model_cannot_be_asked_is_refused(corpus, protocol, options, message):
  with pytest.raises(errors.ConfigError, match=message):
    ask(make_subject(), corpus, protocol, **options)


def test_a_remedy_leads_to_no_other_refusal():
  """Rows shorter than the protocol's stride need one of their own, longer ones do not."""
  for row_length, remedy in ((255, "--lengths=255 --stride=255,"), (256, "--lengths=256,")):
    with pytest.raises(errors.ConfigError, match=f"take {remedy} or"):
      protocols.choose_lengths("pg19", (), row_length)
  assert protocols.choose_stride("pg19", None, 256) == 256
  assert protocols.choose_stride("pg19", 255, 255) == 255


def test_data_without_text_are_refused():
  recall = types.SimpleNamespace(name="recall", validation=[1], tokenizer=None)
  with pytest.raises(
    errors.DataError, match=r"=documents reads text, and there is none in rec"
  ):
    perplexity.run(make_subject(sources=(recall,)), protocols.Settings(protocol="documents"))
