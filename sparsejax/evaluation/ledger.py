"""What was measured, line by line in a file: an interrupted evaluation goes on from there.

A line holds a key, everything that the value depends on, and the value. Lines are written
whole and reach the disk before the next unit begins; the torn last line of a process that was
killed is left out. Two processes cannot write to one file.
"""

import datetime
import fcntl
import hashlib
import json
import os
import pathlib
from typing import Any

from sparsejax import errors

NAME = "cells.jsonl"


class Ledger:
  """The file of one directory of results; a context manager that holds it.

  Attributes:
    num_taken: values that were there before.
    num_measured: values that were added.
    made_by: what made what was taken: commit of the program and device, of each pair once.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    commit: str = "",
    device: str = "",
    is_fresh: bool = False,
  ):
    """Opens the file, or makes it.

    Args:
      directory: of results; made if need be.
      commit, device: of this program, written beside what it measures.
      is_fresh: forget what is there, and write over it once there is something new.

    Raises:
      UserError: the directory cannot be written to, or another process is writing.
      DataError: the file is damaged in its midst.
    """
    self.path = directory / NAME
    self.num_taken, self.num_measured, self.made_by = 0, 0, set()
    self._directory, self._commit, self._device = directory, commit, device
    try:
      directory.mkdir(parents=True, exist_ok=True)
      self._file = open(self.path, "a+b")
    except OSError as error:
      raise errors.UserError(
        f"cannot write to {directory}: {error.strerror}. Choose another --out, or mend its "
        "permissions."
      ) from error
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      self._file.close()
      raise errors.UserError(
        f"another evaluation is writing to {directory}; wait for it, stop it, or choose "
        "another --out."
      ) from None
    self._is_fresh = is_fresh
    try:
      self._entries = {} if is_fresh else self._read()
    except errors.DataError:
      self._file.close()
      raise

  def __enter__(self) -> "Ledger":
    return self

  def __exit__(self, *_) -> None:
    self._file.close()

  def find(self, key: dict[str, Any], files: tuple[str, ...] = ()) -> dict[str, Any] | None:
    """The entry of a key, whose `value` it is; None if there is none.

    Args:
      key: JSON.
      files: below the directory, which must be as they were left.
    """
    entry = self._entries.get(_text(key))
    if entry is None or entry["files"] != self._sums(files):
      return None
    return entry

  def take(self, key: dict[str, Any], files: tuple[str, ...] = ()) -> Any:
    """The value of a key that `find` knows; counted as taken."""
    entry = self.find(key, files)
    self.num_taken += 1
    self.made_by.add((entry["commit"], entry.get("device", "unknown")))
    return entry["value"]

  def add(
    self, key: dict[str, Any], value: Any, files: tuple[str, ...] = (), seconds: float = 0.0
  ) -> None:
    """Writes a value down, after the files that belong to it; all are on the disk then.

    Raises:
      UserError: it cannot be written.
      ValueError: the value is no JSON, as NaN is none.
    """
    entry = dict(
      key=key,
      value=value,
      files=self._sums(files),
      commit=self._commit,
      device=self._device,
      time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      seconds=round(seconds, 3),
    )
    # One write of a file that is opened to append: there is no half of it before a whole.
    line = (json.dumps(entry, allow_nan=False) + "\n").encode()
    try:
      if self._is_fresh:
        self._file.truncate(0)
        self._is_fresh = False
      written = os.write(self._file.fileno(), line)
      os.fsync(self._file.fileno())
    except OSError as error:
      raise errors.UserError(f"cannot write to {self.path}: {error.strerror}.") from error
    if written < len(line):
      raise errors.UserError(f"cannot write to {self.path}: the disk is full.")
    self._entries[_text(key)] = entry
    self.num_measured += 1

  def _read(self) -> dict[str, dict[str, Any]]:
    self._file.seek(0)
    content = self._file.read()
    whole = content.rpartition(b"\n")[0]
    if len(content) > len(whole) + bool(whole):
      # What a killed process left of its last line; the next one begins at its place.
      self._file.truncate(len(whole) + bool(whole))
    entries = {}
    for number, line in enumerate(whole.splitlines(), 1):
      try:
        entry = json.loads(line)
        entries[_text(entry["key"])] = entry
      except (ValueError, KeyError, TypeError):
        raise errors.DataError(
          f"line {number} of {self.path} is damaged; delete the line to measure it again, or "
          "start with --fresh to measure everything again."
        ) from None
    return entries

  def _sums(self, files: tuple[str, ...]) -> dict[str, str | None]:
    return {name: _sum(self._directory / name) for name in files}


def _text(key: dict[str, Any]) -> str:
  return json.dumps(key, sort_keys=True)


def _sum(path: pathlib.Path) -> str | None:
  if not path.is_file():
    return None
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
