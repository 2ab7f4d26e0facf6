"""The built-in corpus: the source files of Python's own standard library.

Real text that every machine with Python has: tens of megabytes, no download, split by file
into train and validation.
"""

import os
import pathlib
import sysconfig

from sparsejax import errors
from sparsejax.data import documents, prepare, shards

SETTINGS = prepare.Settings(
  validation_fraction=0.02,
  # A few test files of the library are broken on purpose.
  reading=documents.Options(on_bad_utf8="skip"),
)


def prepare_stdlib(out: str | pathlib.Path) -> shards.Manifest:
  """Writes the byte-tokenized corpus to `out`, unless it is there, and returns its manifest.

  Raises:
    DataError: this Python was installed without its sources.
  """
  folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
  inputs = [
    str(path)
    for path in sorted(folder.iterdir())
    if (path.suffix == ".py" or path.is_dir())
    # Installed packages differ from machine to machine and are not ours to read.
    and path.name not in ("site-packages", "dist-packages", "__pycache__")
    and not path.name.startswith((".", "config-", "lib-dynload"))
  ]
  inputs = [name for name in inputs if os.path.isfile(name) or _has_source(name)]
  # Distributions keep old names of a file as links to it.
  inputs = list({os.path.realpath(name): name for name in reversed(inputs)}.values())[::-1]
  if not inputs:
    raise errors.DataError(
      f"{folder} holds no .py files; prepare a corpus of your own with python -m "
      "sparsejax.data.prepare and name it in data.sources."
    )
  return prepare.prepare(inputs, out, SETTINGS, extensions=(".py",))


def _has_source(folder: str) -> bool:
  return next(pathlib.Path(folder).rglob("*.py"), None) is not None
