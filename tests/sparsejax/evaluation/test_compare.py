"""Two checkpoints on the same samples: differences, errors and p by hand; and refusals."""

import math
import pathlib
import types

import numpy as np
import pytest

from sparsejax import errors
from sparsejax.evaluation import compare, plans
from sparsejax.evaluation.needles import task as needles
from sparsejax.evaluation.protocols import units


def samples(sums, weights=(1.0, 1.0, 1.0, 1.0), **changes):
  about = dict(what="web", mode="sparse", budget=64, metric="loss (nats/token)", asked="")
  return plans.Samples(sums=tuple(sums), weights=tuple(weights), **about | changes)


def test_a_mean_of_samples_has_the_error_of_a_paired_t():
  mine, theirs = np.array([1.0, 0.0, 1.0, 1.0, 0.0]), np.array([0.0, 0.0, 1.0, 0.0, 1.0])
  difference, error, z, _ = compare.paired(mine, theirs, np.ones(5))
  more = mine - theirs
  assert difference == pytest.approx(0.2)
  assert error == pytest.approx(more.std(ddof=1) / math.sqrt(5))
  assert z == pytest.approx(difference / error)
  # 1.96 errors are at 5% of a normal distribution.
  assert compare.paired(*_at(1.959964), np.ones(4))[3] == pytest.approx(0.05, rel=1e-5)
  assert compare.paired(*_at(-2.575829), np.ones(4))[3] == pytest.approx(0.01, rel=1e-5)


def _at(z):
  """Samples whose differences have the mean z and the error 1."""
  spread = np.array([1.0, 1.0, -1.0, -1.0]) * math.sqrt(3)
  return 5.0 + z + spread, np.full(4, 5.0)


def test_what_makes_samples_hard_for_both_is_not_in_the_error():
  hard = np.array([100.0, -300.0, 700.0, 0.0])
  mine, theirs = _at(2.0)
  difference, error, _, _ = compare.paired(hard + mine, hard + theirs, np.ones(4))
  assert (difference, error) == pytest.approx((2.0, 1.0))


def test_rows_of_different_lengths_are_weighed():
  """Nats per token, of rows of 4, 2 and 2 tokens; the error is that of a ratio."""
  weights = np.array([4.0, 2.0, 2.0])
  difference, error, _, _ = compare.paired([8.0, 5.0, 4.0], [4.0, 4.0, 3.0], weights)
  assert difference == pytest.approx(6 / 8)
  residual = np.array([4.0, 1.0, 1.0]) - 6 / 8 * weights
  assert error == pytest.approx(math.sqrt((residual**2).sum() * 3 / 2) / 8)


def test_without_spread_there_is_no_test():
  ones = np.ones(3)
  assert compare.paired([1.0], [3.0], [1.0]) == (-2.0, None, None, None)
  assert compare.paired([5.0] * 3, [5.0] * 3, ones) == (0.0, 0.0, None, 1.0)
  # Three tenths of each weight, which in binary are none.
  weights = np.array([1.0, 2.0, 4.0])
  assert compare.paired(0.3 * weights, 0 * weights, weights)[1:] == (0.0, None, None)


def test_lines_are_of_the_same_samples():
  found = compare.differences(
    "perplexity",
    "a",
    [samples([1.0, 2.0, 3.0, 4.0]), samples([0.0] * 4, mode="full", budget=None)],
    "b",
    [samples([1.0] * 4, mode="full", budget=None), samples([1.0, 1.0, 1.0, 1.0])],
  )
  assert [(x.mode, x.budget, x.value, x.reference_value, x.difference) for x in found] == [
    ("sparse", 64, 2.5, 1.0, 1.5),
    ("full", None, 0.0, 1.0, -1.0),
  ]
  assert (found[0].task, found[0].run, found[0].reference) == ("perplexity", "a", "b")
  assert found[0].num_samples == 4
  header, first, second = compare.rows(found)
  assert first[9:] == ("+1.5000 ± 0.6455", "+2.32", "0.02", "4")
  assert second[9:] == ("-1.0000 ± 0.0000", "-", "-", "4")
  assert len(header) == len(first)


@pytest.mark.parametrize(
  "other",
  [
    samples([1.0] * 4, asked="0ther"),
    samples([1.0] * 4, weights=(1.0, 1.0, 1.0, 2.0)),
    samples([1.0] * 3, weights=(1.0,) * 3),
    samples([1.0] * 4, budget=32),
  ],
)
def test_lines_of_other_samples_are_refused(other):
  with pytest.raises(errors.DataError, match="a and b cannot be compared in needle of web"):
    compare.differences("needle", "a", [samples([1.0] * 4)], "b", [other])


def subject(name, tokenizer="bytes", length=64):
  corpus = types.SimpleNamespace(tokenizer=types.SimpleNamespace(fingerprint=tokenizer))
  config = types.SimpleNamespace(data=types.SimpleNamespace(sequence_length=length))
  return types.SimpleNamespace(path=pathlib.Path(name), corpus=corpus, config=config)


def unit(text=None, **key):
  about = dict(task="perplexity", source="web", data="d1", mode="sparse", budget=64)
  return plans.Unit(key=about | key, measure=None, samples=lambda value: [], text=text)


