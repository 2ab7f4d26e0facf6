"""The report: every cell is in it, it reads as HTML, and nothing is fetched."""

import base64
import html.parser
import io
import itertools
import json
import re
import sys

import numpy as np
from PIL import Image
import pytest

from sparsejax.configuration import record
from sparsejax.evaluation import (
  block_lists,
  compare,
  curves,
  diagnostics,
  harness,
  locality,
  markdown,
  page,
  perplexity,
  plans,
  results,
)
from sparsejax.evaluation.needles import show
from sparsejax.evaluation.needles import task as needles

WAYS = (("full", None), ("sparse", 64), ("sparse", 128))
NEVER_CLOSED = {"meta", "img", "br"}


def numbers():
  """Values that differ from each other in the digits that tables show."""
  return (0.1 + 0.0123 * n for n in itertools.count())


def make_cells(kinds):
  """Of every task cells with values of their own, as dataclasses, and their rows."""
  new = numbers()
  take = lambda: next(new)  # noqa: E731
  return {
    "perplexity": (
      [
        perplexity.Cell(
          "web",
          mode,
          budget,
          take(),
          take(),
          take(),
          take(),
          take(),
          take(),
          1000,
          take(),
          0.01,
        )
        for mode, budget in WAYS
      ],
      perplexity.rows,
    ),
    "needle": (
      [
        needles.Cell(
          kind=kind,
          haystack="noise",
          mode=mode,
          budget=budget,
          length=length,
          depth=depth,
          accuracy=take() % 1,
          accuracy_se=0.125,
          loss=take(),
          top1=take() % 1,
          num_questions=4,
        )
        for kind in kinds
        for mode, budget in WAYS
        for length in (256, 512)
        for depth in (0, 100)
      ],
      show.rows,
    ),
    "diagnostics": (
      [
        diagnostics.Cell("full/entropy", take(), (take(), None)),
        diagnostics.Cell("gap", take(), ()),
      ],
      diagnostics.rows,
    ),
    "lm_eval": (
      [
        harness.Cell("piqa", "acc", take(), 0.01, None, mode, budget, 100, 3)
        for mode, budget in WAYS
      ],
      harness.rows,
    ),
    "locality": (
      [
        locality.Cell(
          context=64,
          budget=32,
          spare=spare,
          misses=take(),
          most_misses=3,
          hit_rate=take(),
          foreseen=take(),
          moved_in_vain=take(),
          gamma=take(),
          least_gamma=take(),
          bound=None,
          misses_by_layer=((1.0,),),
        )
        for spare in (0, 16)
      ],
      locality.rows,
    ),
    "block_lists": (
      [block_lists.Cell(layer, (1.0, take(), take(), take()), 4) for layer in range(2)],
      block_lists.rows,
    ),
  }


def make_checkpoint(name, out, kinds=("single", "multi_key"), **about):
  about = (
    dict(
      run=name,
      step=7,
      method="ssa",
      parameters="0123abcd",
      rope_scaling=dict(rope_type="default", factor=4.0, original_max_position_embeddings=8192),
      changes={},
      environment=dict(time="now", commit="abc", device="cpu", num_devices=1),
      backends=dict(attention="xla"),
      config={"data.sequence_length": 512, "attention.block_size": 8, "odd": "<b>&"},
    )
    | about
  )
  out.mkdir(parents=True)
  rng = np.random.default_rng(0)
  own = np.arange(32)[None, :, None, None] // 8
  lists_LTKM = np.minimum(rng.integers(4, size=(2, 32, 2, 3)), own)
  np.save(out / "block_lists.npy", lists_LTKM)
  answers = []
  for task, (cells, rows) in make_cells(kinds).items():
    told = plans.Told(cells, f"{markdown.align(rows(cells))}\nwhere <it> is\n")
    answers.append(results.write(task, told, about, out))
  return results.Checkpoint(
    name, about, ("backend of attention: xla (a & b)",), out, tuple(answers)
  )


