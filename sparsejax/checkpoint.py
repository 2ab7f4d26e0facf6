"""Checkpoints: state, position in the data and configuration, in one atomic step.

The only file that knows Orbax. A checkpoint is `DIRECTORY/STEP`; beside the arrays it holds
a record (JSON): the position, the fingerprint of the corpus, the configuration, and a
checksum of every array. Orbax notices truncated files but not flipped bits, so checksums
are computed on the devices when saving and compared after loading.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from sparsejax import cost, errors

SCHEMA = 1
_STATE = "state"
_MAX_FAILED_SAVES = 3


@dataclasses.dataclass(frozen=True)
class Record:
  """What a checkpoint knows besides the arrays.

  Attributes:
    next_row: position in the global order of training rows.
    corpus: fingerprint of the data.
    config: every key, as `configuration.record.as_json` gives them.
    tokenizer: fingerprint.
  """

  next_row: int
  corpus: str
  config: dict[str, Any]
  tokenizer: str


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint that was read and found whole.

  Attributes:
    step: of the state.
    state: the tree that was saved, where the abstract one wanted it.
    record: what went with it.
  """

  step: int
  state: Any
  record: Record


class Checkpoints:
  """The checkpoints of one run."""

  def __init__(
    self,
    directory: str | pathlib.Path,
    *,
    keep_latest: int,
    keep_every: int,
    keep_best: int,
  ):
    """Opens, or makes, the directory and removes what an interrupted save left.

    Args:
      directory: of the steps.
      keep_latest: newest checkpoints kept.
      keep_every: also keep steps divisible by this; 0 keeps none.
      keep_best: also keep so many with the lowest validation loss.
    """
    self.directory = pathlib.Path(directory).absolute()
    self._num_kept = keep_latest + keep_best
    policies = ocp.training.preservation_policies
    kept = [policies.LatestN(keep_latest)]
    if keep_every:
      kept.append(policies.EveryNSteps(keep_every))
    if keep_best:
      kept.append(
        policies.BestN(
          get_metric_fn=lambda metrics: metrics["validation_loss"],
          reverse=True,  # the list ends with the best: lowest loss last
          n=keep_best,
          keep_checkpoints_without_metrics=False,
        )
      )
    self._open = functools.partial(
      ocp.training.Checkpointer,
      self.directory,
      # The loop decides when to save.
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      preservation_policy=policies.AnyPreservationPolicy(kept),
      cleanup_tmp_directories=True,
    )
    self._checkpointer = self._open()
    self._pending = None
    self._failures = 0

  @property
  def steps(self) -> list[int]:
    """Steps of the checkpoints there are, ascending."""
    return [info.step for info in self._checkpointer.checkpoints]

  @property
  def has_failed(self) -> bool:
    """Whether the last save failed, and none has succeeded since."""
    return self._failures > 0

  def save(
    self,
    state: Any,
    record: Record,
    *,
    validation_loss: float | None = None,
    wait: bool = False,
  ) -> None:
    """Starts to save a state under its step; returns while the files are being written.

    A save that fails (a full disk) is logged and leaves earlier checkpoints as they are;
    training goes on, and `has_failed` asks for another try.

    Args:
      state: a tree of arrays with an integer attribute `step`, not saved yet.
      record: what goes with it.
      validation_loss: ranks it among the best; None keeps it out of the ranking.
      wait: whether to return only when the files are there.

    Raises:
      CheckpointError: too many saves in a row failed.
    """
    self.poll(wait=True)
    step = int(jax.device_get(state.step))
    content = dict(schema=SCHEMA, checksums=checksums(state), **dataclasses.asdict(record))
    try:
      self._check_space(state)
      self._pending = self._checkpointer.save_checkpointables_async(
        step,
        {_STATE: state},
        metrics=None if validation_loss is None else {"validation_loss": validation_loss},
        custom_metadata=content,
      )
    except Exception as error:  # from the disk itself, or wrapped by Orbax
      self._count_failure(error)
    self.poll(wait=wait)

  def poll(self, *, wait: bool = False) -> None:
    """Notices that the save under way has ended, well or badly. Cheap; call it every step.

    Raises:
      CheckpointError: too many saves in a row failed.
    """
    if self._pending is None or not (wait or not self._checkpointer.is_saving_in_progress()):
      return
    pending, self._pending = self._pending, None
    try:
      pending.result()
      self._failures = 0
    except Exception as error:  # whatever the writing threads met
      self._count_failure(error)

  def restore(self, abstract: Any) -> Restored | None:
    """The newest checkpoint that is whole; None if there is none at all.

    Damaged ones are passed over; `set_aside_newer_than` gets them out of the way.

    Args:
      abstract: shapes, dtypes and shardings of the state.

    Raises:
      CheckpointError: the checkpoint is of another model, or all are damaged.
    """
    damaged = {}
    for step in reversed(self.steps):
      try:
        return self._load(step, abstract)
      except errors.CheckpointError:
        # Another model or schema: the user must know, not fall back.
        raise
      except Exception as error:  # unreadable in one of many ways
        damaged[step] = _cause(error)
        logging.error("checkpoint %s is damaged: %s", self.directory / str(step), damaged[step])
    if damaged:
      why = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
      raise errors.CheckpointError(
        f"no checkpoint in {self.directory} can be read ({why}). Delete the directory to start "
        "anew, or put a good copy in its place."
      )
    return None

  def set_aside_newer_than(self, step: int) -> None:
    """Renames checkpoints after `step`, which were found damaged, to `STEP.corrupt`."""
    for newer in [s for s in self.steps if s > step]:
      path = self.directory / str(newer)
      target = path.with_name(f"{newer}.corrupt")
      if target.exists():
        shutil.rmtree(target)
      path.rename(target)
    self._checkpointer.reload()

  def close(self) -> None:
    """Waits for the save under way.

    Raises:
      CheckpointError: it failed, like too many before it.
    """
    try:
      self.poll(wait=True)
    finally:
      self._checkpointer.close()

  def _load(self, step: int, abstract: Any) -> Restored:
    path = self.directory / str(step)
    record, sums = _read_record(path)
    _check_structure(path, abstract)
    state = ocp.load_checkpointables(path, {_STATE: abstract})[_STATE]
    _check_sums(sums, checksums(state))
    return Restored(step, state, record)

  def _check_space(self, state) -> None:
    needed, free = cost.num_bytes(state), shutil.disk_usage(self.directory).free
    if free < needed:
      raise OSError(f"{needed / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free")

  def _count_failure(self, error: BaseException) -> None:
    self._failures += 1
    # Orbax raises a failed save's error again at every later call, and has forgotten the
    # steps that this one would have replaced.
    with contextlib.suppress(Exception):
      self._checkpointer.close()
    self._checkpointer = self._open()
    message = f"saving to {self.directory} failed: {_cause(error)}"
    if self._failures >= _MAX_FAILED_SAVES:
      raise errors.CheckpointError(
        f"{message}. {self._failures} saves in a row have failed; make room and start again: "
        "the run carries on from its last checkpoint."
      ) from error
    logging.error("%s; training goes on and tries again", message)