@pytest.mark.parametrize(
  ("tokenizer", "other", "kind", "message"),
  [
    (
      "bpe",
      unit(data="d2"),
      errors.DataError,
      r"tokenizers differ \(bytes and bpe\)",
    ),
    (
      "bytes",
      unit(data="d2"),
      errors.DataError,
      r"in perplexity: they differ in data \(d1 and d2\); name --sources, text that was "
      "prepared once, or leave perplexity out of --tasks",
    ),
    (
      "bytes",
      unit(budget=48),
      errors.ConfigError,
      r"different budgets \(64 and 48 keys\).*name --budgets",
    ),
    (
      "bytes",
      unit(source="code", num_sink_keys=2),
      errors.DataError,
      r"differ in source \(web and code\); name --sources",
    ),
  ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_measured(
  tokenizer, other, kind, message
):
  mine, theirs = subject("runs/a"), subject("runs/b", tokenizer)
  full = unit(mode="full", budget=None)
  with pytest.raises(kind, match=rf"runs/a and runs/b .*{message}"):
    compare.check(mine, [full, unit()], theirs, [full, other])
  compare.check(mine, [full, unit()], theirs, [unit(), full])


@pytest.mark.parametrize(
  ("key", "other", "length", "message"),
  [
    (
      dict(length=64, rows="r1"),
      dict(length=32, rows="r2"),
      32,
      r"length \(64 and 32\), rows \(r1 and r2\); take --sequence_length=32, or leave sparsity",
    ),
    (dict(rows="r1"), dict(rows="r2"), 32, r"rows \(r1 and r2\); take --sequence_length=32"),
    (dict(rows="r1"), dict(rows="r2"), 64, r"rows \(r1 and r2\); name --sources, text"),
    (
      dict(num_sink_keys=1),
      dict(num_sink_keys=2),
      64,
      r"num_sink_keys \(1 and 2\); leave sparsity out of --tasks",
    ),
    (
      dict(vocab_size=320),
      dict(vocab_size=384),
      64,
      r"vocab_size \(320 and 384\); leave mqar, .*out of --needle_kinds, or leave sparsity",
    ),
  ],
)
def test_a_refusal_names_what_differs_and_what_can_be_made_the_same(
  key, other, length, message
):
  """Of all that the other was asked, what is nearest."""
  own, theirs = (unit(task="sparsity", **x) for x in (key, other))
  far = unit(task="sparsity", mode="full", budget=None, **other)
  with pytest.raises(errors.DataError, match=f"they differ in {message}"):
    compare.check(subject("a"), [own], subject("b", length=length), [far, theirs])


def test_whole_documents_compare_whatever_the_tokenizer():
  """In bits per byte; losses per token are left out."""
  mine = unit(data="bytes' tokens", text="t")
  compare.check(subject("a"), [mine], subject("b", "bpe"), [unit(data="bpe's", text="t")])
  with pytest.raises(errors.DataError, match=r"tokenizers differ.*--protocol=documents"):
    compare.check(subject("a"), [mine], subject("b", "bpe"), [unit(data="bpe's", text="u")])
  value = dict(nll=[math.log(2) * 8, math.log(2) * 6], num_bytes=[4.0, 2.0])
  both = [
    units.samples(
      value | dict(num_tokens=num_tokens, nll=[scale * x for x in value["nll"]]),
      what="web",
      asked=asked,
      text="t",
      mode="full",
      budget=None,
    )
    for num_tokens, asked, scale in (([4.0, 2.0], "bytes", 1.0), ([2.0, 1.0], "bpe", 0.5))
  ]
  (line,) = compare.differences("perplexity", "a", both[0], "b", both[1], same_tokenizer=False)
  assert (line.metric, line.value, line.reference_value) == ("bits/byte", 14 / 6, 7 / 6)
  with pytest.raises(errors.DataError, match="their samples are not the same"):
    compare.differences("perplexity", "a", both[0], "b", both[1])


def test_samples_of_perplexity_are_rows():
  value = dict(nll=[2.0, 6.0], hits=[0, 1], num_tokens=[4.0, 8.0], num_bytes=[5.0, 11.0])
  loss, bits = units.samples(value, what="web", asked="", mode="full", budget=None)
  assert (loss.sums, loss.weights) == ((2.0, 6.0), (4.0, 8.0))
  assert bits.sums == (2.0 / math.log(2), 6.0 / math.log(2))
  assert (bits.metric, bits.weights) == ("bits/byte", (5.0, 11.0))
  (loss,) = units.samples(
    value | dict(num_bytes=[0.0, 0.0]), what="web", asked="", mode="full", budget=None
  )
  assert (loss.what, loss.mode, loss.metric) == ("web", "full", "loss (nats/token)")


def test_samples_of_needles_are_questions_whatever_the_depth():
  """At another depth it is the same question, which is no further sample."""
  settings = needles.Settings(kinds=("single", "mqar"), depths=(0, 100), num_questions=3)
  value = dict(
    accuracy=[1, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1],
    nll=[1, 2, 3, 4, 5, 6, 0, 0, 0, 1, 1, 1],
    hits=[0] * 12,
    num_tokens=[2] * 12,
  )
  found = needles._samples(value, settings=settings, length=256, mode="sparse", budget=16)
  assert [(x.what, x.metric.partition(" ")[0]) for x in found] == [
    ("single, 256 tokens", "accuracy"),
    ("single, 256 tokens", "loss"),
    ("mqar, 256 tokens", "accuracy"),
    ("mqar, 256 tokens", "loss"),
  ]
  assert (found[0].sums, found[0].weights) == ((1.0, 0.0, 0.5), (1.0, 1.0, 1.0))
  assert (found[1].sums, found[1].weights) == ((5.0, 7.0, 9.0), (4.0, 4.0, 4.0))
  assert found[2].sums == (0.5, 0.5, 0.5)
