"""The notebooks are executed, so small that it takes seconds, and show what they gave."""

import json
import os
import pathlib
import re

import nbclient
import nbformat
import pytest

from tests import compiling

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))

# What is printed, known without the notebook. Models have hardly been trained: their attention
# is all but uniform, of which blocks keep what counting keys says.
KEPT = str(sum((16 + t % 16 + 1) / (t + 1) for t in range(32, 128)) / 96)[:4]
SAYS = {
  "budget_sweep": r"ssa  budget 128 perplexity \d+\.\d+, [+-]0\.0000 ± 0\.0000 nats above full",
  "chosen_blocks": r"\n 1 queries together read 1\.9 of 8 blocks\n",
  "needle_maps": r"full     256 tokens, 100% of them read: 100% found\n",
  "ssa_and_moba": rf"ssa  AttnSparsity {KEPT}\d\d ± (.*\n)+moba AttnSparsity {KEPT}",
}


def images(notebook):
  """How many pictures each cell shows."""
  cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
  outputs = [cell["outputs"] for cell in cells]
  return [sum("image/png" in output.get("data", {}) for output in each) for each in outputs]


def printed(notebook):
  outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
  return "".join(output.text for output in outputs if output.output_type == "stream")


def test_there_are_notebooks():
  assert {path.stem for path in NOTEBOOKS} == set(SAYS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_it_gave(path):
  notebook = json.loads(path.read_text())
  cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
  assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
  outputs = [output for cell in cells for output in cell["outputs"]]
  assert not [output for output in outputs if output["output_type"] == "error"]
  assert sum(images(notebook)) > 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """Where all of them run: what one trains or compiles, the others find."""
  folder = tmp_path_factory.mktemp("examples") / "examples"
  folder.mkdir()
  return folder


@pytest.fixture(scope="module")
def environment(place):
  kept = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
  return kept | dict(
    SPARSEJAX_EXAMPLES="quick",
    PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "examples")]),
    XLA_FLAGS=compiling.FLAGS,
    JAX_COMPILATION_CACHE_DIR=str(place / "compiled"),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    JAX_PLATFORMS="cpu",
    # Not the one of these tests: pictures belong into the notebook.
    MPLBACKEND="module://matplotlib_inline.backend_inline",
    IPYTHONDIR=str(place / "ipython"),
  )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, place, environment):
  notebook = nbformat.read(path, as_version=4)
  pictured = images(notebook)
  for cell in notebook.cells:
    cell.pop("outputs", None)
    if cell.cell_type == "code":
      cell.outputs = []
  client = nbclient.NotebookClient(
    notebook, timeout=300, resources=dict(metadata=dict(path=str(place)))
  )
  client.execute(env=environment)
  assert images(notebook) == pictured
  assert re.search(SAYS[path.stem], printed(notebook)), printed(notebook)