def check_space(directory: pathlib.Path, abstract, num_kept: int) -> None:
  """Refuses a run whose checkpoints cannot fit on the disk.

  Raises:
    CheckpointError: less room than for the kept ones and one being written.
  """
  needed = cost.num_bytes(abstract) * (num_kept + 1)
  free = shutil.disk_usage(directory).free
  if free < needed:
    raise errors.CheckpointError(
      f"{num_kept + 1} checkpoints take {needed / 2**30:.2f} GiB; {directory} has "
      f"{free / 2**30:.2f} GiB free. Make room, or lower train.keep_latest and train.keep_best."
    )


def is_one(path: str | pathlib.Path) -> bool:
  """Whether a path is of a single checkpoint, not of a directory of several."""
  return (pathlib.Path(path) / _STATE).is_dir()


def find(path: str | pathlib.Path, step: int | None = None) -> pathlib.Path:
  """The checkpoint meant by a workdir, a directory of checkpoints or a checkpoint.

  Args:
    path: any of the three.
    step: of a directory of several; None is the newest.

  Raises:
    CheckpointError: there is none, or the one that is meant is of another step.
  """
  # Without the ".." that a run would be named by.
  path = pathlib.Path(os.path.abspath(path))
  if is_one(path):
    if step is not None and path.name != str(step):
      raise errors.CheckpointError(
        f"{path} is one checkpoint, and {step=} asks for another; name its workdir, or leave "
        "the step out."
      )
    return path
  holder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
  names = [p.name for p in holder.iterdir()] if holder.is_dir() else []
  steps = sorted(int(name) for name in names if name.isdigit())
  if not steps:
    raise errors.CheckpointError(
      f"{path} holds no checkpoint; give a --workdir that train.py has written to."
    )
  if step is not None and step not in steps:
    raise errors.CheckpointError(f"{holder} has no step {step!r}; it has {steps}.")
  return holder / str(steps[-1] if step is None else step)


def read_record(path: pathlib.Path) -> Record:
  """The record of a checkpoint.

  Raises:
    CheckpointError: it is damaged, or of another version.
  """
  try:
    return _read_record(path)[0]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise errors.CheckpointError(f"the record of {path} is damaged: {error}") from error


def try_record(path: pathlib.Path) -> Record | None:
  """The record of a checkpoint, or None where it is damaged."""
  try:
    return read_record(path)
  except errors.CheckpointError:
    return None


