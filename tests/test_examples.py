"""The notebooks are executed, and their code still runs."""

import json
import pathlib

from matplotlib import pyplot as plt
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "examples").glob("*.ipynb"))

# What makes a notebook short enough for a test: the text it has, and what replaces it.
SHORTER = {
  "config.train.num_steps = 60": (
    'config.train.num_steps = 2\nconfig.data.sources = ("recall",)\n'
    "config.optimizer.warmup_steps = 1"
  ),
  "num_rows=32": "num_rows=8",
}


def code_cells(path):
  cells = json.loads(path.read_text())["cells"]
  return [cell for cell in cells if cell["cell_type"] == "code"]


def test_there_are_notebooks():
  assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_it_gave(path):
  cells = code_cells(path)
  assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
  outputs = [output for cell in cells for output in cell["outputs"]]
  assert not [output for output in outputs if output["output_type"] == "error"]
  assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
  (tmp_path / "examples").mkdir()
  monkeypatch.chdir(tmp_path / "examples")
  text = "\n".join("".join(cell["source"]) for cell in code_cells(path))
  for long, short in SHORTER.items():
    assert long in text
    text = text.replace(long, short)
  names = {"__name__": path.stem}
  exec(compile(text, str(path), "exec"), names)
  plt.close("all")
  assert names["blocks_LTKM"].shape == (4, 512, 2, 6)
  assert len(names["history"]) == 2
