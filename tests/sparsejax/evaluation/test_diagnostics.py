"""Diagnostics of a trained model, as a task of eval.py."""

import json

import pytest

from configs import base
from sparsejax import errors
from sparsejax.evaluation import diagnostics, table
from sparsejax.evaluation import request as requests
from tests import small

pytestmark = pytest.mark.usefixtures("plain_report")


def test_the_task_tells_every_layer(tmp_path, monkeypatch):
  config = small.make_config(data__sources=("recall",), attention__method="ssa")
  config.data.update(recall_pairs=2, recall_queries=2)
  small.save_checkpoints(tmp_path / "run", config)
  request = requests.Request(path=tmp_path / "run", tasks=("diagnostics",))
  text, out = table.run(request, base.get_config())
  cells = json.loads((out / "diagnostics.json").read_text())["cells"]
  found = {cell["name"]: cell for cell in cells}
  entropy = found["full/entropy"]
  assert len(entropy["layers"]) == config.model.num_hidden_layers
  assert entropy["value"] == pytest.approx(sum(entropy["layers"]) / len(entropy["layers"]))
  assert found["gap"]["layers"] == []
  assert "| full/entropy " in text
  assert f"{entropy['layers'][1]:.4f}" in text
  monkeypatch.setattr(diagnostics.look, "make", None)
  again, _ = table.run(request, base.get_config())
  assert "cells: 0 measured, 1 taken" in again
  assert again.partition("\ncells: ")[0] == text.partition("\ncells: ")[0]


def test_without_rows_to_look_at_it_is_refused(tmp_path, monkeypatch):
  config = small.make_config(data__sources=("recall",))
  config.data.update(recall_pairs=2, recall_queries=2)
  small.save_checkpoints(tmp_path / "run", config)
  describe = table.subjects.describe

  def without_validation(*args, **kwargs):
    subject = describe(*args, **kwargs)
    for source in subject.corpus.sources:
      object.__setattr__(source, "validation", None)
    return subject

  monkeypatch.setattr(table.subjects, "describe", without_validation)
  request = requests.Request(path=tmp_path / "run", tasks=("diagnostics",))
  with pytest.raises(errors.DataError, match="none of the data has a validation split"):
    table.run(request, base.get_config())