class Reader(html.parser.HTMLParser):
  """Checks that tags close, and gathers cells of tables and what would be fetched."""

  def __init__(self):
    super().__init__()
    self.open, self.cells, self.sources, self.text = [], [], [], ""

  def handle_starttag(self, tag, attrs):
    self.sources += [value for name, value in attrs if name in ("src", "href")]
    if tag not in NEVER_CLOSED:
      self.open.append(tag)
    if tag in ("td", "th"):
      self.cells.append("")

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data
    if self.open and self.open[-1] in ("td", "th"):
      self.cells[-1] += data


def read(path):
  reader = Reader()
  reader.feed(path.read_text())
  assert reader.open == []
  return reader


def png(pixels=None):
  """A file of pixels, [height, width, 4]; of a few, if none are given."""
  content = io.BytesIO()
  Image.fromarray(np.zeros((2, 3, 4), np.uint8) if pixels is None else pixels).save(
    content, "PNG"
  )
  return content.getvalue()


def pixels(source):
  """Of a picture inside HTML, [height, width, 4]."""
  with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
    return np.asarray(image.convert("RGBA"))


DIFFERENCE = compare.Difference(
  task="perplexity",
  what="web",
  mode="full",
  budget=None,
  metric="loss (nats/token)",
  run="a",
  reference="b",
  value=2.5,
  reference_value=2.25,
  difference=0.25,
  se=0.0625,
  z=4.0,
  p=6.3e-5,
  num_samples=100,
)


def make_count(path, **changes):
  about = dict(taken=3, measured=4, made_by=(("0ld", "1 x H200"),), path=path / "cells.jsonl")
  return results.Count(**about | changes)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  out = tmp_path_factory.mktemp("out")
  found = [make_checkpoint("a", out / "a"), make_checkpoint("b <i>", out / "b")]
  counts = [make_count(out), make_count(out, taken=0, made_by=())]
  text = results.write_all(found, [DIFFERENCE], counts, out)
  page.write(found, [DIFFERENCE], counts, out)
  return out, found, text


def test_every_cell_is_in_the_report_and_in_the_markdown(written):
  out, found, text = written
  reader = read(out / "report.html")
  for checkpoint in found:
    for answer in checkpoint.answers:
      rows = [block for block in markdown.blocks(answer.text) if isinstance(block, list)]
      flat = [cell for row in rows[0] for cell in row]
      # In their order, side by side.
      joined = "\x00".join(reader.cells)
      assert "\x00".join(flat) in joined
      assert answer.text in text
      assert answer.text in (out / "results.md").read_text()
  for task, (cells, rows) in make_cells(("single", "multi_key")).items():
    for row in rows(cells):
      assert set(row) <= set(reader.cells), task
  assert {"+0.2500 ± 0.0625", "+4.00", "6.3e-05"} <= set(reader.cells)


def test_a_number_of_every_cell_is_in_the_report(written):
  """Not by the tables' own words: by each value that was put into the cells."""
  out, _, _ = written
  shown = re.findall(r"\d+\.\d+", " ".join(read(out / "report.html").cells))
  known = {float(x) for x in shown}

  def is_shown(value):
    near = (round(value, digits) for digits in (2, 3, 4))
    return any(x in known for x in (*near, round(100 * value, 1)))

  names = dict(
    perplexity=("loss", "perplexity", "gap"),
    needle=("accuracy",),
    diagnostics=("value",),
    lm_eval=("value",),
    locality=("misses", "foreseen", "moved_in_vain", "gamma"),
  )
  for task, (cells, _) in make_cells(("single", "multi_key")).items():
    for cell in cells:
      for name in names.get(task, ()):
        assert is_shown(getattr(cell, name)), (task, name, cell)


def test_nothing_is_fetched_and_pictures_are_inside(written):
  out, _, _ = written
  text = (out / "report.html").read_text()
  reader = read(out / "report.html")
  pictures = [source for source in reader.sources if not source.startswith("#")]
  assert all(source.startswith("data:image/webp;base64,UklGR") for source in pictures)
  # Perplexity, its gaps, needles by budget, length and depth twice, lm_eval, layers, cache and
  # prefetch, lists twice.
  assert len(pictures) == 2 + 2 + 2 + 1 + 1 + 2 + 2
  assert not re.search(r"https?://|<script|@import|<link", text)


