"""The corpus that every machine has."""

import pathlib
import sysconfig

import pytest

from sparsejax import errors
from sparsejax.data import shards, stdlib


@pytest.fixture
def fake_library(tmp_path, monkeypatch):
  """A small standard library, with what does not belong into the corpus."""
  folder = tmp_path / "python3"
  for number in range(60):
    write(folder / f"module_{number}.py", f"value = {number}\n" * 40)
  write(folder / "package" / "inner.py", "inner = 1\n")
  write(folder / "package" / "data.txt", "not source\n")
  write(folder / "site-packages" / "installed.py", "installed = 1\n")
  write(folder / "dist-packages" / "installed.py", "installed = 1\n")
  write(folder / "package" / "__pycache__" / "cached.py", "cached = 1\n")
  write(folder / "config-3.12-linux" / "python-config.py", "config = 1\n")
  (folder / "old_name.py").symlink_to("module_7.py")
  (folder / "broken.py").write_bytes(b"# \xff not UTF-8\n")
  monkeypatch.setattr(sysconfig, "get_paths", lambda: dict(stdlib=str(folder)))
  return folder


def write(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)


def text_of(directory):
  manifest = shards.load(directory)
  tokenizer = shards.load_tokenizer(directory, manifest)
  texts = {}
  for split in ("train", "validation"):
    records = shards.Records(directory, manifest, split)
    texts[split] = [tokenizer.decode(records[n].tolist()) for n in range(len(records))]
  return texts


def test_it_is_the_source_files_and_nothing_else(fake_library, tmp_path):
  manifest = stdlib.prepare_stdlib(tmp_path / "out")
  texts = text_of(tmp_path / "out")
  everything = "".join(texts["train"] + texts["validation"])
  assert manifest.counts["documents"] == 61
  assert manifest.counts["bad_utf8"] == 1
  assert "inner = 1" in everything
  for absent in ("installed", "cached", "config", "not source"):
    assert absent not in everything


def test_files_are_in_one_split_only(fake_library, tmp_path):
  stdlib.prepare_stdlib(tmp_path / "out")
  texts = text_of(tmp_path / "out")
  assert texts["train"]
  assert texts["validation"]
  assert not set(texts["train"]) & set(texts["validation"])


def test_it_is_prepared_once_and_always_the_same(fake_library, tmp_path):
  first = stdlib.prepare_stdlib(tmp_path / "out")
  stamp = (tmp_path / "out" / shards.MANIFEST).stat().st_mtime_ns
  again = stdlib.prepare_stdlib(tmp_path / "out")
  assert (tmp_path / "out" / shards.MANIFEST).stat().st_mtime_ns == stamp
  elsewhere = stdlib.prepare_stdlib(tmp_path / "elsewhere")
  assert first.fingerprint == again.fingerprint == elsewhere.fingerprint


def test_a_python_without_its_sources_is_told_apart(tmp_path, monkeypatch):
  (tmp_path / "empty" / "encodings").mkdir(parents=True)
  monkeypatch.setattr(sysconfig, "get_paths", lambda: dict(stdlib=str(tmp_path / "empty")))
  with pytest.raises(errors.DataError, match=r"holds no \.py files; prepare a corpus of your"):
    stdlib.prepare_stdlib(tmp_path / "out")


def test_the_python_at_hand_has_its_sources():
  folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
  assert (folder / "argparse.py").is_file()
