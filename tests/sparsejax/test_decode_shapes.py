"""The program that times shapes: what it refuses, all of it before any work."""

import json

import numpy as np
import pytest

from sparsejax import decode_shapes, sharding
from sparsejax.evaluation import throughput
from tests.sparsejax.evaluation import nosa

CONFIG = "--config=configs/smoke.py"
WARM = 3


@pytest.fixture(autouse=True)
def few_warm_steps(monkeypatch):
  monkeypatch.setattr(throughput, "WARM_STEPS", WARM)


@pytest.fixture
def no_work(monkeypatch):
  def make(*arguments):
    raise AssertionError("parameters were made before the mistake was seen")

  monkeypatch.setattr(decode_shapes, "random_params", make)


@pytest.fixture
def lists(tmp_path):
  """A folder with recordings behind 100 tokens that fit the smoke preset."""
  folder = tmp_path / "lists"
  folder.mkdir()
  np.save(folder / "100.npy", np.tile(np.arange(4, dtype=np.int32), (1, 1, 1, 2, 1)))
  return folder


def refusal(capsys, *arguments) -> str:
  assert decode_shapes.main([CONFIG, *arguments]) == 2
  said = capsys.readouterr().err
  assert said.startswith("error: ")
  assert said.count("\n") == 1
  return said


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--kv_gib=nan"], "--kv_gib=nan must be above 0, and below 8589934592"),
    (["--kv_gib=inf"], "--kv_gib=inf must be above 0, and below"),
    (["--kv_gib=-inf"], "--kv_gib=-inf must be above 0"),
    (["--kv_gib=1e290"], "--kv_gib=1e+290 must be above 0, and below"),
    (["--methods=full,nosa,full"], "--methods=full,nosa,full names full twice; name each once"),
    (["--methods=full,"], "unknown method in --methods ''. There are: full, moba"),
    (["--methods="], "unknown method in --methods ''. There are: full, moba"),
    (["--methods=nose"], "unknown method in --methods 'nose'. Did you mean 'nosa'"),
    (["--out="], "--out has an empty path; name a directory, or leave it out"),
    (["--name="], "--name= cannot begin the names of files"),
    (["--name=a/b"], "--name=a/b cannot begin the names of files; take a word without a /"),
    (["--name=/a"], "--name=/a cannot begin"),
    (["--name=a/"], "--name=a/ cannot begin"),
    (["--name=."], "--name=. cannot begin"),
  ],
)
def test_flags_that_make_no_sense_are_refused(no_work, capsys, arguments, message):
  rows = [] if "--kv_gib" in arguments[0] else ["--rows=1"]
  assert message in refusal(capsys, *arguments, *rows)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("--config.attention.method=moba", "would undo --methods=full,nosa; set --methods in its"),
    (
      "--noconfig.attention.method",
      "--noconfig.attention.method would undo --methods=full,nosa",
    ),
    ("--config.attention.kernels=strict", "would undo --kernels=auto; set --kernels in its"),
    (
      "--config.attention.layer_methods=moba,full",
      "attention.layer_methods=('moba', 'full') would run in place of each of "
      "--methods=full,nosa; name one of them, or empty it with "
      "--config.attention.layer_methods= and nothing behind",
    ),
  ],
)
def test_changes_that_would_make_all_methods_one_are_refused(no_work, capsys, change, message):
  given = "--rows=1", "--methods=full,nosa", change
  assert message in refusal(capsys, *given)


@pytest.fixture
def of_layers(tmp_path):
  """A preset whose layers have methods of their own."""
  path = tmp_path / "of_layers.py"
  path.write_text(
    "from configs import smoke\n\n\ndef get_config():\n  c = smoke.get_config()\n"
    "  c.attention.layer_methods = ('moba', 'full')\n  return c\n"
  )
  return f"--config={path}"


def test_methods_of_layers_in_the_config_are_of_one_method_or_emptied(
  no_work, capsys, of_layers
):
  given = of_layers, "--rows=1", "--methods=full,nosa"
  assert "attention.layer_methods=('moba', 'full') would run" in refusal(capsys, *given)
  for more in ("--config.attention.layer_methods=", "--methods=moba"):
    with pytest.raises(AssertionError, match="parameters were made"):
      decode_shapes.main([*given, more])


@pytest.mark.parametrize(
  ("methods", "key", "message"),
  [
    ("nosa", "nose", "unknown method in --lists 'nose'. Did you mean 'nosa'"),
    ("nosa", "", "unknown method in --lists ''. There are: full, moba"),
    (
      "full,nosa",
      "moba",
      "is of a method that is not decoded; add moba to --methods=full,nosa",
    ),
    *(
      (name, name, f"{name} takes no lists as moba, infllmv2, dma, ed_dma, nosa do. Leave it")
      for name in ("full", "nsa", "sliding_window")
    ),
  ],
)
def test_lists_that_would_not_be_replayed_are_refused(
  no_work, capsys, lists, methods, key, message
):
  given = "--rows=1", "--contexts=100", f"--methods={methods}", f"--lists={key}={lists}"
  assert message in refusal(capsys, *given)


