"""What a report shows of every task: answers of all checkpoints as pictures."""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import io
import pathlib
import types

import numpy as np

from sparsejax import errors
from sparsejax.evaluation import block_lists, curves, diagnostics, pictures, plans

# Whose lists are shown, the first and the last among them.
_MOST_LAYERS = 8


@dataclasses.dataclass(frozen=True)
class Figure:
  """A picture.

  Attributes:
    caption: below it.
    png: the file.
  """

  caption: str
  png: bytes


@dataclasses.dataclass(frozen=True)
class Shown:
  """What a checkpoint answered to a task.

  Attributes:
    name: of the checkpoint; "" where it is the only one.
    cells: of the task, JSON.
    pictures: files that the task drew itself.
    out: directory of its files.
    block_size: keys of a block.
  """

  name: str
  cells: list[dict]
  pictures: tuple[pathlib.Path, ...]
  out: pathlib.Path
  block_size: int


def draw(task: str, shown: Sequence[Shown]) -> list[Figure]:
  """Pictures of a task's cells, and then those that it drew itself.

  Args:
    task: name.
    shown: by checkpoint.
  """
  found = list(_FIGURES[task](shown)) if task in _FIGURES else []
  return found + [
    Figure(_join(x.name, path.stem.replace("_", " ")), path.read_bytes())
    for x in shown
    for path in x.pictures
  ]


def _perplexity(shown: Sequence[Shown]) -> Iterable[Figure]:
  points, gaps = [], []
  for x in shown:
    for cell in x.cells:
      if cell["mode"] == "unigram":
        continue
      place = dict(
        panel=cell["source"],
        name=x.name,
        mode=cell["mode"],
        budget=cell["budget"],
        length=cell.get("length"),
      )
      # Of the spread over rows, which all of them share, a curve says nothing.
      points.append(place | dict(y=cell["perplexity"], error=None))
      if cell["gap"] is not None:
        gaps.append(place | dict(y=cell["gap"], error=cell["gap_se"]))
  yield from _by_budget_and_length(points, "perplexity")
  if gaps:
    yield from _by_budget_and_length(gaps, "loss above full inference (nats/token)")


def _needle(shown: Sequence[Shown]) -> Iterable[Figure]:
  groups: dict[tuple, list[float]] = {}
  for x in shown:
    for cell in x.cells:
      place = cell["kind"], x.name, cell["mode"], cell["budget"], cell["length"]
      groups.setdefault(place, []).append(cell["accuracy"])
  names = "panel", "name", "mode", "budget", "length"
  points = [
    dict(zip(names, place, strict=True), y=float(np.mean(values)), error=None)
    for place, values in groups.items()
  ]
  yield from _by_budget_and_length(points, "accuracy, mean over depths", bounds=(-0.03, 1.03))
  for x in shown:
    yield Figure(_join(x.name, "accuracy by depth and length"), _needle_maps(x.cells))


