"""Two checkpoints asked the same: how much one is above the other, and whether that is chance.

Differences are taken sample by sample, so that what makes samples hard for both is not in the
error. The test is of the difference over its standard error against a normal distribution,
which is an approximation for few samples, and made for each line on its own: of many lines
some are small by chance.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from sparsejax import errors, scoring
from sparsejax.evaluation import markdown, plans
from sparsejax.evaluation import subject as subjects


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
  """One checkpoint against another, on the same samples.

  Attributes:
    task: name.
    what: data, kind or task of it.
    mode: of both.
    budget: keys a query reads; None under full inference.
    metric: what is measured, with its unit.
    run, reference: names of the checkpoint, and of the one it is compared with.
    value, reference_value: of each.
    difference: the first less the second.
    se: its paired standard error over samples; None of a single one.
    z: difference over error; None where there is no error, or none above 0.
    p: two-sided, of a normal distribution; 1 of equal samples, else None where z is.
    num_samples: rows, documents or questions.
  """

  task: str
  what: str
  mode: str
  budget: int | None
  metric: str
  run: str
  reference: str
  value: float
  reference_value: float
  difference: float
  se: float | None
  z: float | None
  p: float | None
  num_samples: int


def paired(
  sums: np.ndarray, other_sums: np.ndarray, weights: np.ndarray
) -> tuple[float, float | None, float | None, float | None]:
  """Difference of two ratios over the same weights, its error, z and two-sided p.

  Args:
    sums: [N], of the first.
    other_sums: [N], of the second.
    weights: [N], of both.

  Returns:
    See `Difference`. The error is that of a ratio of sums over independent samples
    (`scoring.ratio_error`), and p is erfc(|z| / sqrt(2)). Of nothing, and of what is not
    finite, the difference is NaN.
  """
  more = np.asarray(sums, np.float64) - np.asarray(other_sums, np.float64)
  weights = np.asarray(weights, np.float64)
  difference = float(more.sum() / (weights.sum() or math.nan))
  error = scoring.ratio_error(more, weights)
  if math.isnan(error):
    return difference, None, None, None
  # What is left of equal differences by rounding is no spread.
  if error <= 1e-12 * abs(difference):
    return difference, 0.0, None, None if difference else 1.0
  z = difference / error
  return difference, error, z, math.erfc(abs(z) / math.sqrt(2))


def check(
  subject: subjects.Subject,
  units: Sequence[plans.Unit],
  reference: subjects.Subject,
  others: Sequence[plans.Unit],
) -> None:
  """Refuses what cannot be compared, before anything is measured.

  Raises:
    ConfigError: the two are asked at different budgets.
    DataError: they are asked about different data.
  """
  theirs = {plans.digest(_about(unit)) for unit in others}
  for unit in units:
    if plans.digest(_about(unit)) in theirs:
      continue
    task, key = unit.key["task"], unit.key
    like = [other.key for other in others if other.key["task"] == task]
    # What it would be compared with, if that were the same.
    nearest = min(like, key=lambda other: len(_differing(key, other)), default={})
    names = _differing(key, nearest)
    pair = f"{subject.path} and {reference.path}"
    if names == ["budget"]:
      raise errors.ConfigError(
        f"{pair} are trained at different budgets ({key['budget']} and {nearest['budget']} "
        "keys), so that their sparse inference differs in more than weights; name --budgets "
        "that both can do."
      )
    if subject.corpus.tokenizer.fingerprint != reference.corpus.tokenizer.fingerprint:
      raise errors.DataError(
        f"{pair} cannot be compared sample by sample in {task}: their tokenizers "
        f"differ ({subject.corpus.tokenizer.fingerprint} and "
        f"{reference.corpus.tokenizer.fingerprint}), and with them rows and questions. Leave "
        "--compare out, or compare bits per byte: --tasks=perplexity --protocol=documents of a "
        "--corpus."
      )
    values = ", ".join(f"{name} ({key[name]} and {nearest.get(name)})" for name in names)
    raise errors.DataError(
      f"{pair} cannot be compared sample by sample in {task}: they differ in {values}; "
      f"{_remedy(names, subject, reference)}leave {task} out of --tasks."
    )


def _differing(key: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
  return [name for name in key if key[name] != other.get(name)]


def _remedy(
  names: Sequence[str], subject: subjects.Subject, reference: subjects.Subject
) -> str:
  """What flags can make the same, with an "or" behind it; else nothing."""
  if names == ["vocab_size"]:
    return "leave mqar, which draws from all ids, out of --needle_kinds, or "
  own, other = subject.config.data, reference.config.data
  if not {"length", "source", "data", "rows"} & set(names):
    return ""
  if own.sequence_length != other.sequence_length:
    return f"take --sequence_length={min(own.sequence_length, other.sequence_length)}, or "
  return "name --sources, text that was prepared once, or "


def _about(unit: plans.Unit) -> dict[str, Any]:
  """What must be the same of both: of pieces of a text, the text in place of its tokens."""
  return {**unit.key} if unit.text is None else {**unit.key, "data": unit.text}


def differences(
  task: str,
  run: str,
  samples: Sequence[plans.Samples],
  reference: str,
  others: Sequence[plans.Samples],
  *,
  same_tokenizer: bool = True,
) -> list[Difference]:
  """Every line of one checkpoint against the same line of the other.

  Where tokenizers differ, losses per token do not compare and are left out.

  Args:
    task: of all of them.
    run, reference: names of the two.
    samples, others: of each.
    same_tokenizer: whether the two have one.

  Raises:
    DataError: lines of the same name are of different samples.
  """
  theirs = {(x.what, x.mode, x.budget, x.metric): x for x in others}
  found = []
  for own in samples:
    if own.needs_tokenizer and not same_tokenizer:
      continue
    other = theirs.get((own.what, own.mode, own.budget, own.metric))
    if other is None or other.asked != own.asked or other.weights != own.weights:
      raise errors.DataError(
        f"{run} and {reference} cannot be compared in {task} of {own.what}: their samples are "
        "not the same; measure both again with --fresh, or leave --compare out."
      )
    total = math.fsum(own.weights) or math.nan
    difference, error, z, p = paired(own.sums, other.sums, own.weights)
    found.append(
      Difference(
        task=task,
        what=own.what,
        mode=own.mode,
        budget=own.budget,
        metric=own.metric,
        run=run,
        reference=reference,
        value=math.fsum(own.sums) / total,
        reference_value=math.fsum(other.sums) / total,
        difference=difference,
        se=error,
        z=z,
        p=p,
        num_samples=len(own.sums),
      )
    )
  return found


def rows(found: Sequence[Difference]) -> list[tuple[str, ...]]:
  """Rows of a table, the header first."""
  header = (
    *("task", "of", "inference", "budget", "metric", "run", "value", "reference", "its value"),
    *("difference", "z", "p", "samples"),
  )
  return [
    header,
    *(
      (
        *(line.task, line.what, line.mode, markdown.number(line.budget, "d"), line.metric),
        *(line.run, f"{line.value:.4f}", line.reference, f"{line.reference_value:.4f}"),
        f"{line.difference:+.4f}" + ("" if line.se is None else f" ± {line.se:.4f}"),
        markdown.number(line.z, "+.2f"),
        markdown.number(line.p, ".2g"),
        f"{line.num_samples:,d}",
      )
      for line in found
    ),
  ]
