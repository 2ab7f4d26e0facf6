"""Answers as one HTML file with its pictures in it: nothing is fetched when it is read.

  python -m sparsejax.evaluation.page runs/a/eval/1000

writes it anew from what tasks left in a directory, of an evaluation that was interrupted too:
no checkpoint is read, and no GPU is needed.
"""

import argparse
import base64
from collections.abc import Iterator, Sequence
import html
import io
import json
import pathlib
import sys

from sparsejax import errors
from sparsejax.evaluation import compare, figures, markdown, pictures, results

NAME = "report.html"

# Of a task; others are shown when asked for.
_MOST_SHOWN = 8
# Pixels; WebP has no room for more.
_WEBP_SIDE = 16383

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1b1f24; margin: 0 auto; padding: 1.5rem;
  max-width: 78rem; }
h1 { font-size: 1.5rem; margin-bottom: 0.2rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d0d7de; }
h3 { font-size: 1rem; margin-bottom: 0.3rem; }
nav a { margin-right: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: 0.6rem 0;
  font-variant-numeric: tabular-nums; }
th, td { border: 1px solid #d0d7de; padding: 0.2rem 0.5rem; text-align: left;
  white-space: nowrap; }
th { background: #f6f8fa; }
tbody tr:nth-child(even) { background: #fafbfc; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; }
figcaption, .note { color: #57606a; font-size: 13px; }
pre { background: #f6f8fa; padding: 0.7rem; overflow-x: auto; font-size: 12px; }
summary { cursor: pointer; color: #0550ae; }
"""


def write(
  checkpoints: Sequence[results.Checkpoint],
  differences: Sequence[compare.Difference],
  counts: Sequence[results.Count],
  out: pathlib.Path,
) -> None:
  """Writes `report.html`.

  Args:
    checkpoints: what each answered.
    differences: between them; () if nobody asked.
    counts: of their ledgers; () where they are not at hand.
    out: directory.

  Raises:
    DataError: a picture that a task left is damaged.
  """
  out.mkdir(parents=True, exist_ok=True)
  parts = "\n".join(_parts(checkpoints, differences, counts))
  (out / NAME).write_text(parts, encoding="utf-8")


def _parts(checkpoints, differences, counts) -> Iterator[str]:
  tasks = list(dict.fromkeys(a.task for x in checkpoints for a in x.answers))
  names = ", ".join(x.name for x in checkpoints)
  title = html.escape(f"Evaluation of {names}")
  sections = [*tasks, *(["differences"] if differences else []), "how"]
  links = "".join(f'<a href="#{name}">{name.replace("_", " ")}</a>' for name in sections)
  yield f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
  yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
  yield f"<style>{_STYLE}</style></head><body>"
  yield f"<h1>{title}</h1>"
  about = checkpoints[0].about["environment"]
  yield _note(f"{about['time']}, commit {about['commit']}, on {results.device(about)}")
  yield f"<nav>{links}</nav>"
  yield _table(_overview(checkpoints))
  for x in checkpoints:
    for line in results.changes(x.about):
      yield _note(f"{x.name}: {line}")
  if (reason := pictures.why_none()) is not None:
    yield _note(f"There are no pictures: {reason}")
  for task in tasks:
    yield from _task(task, checkpoints, can_draw=reason is None)
  if differences:
    yield '<h2 id="differences">differences</h2>'
    yield _note(f"{results.HOW_COMPARED}.")
    yield _table(compare.rows(differences))
  yield '<h2 id="how">how</h2>'
  for number, x in enumerate(checkpoints):
    yield f"<h3>{html.escape(x.name)}</h3>"
    if counts:
      yield _note(results.say(counts[number]))
    yield _note("<br>".join(map(html.escape, x.backends)), is_html=True)
    for name in ("environment", "config"):
      text = html.escape(json.dumps(x.about[name], indent=1))
      yield f"<details><summary>{name}</summary><pre>{text}</pre></details>"
  yield "</body></html>"


def _overview(checkpoints: Sequence[results.Checkpoint]) -> list[tuple[str, ...]]:
  header = "run", "step", "method", "parameters", "tokens of a row", "RoPE", "ran on"
  rows = [header]
  for x in checkpoints:
    config, scaling = x.about["config"], x.about["rope_scaling"]
    rope = scaling["rope_type"]
    if rope != "default":
      rope += f", factor {scaling['factor']:g}"
      rope += f" of {scaling['original_max_position_embeddings']:,d}"
    if any(key.startswith("model.rope_scaling") for key in x.about["changes"]):
      rope += " (changed for this evaluation)"
    rows.append(
      (
        *(x.name, f"{x.about['step']:,d}", x.about["method"], x.about["parameters"]),
        *(f"{config['data.sequence_length']:,d}", rope),
        "; ".join(f"{op}: {backend}" for op, backend in x.about["backends"].items()),
      )
    )
  return rows


def _task(
  task: str, checkpoints: Sequence[results.Checkpoint], *, can_draw: bool
) -> Iterator[str]:
  yield f'<h2 id="{task}">{task.replace("_", " ")}</h2>'
  found = [(x, a) for x in checkpoints for a in x.answers if a.task == task]
  if can_draw:
    shown = [
      figures.Shown(
        name=x.name if len(checkpoints) > 1 else "",
        cells=answer.cells,
        pictures=answer.pictures,
        out=x.out,
        block_size=x.about["config"]["attention.block_size"],
      )
      for x, answer in found
    ]
    drawn = [_figure(figure) for figure in figures.draw(task, shown)]
    yield from drawn[:_MOST_SHOWN]
    if more := drawn[_MOST_SHOWN:]:
      yield f"<details><summary>{len(more)} more pictures</summary>"
      yield from more
      yield "</details>"
  for x, answer in found:
    if len(checkpoints) > 1:
      yield f"<h3>{html.escape(x.name)}</h3>"
    for block in markdown.blocks(answer.text):
      yield _note(block) if isinstance(block, str) else _table(block)


def _figure(figure: figures.Figure) -> str:
  kind, content = _compress(figure)
  data, caption = base64.b64encode(content).decode(), html.escape(figure.caption)
  image = f'<img alt="{caption}" src="data:image/{kind};base64,{data}">'
  return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _compress(figure: figures.Figure) -> tuple[str, bytes]:
  """The same pixels as WebP, in a third of the bytes, and what they are."""
  from PIL import Image  # comes with matplotlib

  content = io.BytesIO()
  try:
    with Image.open(io.BytesIO(figure.png)) as image:
      if max(image.size) > _WEBP_SIDE:
        return "png", figure.png
      # Harder ways take longer, up to seventeen times, for 4% at most.
      image.save(content, "WEBP", lossless=True, method=4)
  except (OSError, SyntaxError) as error:  # as Pillow has it
    raise errors.DataError(
      f"the picture {figure.caption!r} is damaged ({error}); delete its file to have the "
      "report without it, or evaluate again."
    ) from error
  return "webp", content.getvalue()


def _table(rows: Sequence[Sequence[str]]) -> str:
  def line(row, tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in row) + "</tr>"

  head, body = line(rows[0], "th"), "\n".join(line(row, "td") for row in rows[1:])
  return f'<div class="wide"><table><thead>{head}</thead>\n<tbody>{body}</tbody></table></div>'


def _note(text: str, *, is_html: bool = False) -> str:
  return f'<p class="note">{text if is_html else html.escape(text)}</p>'


def main(arguments: list[str] | None = None) -> int:
  """The command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m sparsejax.evaluation.page",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("directory", type=pathlib.Path, help="of one checkpoint's answers")
  options = parser.parse_args(arguments)
  try:
    write([results.read(options.directory)], (), (), options.directory)
  except errors.UserError as error:
    sys.stderr.write(f"error: {error}\n")
    return 2
  sys.stdout.write(f"saved {options.directory / NAME}\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
