"""Loss by context as a table and a picture."""

from collections.abc import Sequence
import pathlib

from sparsejax.evaluation import markdown, perplexity, pictures


def show(
  cells: Sequence[perplexity.Cell], out: pathlib.Path
) -> tuple[str, tuple[pathlib.Path, ...]]:
  """A table of losses by context as markdown, and a picture, `perplexity_by_position.png`.

  Args:
    cells: of `perplexity`; without positions there is nothing to show.
    out: the folder of the picture, which is made.
  """
  if len(found := rows(cells)) < 2:
    return "", ()
  text = f"\nloss by tokens read before\n\n{markdown.align(found)}"
  # What was measured is not lost for want of a picture.
  if (reason := pictures.why_none()) is not None:
    return f"{text}\nno picture: {reason}\n", ()
  out.mkdir(parents=True, exist_ok=True)
  picture = out / "perplexity_by_position.png"
  pictures.draw_positions(cells, picture)
  return text, (picture,)


def rows(cells: Sequence[perplexity.Cell]) -> list[tuple[str, ...]]:
  """Rows of a table of losses by context, the header first.

  Args:
    cells: of `perplexity`.
  """
  shown = [cell for cell in cells if cell.positions]
  bounds = sorted({position.last for cell in shown for position in cell.positions})
  header = "data", "inference", "budget", "length", *(f"to {bound:,d}" for bound in bounds)
  found = [header]
  for cell in shown:
    losses = {position.last: f"{position.loss:.4f}" for position in cell.positions}
    budget = "-" if cell.budget is None else str(cell.budget)
    found.append(
      (
        *(cell.source, cell.mode, budget, f"{cell.length:,d}"),
        *(losses.get(bound, "-") for bound in bounds),
      )
    )
  return found
