"""A run has its directory to itself, and knows at once if it cannot write there."""

import errno
import os
import pathlib
import re

import pytest

from sparsejax import errors
from sparsejax.training import workdir


def test_a_directory_is_made_and_left_clean(tmp_path):
  with workdir.claim(tmp_path / "runs" / "a") as claimed:
    assert claimed == tmp_path / "runs" / "a"
    assert [path.name for path in claimed.iterdir()] == [".lock"]


def test_a_relative_path_becomes_absolute(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with workdir.claim("runs/a") as claimed:
    assert claimed == tmp_path / "runs" / "a"


def test_a_second_run_in_the_same_directory_is_refused(tmp_path):
  message = re.escape(
    f"another run is in --workdir={tmp_path}; wait for it, stop it, or choose another."
  )
  with (
    workdir.claim(tmp_path),
    pytest.raises(errors.UserError, match=message),
    workdir.claim(tmp_path),
  ):
    pass


def test_a_directory_is_free_again_after_a_run(tmp_path):
  with workdir.claim(tmp_path):
    pass
  with pytest.raises(RuntimeError, match="broken"), workdir.claim(tmp_path):
    raise RuntimeError("broken")
  with workdir.claim(tmp_path), workdir.claim(tmp_path / "another"):
    pass


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_its_place_is_named(tmp_path, place):
  (tmp_path / "file").write_text("precious")
  message = rf"cannot write to --workdir=.*{place}: .*\. Choose another"
  with pytest.raises(errors.UserError, match=message), workdir.claim(tmp_path / place):
    pass
  assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_full_or_read_only_disk_shows_at_once(tmp_path, monkeypatch, number):
  def fail(path, content):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(pathlib.Path, "write_bytes", fail)
  message = rf"cannot write to --workdir=.*: {os.strerror(number)}\. Choose another, or mend"
  with pytest.raises(errors.UserError, match=message), workdir.claim(tmp_path):
    pass


def test_a_failure_of_the_run_itself_is_not_blamed_on_the_directory(tmp_path):
  with pytest.raises(OSError, match="elsewhere"), workdir.claim(tmp_path):
    raise OSError("elsewhere")
