"""Tables as markdown that reads well in a terminal, and the numbers in them."""

from collections.abc import Sequence
import math


def align(rows: Sequence[Sequence[str]]) -> str:
  """Rows, the first being the header, as a markdown table with columns of equal width."""
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
  lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
  return "\n".join(lines) + "\n"


def number(value: float | None, form: str) -> str:
  """A number in a format, `-` for none."""
  return "-" if value is None else format(value, form)


def with_error(value: float, error: float | None, digits: int) -> str:
  """A number with its standard error, where that is known."""
  known = error is not None and not math.isnan(error)
  return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if known else "")
