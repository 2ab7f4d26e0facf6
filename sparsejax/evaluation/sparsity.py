"""`eval.py --tasks=sparsity`: where attention lies, and what is lost by reading some blocks.

Of every layer and head, by length and budget, over all queries of held-out rows that are read
as one document each. Letters: R rows, L layers, H heads, X any of them.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

from sparsejax import errors, sharding
from sparsejax.configuration import build
from sparsejax.diagnostics import by_head
from sparsejax.evaluation import contexts, locality, perplexity, plans
from sparsejax.evaluation import subject as subjects

# What cells tell, in their order, in words for people.
NAMES = {
  "attn_sparsity": "AttnSparsity",
  "entropy": "AttnEntropy (bits)",
  "sink": "sink mass",
  "error": "error of Theorem 1",
  "bound": "bound of Theorem 1",
  "error_to_bound": "largest error / bound",
  "gamma": "locality gamma",
  "gamma_min": "least gamma",
  "kl": "KL(full to sparse), nats",
}
# Of attention's probabilities alone: where the full stream runs, the same at any budget. Where
# the sparse one does, what a layer is given depends on what those before it have read.
_OF_MASS = ("entropy", "sink")
_EXTREMES = {"error_to_bound": np.max, "gamma_min": np.min}
_NUM_ROWS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """One number of one kind of inference, budget and length.

  Means are over rows, each the mean over its queries; see `diagnostics.by_head` for which
  these are. Standard errors are over rows, and None of a single row or of an extreme.

  Attributes:
    name: a key of `NAMES`.
    mode: the stream that was run, `full` or `sparse`; None for `kl`, which is of both.
    budget: keys a query reads under sparse inference; None for what does not depend on it, as
      entropy and sink mass of the full stream.
    length: tokens of a row.
    value, se: over layers and heads; of `error_to_bound` and `gamma_min` the extreme.
    layers, layers_se: the same of each layer; None where it has no such number, and () where
      the number is the model's.
    heads, heads_se: of each layer and query head, or key head of `gamma` and `gamma_min`, in
      five and in two digits.
    limit: what a theorem says that `value` cannot pass: 1 for `error_to_bound`; for `gamma_min`
      NOSA's least share, None for other methods.
    num_rows: that were looked at.
  """

  name: str
  mode: str | None
  budget: int | None
  length: int
  value: float
  se: float | None
  layers: tuple[float | None, ...]
  layers_se: tuple[float | None, ...]
  heads: tuple[tuple[float, ...] | None, ...]
  heads_se: tuple[tuple[float, ...] | None, ...]
  limit: float | None
  num_rows: int


def run(subject: subjects.Subject, **options) -> list[Cell]:
  """Looks at rows in every mode, budget and length; see `plan` and `cells`."""
  units = plan(subject, **options)
  return cells(units, plans.measure(units, subject), subject)


def plan(
  subject: subjects.Subject,
  *,
  modes: Sequence[str] = perplexity.MODES,
  budgets: Sequence[int] = (),
  lengths: Sequence[int] = (),
  num_rows: int = 0,
  batch_size: int = 0,
) -> tuple[plans.Unit, ...]:
  """Units of a length and a budget each, of the same rows from their first token on.

  Args:
    subject: the checkpoint.
    modes: streams whose attention is looked at.
    budgets: keys a query reads; () is that of training.
    lengths: tokens of a row; () is a row of the subject.
    num_rows: rows; 0 is 8.
    batch_size: rows at once; 0 is one for each device.

  Raises:
    ConfigError: what `perplexity.check_modes` refuses; lengths beyond the rows of the subject;
      or a model of which no layer chooses blocks.
    DataError: see `contexts.rows`.
  """
  config, options = subject.config, subject.transformer.options
  row_length = config.data.sequence_length
  lengths = tuple(dict.fromkeys(lengths)) or (row_length,)
  for length in lengths:
    if length > row_length:
      raise errors.ConfigError(
        f"--lengths={length} exceeds the model's rows of {row_length} tokens; take at most "
        f"that, or --sequence_length={length} to look beyond what it was trained on."
      )
  # Full attention has lists to look at as well: those that the sparse stream would read.
  perplexity.check_modes(modes, (), options.block_size, row_length)
  perplexity.check_modes(perplexity.MODES, budgets, options.block_size, row_length)
  budgets = tuple(dict.fromkeys(budgets)) or (options.budget,)
  batch_size = -(-(batch_size or 1) // subject.mesh.size) * subject.mesh.size
  _check_lists(subject, lengths, batch_size)
  rows_RT = contexts.rows(subject, num_rows or _NUM_ROWS, max(lengths))
  return tuple(
    plans.Unit(
      key=dict(
        task="sparsity",
        length=length,
        budget=budget,
        modes=tuple(modes),
        rows=plans.digest(rows_RT[:, :length]),
        num_sink_keys=config.diagnostics.num_sink_keys,
      ),
      measure=functools.partial(
        _measure,
        budget=budget,
        modes=modes,
        rows_RT=rows_RT[:, :length],
        batch_size=batch_size,
      ),
      samples=functools.partial(_samples, length=length, budget=budget),
    )
    for length in lengths
    for budget in budgets
  )


def _check_lists(subject: subjects.Subject, lengths, batch_size: int) -> None:
  """Before anything is computed."""
  with sharding.use(subject.mesh):
    for length in lengths:
      ids_BT = jax.ShapeDtypeStruct((batch_size, length), np.int32)
      if by_head.places_with_lists(subject.transformer, subject.params, ids_BT):
        return
  options = subject.transformer.options
  raise errors.ConfigError(
    f"attention.method={'+'.join(options.pattern)!r} chooses no blocks in rows of "
    f"{max(lengths)} tokens, so that nothing can be told of them; --tasks=sparsity is for "
    "models that do. Rows below infllmv2.dense_length are read whole: take longer --lengths."
  )


def _measure(
  subject: subjects.Subject, *, budget: int, modes, rows_RT: np.ndarray, batch_size: int
) -> dict[str, Any]:
  """By `stream/name`, [L, R, heads], None for layers without such a number; and `kl`, [R]."""
  measure = by_head.make(
    build.with_budget(subject.transformer, budget),
    num_sink_keys=subject.config.diagnostics.num_sink_keys,
    chunk_length=subject.config.loss.chunk_length,
  )
  pieces = []
  with sharding.use(subject.mesh):
    for start in range(0, len(rows_RT), batch_size):
      rows = rows_RT[start : start + batch_size]
      # The last batch is filled up, so that one compiled shape serves all.
      filled = np.resize(rows, (batch_size, rows.shape[1]))
      found = jax.device_get(measure(subject.params, sharding.put_batch(filled, subject.mesh)))
      heads = {name: x[:, : len(rows)] for name, x in found.heads.items()}
      pieces.append(heads | {"kl": found.kl_B[: len(rows)]})
  joined = {
    name: np.concatenate([piece[name] for piece in pieces], axis=min(1, x.ndim - 1))
    for name, x in pieces[0].items()
  }
  value = {"kl": joined.pop("kl")}
  for key, x_LRH in joined.items():
    mode, _, name = key.partition("/")
    if mode in modes:
      # What every layer has is shown as it is, also of a model that is not finite.
      value[key] = [
        None if name not in _OF_MASS and np.isnan(x_RH).all() else x_RH for x_RH in x_LRH
      ]
  return value


def _samples(value: dict[str, Any], *, length: int, budget: int) -> list[plans.Samples]:
  """AttnSparsity and KL of each row."""
  of_rows = {("kl", "sparse"): value["kl"]}
  for name, layers in value.items():
    mode, _, number = name.partition("/")
    there = [layer for layer in layers if layer is not None]
    if number == "attn_sparsity" and there:
      of_rows[number, mode] = np.array(there, np.float64).mean((0, 2)).tolist()
  return [
    plans.Samples(
      what=f"{length} tokens",
      mode=mode,
      budget=budget,
      metric=NAMES[number],
      sums=plans.floats(rows),
      weights=(1.0,) * len(rows),
    )
    for (number, mode), rows in of_rows.items()
  ]


def cells(
  units: Sequence[plans.Unit], values: Sequence[Any], subject: subjects.Subject
) -> list[Cell]:
  """Cells by length, name, mode and budget.

  None for what no query, or no layer, has: where a budget reads a row whole, nothing is
  dropped.
  """
  at = {
    (unit.key["length"], unit.key["budget"]): value
    for unit, value in zip(units, values, strict=True)
  }
  lengths, budgets = (tuple(dict.fromkeys(x)) for x in zip(*at, strict=True))
  found = []
  for length in lengths:
    for name in NAMES:
      for mode in [None] if name == "kl" else units[0].key["modes"]:
        is_of_any = mode == "full" and name in _OF_MASS
        for budget in budgets[:1] if is_of_any else budgets:
          value = at[length, budget].get(name if mode is None else f"{mode}/{name}")
          # Rows of a model that is not finite are None, too, but there.
          if value is None or (name != "kl" and all(layer is None for layer in value)):
            continue
          found.append(
            Cell(
              name=name,
              mode=mode,
              budget=None if is_of_any else budget,
              length=length,
              limit=_limit(name, subject, budget, length),
              **(_of_model if name == "kl" else _of_layers)(name, value),
            )
          )
  return found


def _of_model(name: str, value: Sequence[float]) -> dict[str, Any]:
  """Over rows."""
  del name
  mean, error = _mean(np.array(value, np.float64))
  nothing = dict.fromkeys(("layers", "layers_se", "heads", "heads_se"), ())
  return dict(value=float(mean), se=_number(error), num_rows=len(value), **nothing)


def _of_layers(name: str, value: Sequence) -> dict[str, Any]:
  """Over rows, of all layers that have the number, of each, and of each head, [L][R, heads]."""
  of_layers = [None if layer is None else np.array(layer, np.float64) for layer in value]
  there_LRH = np.array([x_RH for x_RH in of_layers if x_RH is not None])
  layers, heads = [], []
  for x_RH in of_layers:
    layers.append((None, None) if x_RH is None else _floats(*_take(name, x_RH.T)))
    of_heads = [] if x_RH is None else [_short(*_take(name, x_R[None])) for x_R in x_RH.T]
    means, errors_ = zip(*of_heads, strict=True) if of_heads else (None, None)
    heads.append((means, None if errors_ is None or None in errors_ else errors_))
  total, error = _floats(*_take(name, there_LRH.swapaxes(1, 2).reshape(-1, there_LRH.shape[1])))
  layers, layers_se = zip(*layers, strict=True)
  heads, heads_se = zip(*heads, strict=True)
  return dict(
    value=total,
    se=error,
    layers=layers,
    layers_se=layers_se,
    heads=heads,
    heads_se=heads_se,
    num_rows=there_LRH.shape[1],
  )


def _take(name: str, x_XR: np.ndarray):
  """Of some heads, [X, R], the extreme or the mean, and the mean's standard error."""
  if name in _EXTREMES:
    return _EXTREMES[name](x_XR), math.nan
  return _mean(x_XR.mean(0))


def _mean(x_R: np.ndarray):
  """Over rows, and its standard error; NaN of a single one."""
  n = len(x_R)
  return x_R.mean(), x_R.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan


def _floats(value, error) -> tuple[float, float | None]:
  return float(value), _number(error)


def _short(value, error) -> tuple[float, float | None]:
  """Of the many heads no more digits than anyone quotes."""
  digits, of_error = f"{value:.5g}", f"{error:.2g}"
  return _floats(float(digits), float(of_error))


def _number(value) -> float | None:
  return None if math.isnan(value) else float(value)


def _limit(name: str, subject: subjects.Subject, budget: int, length: int) -> float | None:
  if name == "error_to_bound":
    return 1.0
  options = build.with_budget(subject.transformer, budget).options
  most = locality.most_new(options)
  if name != "gamma_min" or most is None:
    return None
  return max(0.0, 1 - most / options.num_listed(length))
