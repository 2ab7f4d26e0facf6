"""Budgets for checkpoints some of which choose no blocks."""

import json

import pytest

from configs import base
from sparsejax import errors
from sparsejax.configuration import build
from sparsejax.evaluation import request as requests
from sparsejax.evaluation import table
from tests import small

pytestmark = pytest.mark.usefixtures("plain_report")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs")
  for name in ("ssa", "sliding_window"):
    config = small.make_config(data__sources=("recall",), attention__method=name)
    config.data.update(recall_pairs=2, recall_queries=2)
    small.save_checkpoints(folder / name, config)
  return folder


def request(*paths, **options):
  own = dict(tasks=("perplexity",), modes=("sparse",), budgets=(16, 32), max_rows=2) | options
  return requests.Request(path=paths, **own)


def test_a_window_is_asked_once_beside_what_has_budgets(runs, tmp_path):
  asked = request(runs / "ssa", runs / "sliding_window", out=tmp_path)
  text, _ = table.run(asked, base.get_config())
  content = json.loads((tmp_path / "results.json").read_text())
  cells = [
    [x["budget"] for x in own["tasks"]["perplexity"] if x["mode"] == "sparse"]
    for own in content["checkpoints"]
  ]
  assert cells[0] == [16, 32]
  assert len(cells[1]) == 1
  assert text.endswith("sliding_window chooses no blocks: --budgets are not of it\n")


def test_nothing_is_said_where_nobody_named_budgets(runs, tmp_path):
  asked = request(runs / "ssa", runs / "sliding_window", out=tmp_path, budgets=())
  assert "chooses no blocks" not in table.run(asked, base.get_config())[0]


def test_budgets_that_are_of_nobody_are_refused(runs, tmp_path):
  with pytest.raises(
    build.NoBlocksError, match=r"'sliding_window' reads the last .*=12 tokens"
  ):
    table.run(request(runs / "sliding_window"), base.get_config())
  small.save_checkpoints(
    tmp_path / "other",
    small.make_config(data__sources=("recall",), attention__method="sliding_window"),
  )
  asked = request(runs / "sliding_window", tmp_path / "other", out=tmp_path / "out")
  with pytest.raises(errors.ConfigError, match=r"--budgets=16,32 is for .* none of .* does; "):
    table.run(asked, base.get_config())
  assert not (tmp_path / "out").exists()