def describe_params(path: pathlib.Path) -> dict:
  """Shapes and dtypes of a checkpoint's parameters, a tree of `jax.ShapeDtypeStruct`.

  Raises:
    CheckpointError: damaged files.
  """
  try:
    leaves = jax.tree_util.tree_leaves_with_path(
      ocp.checkpointables_metadata(path).metadata[_STATE]
    )
  except Exception as error:  # unreadable in one of many ways
    raise errors.CheckpointError(f"{path} is damaged: {_cause(error)}") from error
  tree: dict = {}
  for key_path, leaf in leaves:
    section, *names = _path_name(key_path).split("/")
    if section == "params":
      holder = tree
      for inner in names[:-1]:
        holder = holder.setdefault(inner, {})
      holder[names[-1]] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
  if not tree:  # all that Orbax says of a description that it cannot read
    raise errors.CheckpointError(f"{path} is damaged: it describes no parameters")
  return tree


def load_params(path: pathlib.Path, abstract_params) -> dict:
  """The parameters of a checkpoint, without optimizer or step.

  Args:
    path: of the checkpoint (see `find`).
    abstract_params: shapes, dtypes and shardings wanted.

  Raises:
    CheckpointError: other shapes or names, or damaged files.
  """
  record_sums = _record_sums(path)
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  try:
    _check_structure(path, abstract_params, prefix=("params",))
    with context:
      loaded = ocp.load_checkpointables(path, {_STATE: {"params": abstract_params}})
    params = loaded[_STATE]["params"]
    _check_sums(record_sums, {f"params/{k}": v for k, v in checksums(params).items()})
  except errors.CheckpointError:
    raise
  except Exception as error:  # unreadable in one of many ways
    raise errors.CheckpointError(f"{path} is damaged: {_cause(error)}") from error
  return params


def fingerprint(path: pathlib.Path) -> str:
  """A short hash of a checkpoint's parameters, from its record: no array is read.

  Raises:
    CheckpointError: the record is damaged.
  """
  sums = {k: v for k, v in _record_sums(path).items() if k.startswith("params/")}
  return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:12]


def checksums(tree) -> dict[str, int]:
  """A 32-bit sum of every array by its path: exact, and equal however it is divided.

  Each element's bits are weighted by an odd number that depends on its place, so a flipped
  bit or a swap shows. It guards against accidents, not against an adversary.
  """
  sums = jax.device_get(_sums(tree))
  leaves = jax.tree_util.tree_leaves_with_path(sums)
  return {_path_name(path): int(value) for path, value in leaves}


@jax.jit
def _sums(tree):
  def one(x):
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
    weight = jnp.ones((), jnp.uint32)
    for axis in range(x.ndim):
      place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
      weight = weight * jnp.uint32(2654435761) + place * jnp.uint32(2246822519)
    return (bits * (2 * weight + 1)).sum(dtype=jnp.uint32)

  return jax.tree.map(one, tree)


def _path_name(path) -> str:
  return "/".join(
    str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path
  )


def _read_record(path: pathlib.Path) -> tuple[Record, dict[str, int]]:
  content = json.loads((path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
  if content["schema"] != SCHEMA:
    raise errors.CheckpointError(
      f"{path} has schema {content['schema']}; this version reads {SCHEMA}."
    )
  fields = {field.name: content[field.name] for field in dataclasses.fields(Record)}
  return Record(**fields), content["checksums"]


def _record_sums(path: pathlib.Path) -> dict[str, int]:
  try:
    return _read_record(path)[1]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise errors.CheckpointError(f"the record of {path} is damaged: {error}") from error


def _check_structure(path: pathlib.Path, abstract, prefix: tuple[str, ...] = ()) -> None:
  """Compares names, shapes and dtypes before any array is read: Orbax casts in silence."""
  saved = _describe(ocp.checkpointables_metadata(path).metadata[_STATE])
  if not saved:  # all that Orbax says of a description or data file that it cannot read
    raise ValueError("the description of its arrays cannot be read")
  wanted = {"/".join((*prefix, name)): what for name, what in _describe(abstract).items()}
  if prefix:
    saved = {name: what for name, what in saved.items() if name.startswith("/".join(prefix))}
  wrong = [
    f"  {name}: {saved.get(name, 'absent')} saved, {wanted.get(name, 'absent')} wanted"
    for name in sorted({*saved, *wanted})
    if saved.get(name) != wanted.get(name)
  ]
  if wrong:
    rest = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    lines = "\n".join(wrong[:8])
    raise errors.CheckpointError(f"{path} is of another model:\n{lines}{rest}")


def _describe(tree) -> dict[str, str]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    _path_name(path): f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}" for path, leaf in leaves
  }


def _check_sums(saved: dict[str, int], found: dict[str, int]) -> None:
  wrong = [name for name, value in found.items() if saved.get(name) != value]
  if wrong:
    raise ValueError(f"checksum of {', '.join(wrong[:4])} differs")


def _cause(error: BaseException) -> str:
  """The error that Orbax wrapped, in one line."""
  while error.__cause__ or error.__context__:
    error = error.__cause__ or error.__context__
  return f"{type(error).__name__}: {error}".partition("\n")[0]