def test_pictures_are_the_same_pixels_in_fewer_bytes():
  """Photographs apart: of what is drawn, with edges and few colours."""
  axes = curves.draw({"web": [curves.Line("a", "a", (1, 2, 4), (1.0, 2.0, 1.5))]}, x="x", y="y")
  shown = page._figure(page.figures.Figure("a curve", axes))
  (source,) = re.findall('src="([^"]*)"', shown)
  with Image.open(io.BytesIO(axes)) as image:
    np.testing.assert_array_equal(pixels(source), np.asarray(image.convert("RGBA")))
  assert len(base64.b64decode(source.partition(",")[2])) < len(axes) / 2


def test_a_picture_that_webp_has_no_room_for_stays_as_it_is():
  for width, kind in ((16383, "webp"), (16384, "png")):
    long = png(np.zeros((1, width, 4), np.uint8))
    assert f"data:image/{kind};" in page._figure(page.figures.Figure("long", long))


@pytest.mark.parametrize(
  "damage", [lambda x: x[:-60], lambda x: b"", lambda x: x[:40] + x[60:]]
)
def test_a_damaged_picture_is_named(tmp_path, capsys, damage):
  out = make_checkpoint("a", tmp_path / "a").out
  drawn = png(np.random.default_rng(7).integers(256, size=(50, 9, 4), dtype=np.uint8))
  (out / "perplexity_by_position.png").write_bytes(damage(drawn))
  content = json.loads((out / "perplexity.json").read_text())
  content["pictures"] = ["perplexity_by_position.png"]
  (out / "perplexity.json").write_text(json.dumps(content))
  assert page.main([str(out)]) == 2
  said = capsys.readouterr().err
  assert "the picture 'perplexity by position' is damaged" in said
  assert "delete its file" in said


def test_many_pictures_wait_to_be_asked_for(tmp_path, monkeypatch):
  """All are in the file; those beyond some are folded away."""
  monkeypatch.setattr(
    page.figures,
    "draw",
    lambda task, shown: [page.figures.Figure(f"{task} {n}", png()) for n in range(9)],
  )
  page.write([make_checkpoint("a", tmp_path / "a")], [], [make_count(tmp_path)], tmp_path)
  text = (tmp_path / "report.html").read_text()
  assert len([x for x in read(tmp_path / "report.html").sources if "data:" in x]) == 9 * 6
  assert text.count("<summary>1 more pictures</summary>") == 6
  assert text.index("needle 7</figcaption>") < text.index("1 more", text.index("needle 0"))


def test_names_and_configs_are_text_and_no_markup(written):
  out, _, _ = written
  text = (out / "report.html").read_text()
  assert "b &lt;i&gt;" in text
  assert "<i>" not in text
  assert "&lt;b&gt;&amp;" in text
  reader = read(out / "report.html")
  assert "where <it> is" in reader.text
  assert "cells: 4 measured, 3 taken from before" in reader.text
  assert "of the latter some are of commit 0ld on 1 x H200" in reader.text


def test_all_is_in_the_json(written):
  out, found, _ = written
  content = json.loads((out / "results.json").read_text())
  assert [x["name"] for x in content["checkpoints"]] == ["a", "b <i>"]
  for x, checkpoint in zip(content["checkpoints"], found, strict=True):
    assert x["tasks"] == {answer.task: answer.cells for answer in checkpoint.answers}
    assert x["parameters"] == "0123abcd"
  assert content["differences"][0]["p"] == 6.3e-5
  assert [x["taken"] for x in content["counts"]] == [3, 0]