def test_lists_of_a_method_are_named_once(no_work, capsys, lists):
  given = "--rows=1", "--contexts=100", "--methods=nosa", f"--lists=nosa={lists},nosa={lists}"
  assert "names nosa twice; name each once" in refusal(capsys, *given)


def test_lists_of_ssa_are_those_of_its_sparse_side(no_work, capsys, lists):
  given = "--rows=1", "--contexts=100", "--methods=ssa", f"--lists=ssa={lists}"
  with pytest.raises(AssertionError, match="parameters were made"):
    decode_shapes.main([CONFIG, *given])
  message = "cannot be replayed: ssa takes no lists"
  assert message in refusal(capsys, *given, "--config.attention.sparse_method=nsa")


@pytest.mark.parametrize(
  ("context", "more", "message"),
  [
    # Lists have four blocks of 16: the longest row that is read whole, with 8 timed steps.
    (64 - WARM - 8, [], "which a budget of 64 keys reads whole: no list is replayed"),
    (100, ["--config.infllmv2.dense_length=102"], "as are all rows of fewer than 102 tokens"),
  ],
)
def test_lists_behind_contexts_that_are_read_whole_are_refused(
  no_work, capsys, lists, context, more, message
):
  np.save(lists / f"{context}.npy", np.load(lists / "100.npy"))
  given = "--rows=1", "--steps=8", "--methods=nosa", f"--lists=nosa={lists}"
  found = refusal(capsys, *given, f"--contexts={context}", *more)
  assert f"--contexts={context} " in found
  assert message in found
  # One token more, and they are replayed.
  np.save(lists / f"{context + 1}.npy", np.load(lists / "100.npy"))
  with pytest.raises(AssertionError, match="parameters were made"):
    decode_shapes.main([CONFIG, *given, f"--contexts={context + 1}", *more])


def test_a_recording_that_is_missing_is_told_before_another_method_is_timed(
  no_work, capsys, lists
):
  given = "--rows=1", "--methods=full,nosa", "--contexts=100,120", f"--lists=nosa={lists}"
  assert "120.npy is missing; record lists at a context of 120" in refusal(capsys, *given)


@pytest.mark.parametrize(
  ("write", "message"),
  [
    (lambda path: path.write_bytes(b"no array"), "100.npy cannot be read: "),
    (lambda path: path.write_bytes(b""), "100.npy cannot be read: "),
    (lambda path: np.save(path, np.zeros(4, np.int32)), r"has int32[4]; this shape takes"),
    (lambda path: np.save(path, np.zeros((2, 1, 1, 2, 4))), r"has float64[2, 1, 1, 2, 4]; "),
    (
      lambda path: np.save(path, np.zeros((2, 1, 1, 2, 3), np.int32)),
      "whole numbers [steps, layers, rows, 2 key heads, 4 blocks]",
    ),
  ],
)
def test_a_recording_that_is_none_of_the_shape_is_refused(
  no_work, capsys, lists, write, message
):
  write(lists / "100.npy")
  given = "--rows=1", "--methods=nosa", "--contexts=100", f"--lists=nosa={lists}"
  assert message in refusal(capsys, *given)


@pytest.mark.parametrize(
  ("out", "name", "reason"),
  [
    ("file", "a", "File exists"),
    ("file/below", "a", "Not a directory"),
    ("folder", "taken", "Is a directory"),
    ("folder", "a" * 254, "File name too long"),
  ],
)
def test_files_that_cannot_be_written_are_told_before_any_work(
  no_work, capsys, tmp_path, out, name, reason
):
  (tmp_path / "file").touch()
  (tmp_path / "folder" / "taken.md").mkdir(parents=True)
  given = f"--out={tmp_path / out}", f"--name={name}", "--rows=1", "--methods=full"
  found = refusal(capsys, *given)
  assert f"cannot write {name}.json, .md and .png to --out={tmp_path / out}: {reason}" in found
  assert not list((tmp_path / "folder").glob("*.json"))


def test_a_look_at_the_folder_leaves_what_is_there(no_work, tmp_path):
  (tmp_path / "decode_shapes.json").write_text("{}")
  given = CONFIG, f"--out={tmp_path}", "--rows=1", "--methods=full"
  with pytest.raises(AssertionError, match="parameters were made"):
    decode_shapes.main(list(given))
  assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [
    ("decode_shapes.json", "{}")
  ]


def test_results_are_written_to_a_folder_that_was_not_there(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sharding, "make_mesh", lambda **_: nosa.one_device())
  monkeypatch.setattr(decode_shapes.pictures, "why_none", lambda: "none is wanted.")
  out = tmp_path / "a" / "b"
  given = "--rows=1", "--contexts=20", "--steps=1", "--methods=full", f"--out={out}", "--name=x"
  assert decode_shapes.main([CONFIG, *given, "--config.model.num_hidden_layers=1"]) == 0
  assert "no picture: none is wanted." in capsys.readouterr().out
  assert sorted(path.name for path in out.iterdir()) == ["x.json", "x.md"]
  found = json.loads((out / "x.json").read_text())
  assert found["lists"] == dict(full="chosen")
  assert [cell["context"] for cell in found["cells"]] == [20]
  assert found["configs"]["full"]["attention.method"] == "full"
  assert "| full   | full      |" in (out / "x.md").read_text()
