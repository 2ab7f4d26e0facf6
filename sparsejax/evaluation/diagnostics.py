"""Where a trained model's attention lies, and which blocks it chooses, layer by layer."""

from collections.abc import Sequence
import dataclasses

from sparsejax import errors, sharding
from sparsejax.configuration import build
from sparsejax.diagnostics import look
from sparsejax.diagnostics import rows as validation_rows
from sparsejax.evaluation import subject as subjects


@dataclasses.dataclass(frozen=True)
class Cell:
  """One number; see `sparsejax.diagnostics.look` for what each is.

  Attributes:
    name: of the number.
    value: the mean over the layers that have it, or that of the model.
    layers: of every layer, None where it has no such number; () where it is the model's.
  """

  name: str
  value: float
  layers: tuple[float | None, ...]


def check(subject: subjects.Subject) -> None:
  """Refuses data that have nothing to look at.

  Raises:
    DataError: no source has a validation split.
  """
  if not any(source.validation for source in subject.corpus.sources):
    raise errors.DataError(
      "none of the data has a validation split; prepare it with --validation_fraction above 0."
    )


def run(subject: subjects.Subject) -> list[Cell]:
  """Looks at the first validation rows, as many as `diagnostics.num_rows` says.

  Raises:
    DataError: see `check`.
  """
  check(subject)
  splits = [source.validation for source in subject.corpus.sources if source.validation]
  take = look.make(subject.transformer, build.make_look_settings(subject.config))
  with sharding.use(subject.mesh):
    batch = validation_rows.first(splits[0], subject.config.diagnostics.num_rows, subject.mesh)
    seen = take(subject.params, batch)
  cells = [Cell(name, float(x), ()) for name, x in seen.model.items()]
  for name, values_L in seen.layers.items():
    layers = tuple(float(x) if x == x else None for x in values_L)
    there = [x for x in layers if x is not None]
    if there:
      cells.append(Cell(name, sum(there) / len(there), layers))
  return cells


def rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
  """Rows of a table, the header first."""
  num_layers = max(len(cell.layers) for cell in cells)
  header = "number", "mean", *(f"layer {i}" for i in range(num_layers))
  return [
    header,
    *(
      (
        cell.name,
        f"{cell.value:.4f}",
        *("-" if x is None else f"{x:.4f}" for x in cell.layers or (None,) * num_layers),
      )
      for cell in cells
    ),
  ]
