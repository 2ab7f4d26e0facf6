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


def blocks(text: str) -> list[str | list[tuple[str, ...]]]:
  """What a text has in turn: lines, and tables of `align` as rows, the header first."""
  found: list[str | list[tuple[str, ...]]] = []
  for line in text.splitlines():
    if not line.startswith("|"):
      if line.strip():
        found.append(line)
      # A table ends with its last line, whatever comes next.
      found.append("")
    elif not set(line) <= set("|-"):
      row = tuple(cell.strip() for cell in line.strip("|").split("|"))
      if found and isinstance(found[-1], list):
        found[-1].append(row)
      else:
        found.append([row])
  return [block for block in found if block]
