"""The lists that a trained model chooses, as a task of eval.py."""

import json

import numpy as np
import pytest

from configs import base
from sparsejax import errors
from sparsejax.evaluation import block_lists, table
from sparsejax.evaluation import request as requests
from sparsejax.evaluation import subject as subjects
from tests import small

pytestmark = pytest.mark.usefixtures("plain_report")


def test_unions_are_those_of_plain_sets():
  rng = np.random.default_rng(0)
  blocks = rng.integers(-1, 9, size=(18, 2, 5))
  sizes = [
    len({b for b in blocks[start : start + 4, head].ravel() if b >= 0})
    for start in (0, 4, 8, 12)
    for head in (0, 1)
  ]
  assert block_lists.mean_union(blocks, 4) == pytest.approx(np.mean(sizes))


def make_workdir(path, method, **changes):
  config = small.make_config(data__sources=("recall",), attention__method=method, **changes)
  config.data.update(recall_pairs=2, recall_queries=2)
  small.save_checkpoints(path / method, config)
  return path / method, config


@pytest.mark.parametrize("method", ["ssa", "nsa"])
def test_the_task_saves_the_lists_of_every_layer(tmp_path, method):
  workdir, config = make_workdir(tmp_path, method)
  request = requests.Request(path=workdir, tasks=("block_lists",))
  text, out = table.run(request, base.get_config())
  blocks = np.load(out / "block_lists.npy")
  length, block_size = config.data.sequence_length, config.attention.block_size
  layers, heads = config.model.num_hidden_layers, config.model.num_key_value_heads
  assert blocks.shape == (layers, length, heads, config.attention.num_blocks)
  # Every query reads its own block and none that comes after it.
  own = np.arange(length)[None, :, None, None] // block_size
  assert (blocks == own).any(-1).all()
  assert (blocks <= own).all()
  content = json.loads((out / "block_lists.json").read_text())
  assert [cell["layer"] for cell in content["cells"]] == list(range(layers))
  assert content["cells"][1]["unions"][2] == block_lists.mean_union(blocks[1], 8)
  assert f"{content['cells'][0]['unions'][0]:.1f}" in text
  # From before, as long as the lists are there.
  again, _ = table.run(request, base.get_config())
  assert "cells: 0 measured, 1 taken" in again
  (out / "block_lists.npy").unlink()
  again, _ = table.run(request, base.get_config())
  assert "cells: 1 measured, 0 taken" in again
  np.testing.assert_array_equal(np.load(out / "block_lists.npy"), blocks)


def test_shares_are_those_of_plain_counting():
  """Of 10 tokens in blocks of 4, two heads; the second query lists its own block twice."""
  blocks_LTKM = np.full((1, 10, 2, 3), -1)
  blocks_LTKM[0, :, :, 0] = np.arange(10)[:, None] // 4
  blocks_LTKM[0, 1, 0, 1] = 0
  blocks_LTKM[0, 5:8, 1, 2] = 0
  blocks_LTKM[0, 9, :, 1] = 1
  (shares_TN,) = block_lists.shares(blocks_LTKM, 4)
  nan = np.nan
  np.testing.assert_array_equal(
    shares_TN, [[1.0, nan, nan], [3 / 8, 1.0, nan], [0.0, 2 / 4, 1.0]]
  )


@pytest.mark.parametrize(
  ("task", "message"),
  [
    ("block_lists", r"chooses no blocks in any layer.* leave block_lists out of --tasks"),
    ("locality", r"does not choose blocks in every layer.* leave locality out of --tasks"),
    ("sparsity", r"chooses no blocks in rows of 64 tokens"),
  ],
)
def test_a_method_without_lists_is_refused_before_anything_is_read(
  tmp_path, monkeypatch, task, message
):
  """Whatever else is asked before it."""
  workdir, _ = make_workdir(tmp_path, "sliding_window")
  monkeypatch.setattr(subjects, "with_params", None)
  request = requests.Request(path=workdir, tasks=("perplexity", task), num_steps=16)
  with pytest.raises(errors.ConfigError, match=rf"attention.method='sliding_window' {message}"):
    table.run(request, base.get_config())
  assert not (workdir / "eval").exists()


def test_layers_with_windows_among_others_have_empty_lists(tmp_path):
  layers = ("sliding_window", "ssa")
  workdir, _ = make_workdir(tmp_path, "ssa", attention__layer_methods=layers)
  subject = subjects.load(workdir, base.get_config())
  window, chosen = block_lists.choose(subject)
  assert (window == -1).all()
  assert (chosen >= 0).any()


def test_rows_that_are_read_whole_have_no_lists(tmp_path):
  workdir, _ = make_workdir(tmp_path, "infllmv2", infllmv2__dense_length=65)
  request = requests.Request(path=workdir, tasks=("block_lists",))
  with pytest.raises(errors.ConfigError, match=r"rows of 64 tokens are below .*length=65 and"):
    table.run(request, base.get_config())