def test_what_tasks_left_becomes_a_report_again(written, capsys):
  out, (checkpoint, _), _ = written
  drawn = np.random.default_rng(7).integers(256, size=(5, 9, 4), dtype=np.uint8)
  drawn[..., 3] = 255
  path = checkpoint.out / "perplexity_by_position.png"
  path.write_bytes(png(drawn))
  told = plans.Told(
    make_cells(("single", "multi_key"))["perplexity"][0], checkpoint.answers[0].text, (path,)
  )
  results.write("perplexity", told, checkpoint.about, checkpoint.out)
  assert page.main([str(checkpoint.out)]) == 0
  assert capsys.readouterr().out == f"saved {checkpoint.out}/report.html\n"
  of_both, again = read(out / "report.html"), read(checkpoint.out / "report.html")
  for answer in checkpoint.answers:
    (rows,) = [x for x in markdown.blocks(answer.text) if not isinstance(x, str)]
    assert {cell for row in rows for cell in row} <= set(again.cells)
  assert len(again.cells) < len(of_both.cells)
  assert any(np.array_equal(pixels(x), drawn) for x in again.sources if "image" in x)
  assert "attention: xla" in again.text


def test_a_report_that_is_written_anew_has_the_pictures_that_it_had(tmp_path):
  """Not others of the same folder, which the report draws in its own way."""
  about = make_checkpoint("a", tmp_path / "a").about
  out, (cells, _) = tmp_path / "b", make_cells(("single",))["needle"]
  (out / "needle").mkdir(parents=True)
  paths = [out / "needle" / f"{name}.png" for name in ("kept", "gone", "other")]
  for path in paths:
    path.write_bytes(png())
  results.write("needle", plans.Told(cells, "text", tuple(paths[:2])), about, out)
  paths[1].unlink()
  (answer,) = results.read(out).answers
  assert answer.pictures == (paths[0],)
  # As it was written before there were names.
  content = json.loads((out / "needle.json").read_text())
  assert content.pop("pictures") == ["needle/kept.png", "needle/gone.png"]
  (out / "needle.json").write_text(json.dumps(content))
  (answer,) = results.read(out).answers
  assert answer.pictures == (paths[0], paths[2])


def test_lists_that_are_gone_are_named(tmp_path, capsys):
  out = make_checkpoint("a", tmp_path / "a").out
  (out / "block_lists.npy").unlink()
  assert page.main([str(out)]) == 2
  assert "block_lists.npy is missing" in capsys.readouterr().err
  (out / "block_lists.json").unlink()
  assert page.main([str(out)]) == 0


def test_a_directory_without_answers_is_refused(tmp_path, capsys):
  assert page.main([str(tmp_path)]) == 2
  assert f"{tmp_path} has no answers of eval.py" in capsys.readouterr().err
  (tmp_path / "needle.json").write_text('{"task": "needle"}')
  assert page.main([str(tmp_path)]) == 2
  assert "needle.json is not what eval.py wrote: KeyError('cells')" in capsys.readouterr().err


def test_without_matplotlib_there_is_a_report_without_pictures(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  page.write([make_checkpoint("a", tmp_path / "a")], [], [make_count(tmp_path)], tmp_path)
  reader = read(tmp_path / "report.html")
  assert "There are no pictures: pictures need the package matplotlib" in reader.text
  assert [x for x in reader.sources if not x.startswith("#")] == []


@pytest.mark.parametrize(
  ("own", "other"),
  [("device", "1 x H200"), ("commit", "0ld")],
)
def test_cells_of_another_device_or_commit_are_told(tmp_path, monkeypatch, own, other):
  here = dict(commit="new", device="cpu", num_devices=8)
  monkeypatch.setattr(record, "environment", lambda: here)
  made_by = dict(commit="new", device="8 x cpu")
  same = make_count(tmp_path, made_by=((made_by["commit"], made_by["device"]),))
  assert results.say(same).endswith("cells.jsonl)")
  made_by[own] = other
  told = results.say(make_count(tmp_path, made_by=((made_by["commit"], made_by["device"]),)))
  assert told.endswith(f"some are of commit {made_by['commit']} on {made_by['device']}")