def _needle_maps(cells: list[dict]) -> bytes:
  lengths = list(dict.fromkeys(cell["length"] for cell in cells))
  depths = list(dict.fromkeys(cell["depth"] for cell in cells))
  grid = {}
  for cell in cells:
    place = cell["kind"].replace("_", " "), _way(cell["mode"], cell["budget"])
    values = grid.setdefault(place, np.full((len(depths), len(lengths)), np.nan))
    values[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell["accuracy"]
  return curves.draw_maps(
    grid,
    columns=[f"{length:,d}" for length in lengths],
    rows=[f"{depth}%" for depth in depths],
    labels=("tokens", "depth of the needle"),
  )


def _lm_eval(shown: Sequence[Shown]) -> Iterable[Figure]:
  points = [
    dict(
      panel=f"{cell['task']}, {cell['metric']}",
      name=x.name,
      mode=cell["mode"],
      budget=cell["budget"],
      length=None,
      y=cell["value"],
      error=cell["stderr"] if cell["spread"] is None else cell["spread"],
    )
    for x in shown
    for cell in x.cells
  ]
  yield from _by_budget_and_length(points, "value")


def _diagnostics(shown: Sequence[Shown]) -> Iterable[Figure]:
  runs = [
    types.SimpleNamespace(
      name=x.name or "model",
      diagnostics=[plans.restore(diagnostics.Cell, cell) for cell in x.cells],
    )
    for x in shown
  ]
  names = list(dict.fromkeys(cell["name"] for x in shown for cell in x.cells))
  content = io.BytesIO()
  pictures.draw_diagnostics(runs, names, content)
  yield Figure("diagnostics by layer; bars are numbers of the model", content.getvalue())


def _locality(shown: Sequence[Shown]) -> Iterable[Figure]:
  yield from _by_spare_slots(
    shown,
    dict(misses="misses of a step", hit_rate="hit rate"),
    "what a cache of blocks has to load, by layer and key head, while decoding",
  )
  yield from _by_spare_slots(
    shown,
    dict(foreseen="share of the misses", moved_in_vain="in vain, at a step"),
    "what a prefetch would load: the blocks that the layer before has just listed",
  )


def _by_spare_slots(
  shown: Sequence[Shown], titles: dict[str, str], caption: str
) -> Iterable[Figure]:
  panels: dict[str, list[curves.Line]] = {}
  for x in shown:
    # No budget is in older files.
    places = dict.fromkeys((cell["context"], cell.get("budget")) for cell in x.cells)
    budgets = {budget for _, budget in places}
    for context, budget in places:
      own = f"{budget} keys" if len(budgets) > 1 else ""
      label = _join(x.name, own, f"behind {context:,d} tokens")
      for name, title in titles.items():
        points = [
          (cell["spare"], cell[name])
          for cell in x.cells
          # Nothing is said of a prefetch where there is one layer, or in older files.
          if (cell["context"], cell.get("budget")) == (context, budget)
          and cell.get(name) is not None
        ]
        if points:
          line = curves.Line(label, label, *zip(*points, strict=True))
          panels.setdefault(title, []).append(line)
  if panels:
    yield Figure(caption, curves.draw(panels, x="spare slots", y="", is_log=False))


def _block_lists(shown: Sequence[Shown]) -> Iterable[Figure]:
  for x in shown:
    path = x.out / "block_lists.npy"
    if not path.is_file():
      raise errors.DataError(
        f"{path} is missing, which pictures of block_lists are drawn from; put it back, or "
        "have a report without: delete block_lists.json beside it."
      )
    blocks_LTKM = np.load(path)
    shares_LTN = block_lists.shares(blocks_LTKM, x.block_size)
    layers = np.unique(np.linspace(0, len(shares_LTN) - 1, _MOST_LAYERS).round().astype(int))
    maps = {f"layer {layer}": shares_LTN[layer] for layer in layers}
    title = f"share of a block's {x.block_size} queries and its key heads that list a key block"
    yield Figure(
      _join(x.name, "blocks that the first validation row chooses"),
      curves.draw_lists(maps, title),
    )


def _by_budget_and_length(points: list[dict], y: str, **options) -> Iterable[Figure]:
  """Curves over budgets, at every length, and over lengths, where there are several."""
  lengths = {point["length"] for point in points}

  def title(point: dict) -> str:
    at = f", {point['length']:,d} tokens" if len(lengths) > 1 else ""
    return f"{point['panel']}{at}"

  def mode(point: dict) -> str:
    return _join(point["name"], point["mode"])

  def way(point: dict) -> str:
    return _join(point["name"], _way(point["mode"], point["budget"]))

  if any(point["mode"] == "sparse" for point in points):
    panels = {
      name: _lines(own, mode, "budget", lambda point: point["name"])
      for name, own in _groups(points, title).items()
    }
    caption = f"{y} by budget"
    if any(point["mode"] == "full" for point in points):
      caption += "; full inference reads everything, a level across"
    x = "budget (keys a query reads)"
    yield Figure(caption, curves.draw(panels, x=x, y=y, **options))
  if len(lengths) > 1:
    panels = {
      name: _lines(own, way, "length", way)
      for name, own in _groups(points, lambda p: p["panel"]).items()
    }
    yield Figure(f"{y} by length", curves.draw(panels, x="tokens", y=y, **options))


def _lines(
  points: list[dict], label: Callable[[dict], str], x: str, key: Callable[[dict], str]
) -> list[curves.Line]:
  return [
    curves.Line(
      name,
      key(own[0]),
      tuple(point[x] for point in own),
      tuple(point["y"] for point in own),
      tuple(point["error"] for point in own),
    )
    for name, own in _groups(points, label).items()
  ]


def _groups(points: list[dict], name: Callable[[dict], str]) -> dict[str, list[dict]]:
  """Points by name, in the order of their first."""
  groups: dict[str, list[dict]] = {}
  for point in points:
    groups.setdefault(name(point), []).append(point)
  return groups


def _way(mode: str, budget: int | None) -> str:
  return mode if budget is None else f"{mode} {budget}"


def _join(*parts: str) -> str:
  return ", ".join(filter(None, parts))


_FIGURES = {
  "perplexity": _perplexity,
  "needle": _needle,
  "lm_eval": _lm_eval,
  "diagnostics": _diagnostics,
  "locality": _locality,
  "block_lists": _block_lists,
}
