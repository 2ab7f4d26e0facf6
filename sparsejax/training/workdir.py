"""The directory of a run: ours alone, and writable, before any work is done."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib

from sparsejax import errors


@contextlib.contextmanager
def claim(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
  """Makes the directory if need be, and holds it against other runs.

  Raises:
    UserError: it cannot be written to, or another run is in it.
  """
  workdir = pathlib.Path(path).absolute()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    # A full or read-only disk should show now, not after the first thousand steps.
    probe = workdir / ".probe"
    probe.write_bytes(os.urandom(4096))
    probe.unlink()
    lock = open(workdir / ".lock", "w")
  except OSError as error:
    raise errors.UserError(
      f"cannot write to --workdir={workdir}: {error.strerror}. Choose another, or mend its "
      "permissions."
    ) from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise errors.UserError(
        f"another run is in --workdir={workdir}; wait for it, stop it, or choose another."
      ) from None
    yield workdir
