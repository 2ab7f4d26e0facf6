"""Lists of blocks that a model chose, as the task `locality` leaves them, to be read again.

Letters: S steps, L layers, B rows, K key heads, M blocks listed.
"""

from collections.abc import Mapping, Sequence
import pathlib

import numpy as np

from sparsejax import attention, errors, model
from sparsejax.attention import block_sparse


def folders(text: str, methods: Sequence[str]) -> dict[str, pathlib.Path]:
  """By method, where its recordings are: `METHOD=FOLDER,...`, as `--lists` has it.

  Args:
    text: that.
    methods: those that are decoded.

  Raises:
    ConfigError: a method that there is not, is not decoded, or is named twice.
    DataError: no such directory.
  """
  found = {}
  for part in filter(None, text.split(",")):
    name, _, path = part.partition("=")
    if name not in attention.METHODS:
      raise errors.ConfigError(errors.one_of("method in --lists", name, attention.METHODS))
    if name not in methods:
      raise errors.ConfigError(
        f"--lists={part} is of a method that is not decoded; add {name} to --methods="
        f"{','.join(methods)}, or leave its lists out."
      )
    if name in found:
      raise errors.ConfigError(f"--lists={text} names {name} twice; name each once.")
    if not path or not pathlib.Path(path).is_dir():
      raise errors.DataError(f"--lists={part} names no directory with CONTEXT.npy in it.")
    found[name] = pathlib.Path(path)
  return found


def read(
  folder: pathlib.Path, transformer: model.Transformer, lengths: Mapping[int, int]
) -> dict[int, np.ndarray]:
  """What a model listed behind each context, [S, L, B, K, M] of any S, L and B.

  Args:
    folder: of recordings, a file for each context.
    transformer: that is to read them.
    lengths: by context, the tokens that a row has room for.

  Raises:
    ConfigError: lists that the model would not read.
    DataError: a recording that is missing, damaged, or of another shape.
  """
  options = transformer.options
  # What `decode_timing` puts recordings in place of.
  makers = [key for key in attention.SPARSE_METHODS if _lists(attention.METHODS[key])]
  if options.home_stream != "sparse" or not _lists(attention.sparse_method(options)):
    raise errors.ConfigError(
      f"--lists={options.method}={folder} cannot be replayed: {options.method} takes no lists "
      f"as {', '.join(makers)} do. Leave it out."
    )
  return {
    context: _read(folder / f"{context}.npy", context, transformer, length)
    for context, length in lengths.items()
  }


def _lists(kind: type) -> bool:
  return issubclass(kind, block_sparse.BlockSparse)


def _read(
  file: pathlib.Path, context: int, transformer: model.Transformer, length: int
) -> np.ndarray:
  options = transformer.options
  if block_sparse.lists_everything(options, length):
    raise errors.ConfigError(
      f"--contexts={context} makes rows of {length} tokens, which a budget of "
      f"{options.budget} keys reads whole: no list is replayed. Take a longer context, or "
      "leave --lists out."
    )
  # The first token to be decoded is one more.
  if context + 1 < (dense := attention.dense_length(options)):
    raise errors.ConfigError(
      f"--contexts={context} is read whole, as are all rows of fewer than {dense} tokens: no "
      "list is replayed. Take a longer context, or leave --lists out."
    )
  if not file.exists():
    raise errors.DataError(f"{file} is missing; record lists at a context of {context}.")
  try:
    lists = np.load(file)
  except (OSError, ValueError, EOFError) as error:
    raise errors.DataError(f"{file} cannot be read: {error}. Record it again.") from error
  wanted = transformer.shape.num_key_value_heads, options.num_listed(length)
  if lists.ndim != 5 or lists.dtype.kind not in "iu" or lists.shape[-2:] != wanted:
    raise errors.DataError(
      f"{file} has {lists.dtype.name}{list(lists.shape)}; this shape takes whole numbers "
      f"[steps, layers, rows, {wanted[0]} key heads, {wanted[1]} blocks]. Record them with a "
      "model of as many."
    )
  return lists
