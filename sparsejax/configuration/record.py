"""What a run is, written down beside what it makes."""

from collections.abc import Sequence
import copy
import datetime
import hashlib
from importlib import metadata
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import ml_collections

from sparsejax import errors
from sparsejax.configuration import overrides

PACKAGES = (
  "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sparsejax",
)  # fmt: skip

# Keys that change what a resumed run would compute. The rest (logging, saving, meshes,
# reading) may differ from one start to the next.
DECISIVE = (
  "seed", "model", "attention", "ssa", "nsa", "infllmv2", "nosa", "loss", "data", "optimizer",
  "train",
)  # fmt: skip
INDIFFERENT = (
  "model.remat",
  "attention.kernels",
  "attention.full_implementation",
  "attention.sparse_implementation",
  "loss.chunk_length",
  "data.num_workers",
  "data.num_threads",
  "train.log_every",
  "train.eval_every",
  "train.eval_batches",
  "train.save_every",
  "train.keep_latest",
  "train.keep_every",
  "train.keep_best",
  "train.max_nonfinite_steps",
  "train.init_from",
  "train.sample_tokens",
  "train.peak_tflops",
  "train.tensorboard",
  "train.wandb_project",
  "train.watchdog_minutes",
)


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Every key by its dotted path, as JSON can hold it (tuples become lists)."""
  return json.loads(json.dumps(overrides.flatten(config)))


def digest(config: ml_collections.ConfigDict) -> str:
  """A short hash of all keys and values."""
  text = json.dumps(as_json(config), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(
  saved: dict[str, Any], current: ml_collections.ConfigDict
) -> dict[str, tuple[Any, Any]]:
  """Decisive keys whose value differs, each with `(saved, current)`."""
  new = as_json(current)
  return {
    key: (saved.get(key), new.get(key))
    for key in sorted({*saved, *new})
    if key.partition(".")[0] in DECISIVE
    and key not in INDIFFERENT
    and saved.get(key) != new.get(key)
  }


def check_same(
  saved: dict[str, Any],
  current: ml_collections.ConfigDict,
  allowed: tuple[str, ...],
  where: str,
) -> None:
  """Refuses to carry on with another configuration than a checkpoint was made with.

  Args:
    saved: as `as_json` gave it.
    current: of this run.
    allowed: keys, or sections, that may differ.
    where: names the checkpoint.

  Raises:
    CheckpointError: listing the keys that differ.
  """
  changed = {
    key: values
    for key, values in differences(saved, current).items()
    if not any(key == name or key.startswith(f"{name}.") for name in allowed)
  }
  if changed:
    lines = "\n".join(f"  {key}: {old!r} -> {new!r}" for key, (old, new) in changed.items())
    raise errors.CheckpointError(
      f"{where} was made with another configuration:\n{lines}\nUse another --workdir, or "
      f"carry on all the same with --allow_config_change={','.join(changed)}"
    )


def _program() -> str:
  """The program that runs; of one of this repository, where it is in that."""
  root = pathlib.Path(__file__).parents[2]
  path = pathlib.Path(sys.argv[0])
  return str(path.relative_to(root)) if path.is_relative_to(root) else sys.argv[0]


def environment() -> dict[str, Any]:
  """Versions, commit, devices, command and flags of this process."""
  devices = jax.devices()
  return dict(
    time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    command=[_program(), *sys.argv[1:]],
    commit=commit(),
    python=sys.version.partition(" ")[0],
    versions={name: _version(name) for name in PACKAGES},
    device=devices[0].device_kind,
    num_devices=len(devices),
    num_processes=jax.process_count(),
    xla_flags=os.environ.get("XLA_FLAGS", ""),
  )


def commit() -> str:
  """The source's commit, `-dirty` if it was changed since.

  The variable SPARSEJAX_COMMIT is believed before the repository: sources copied to another
  machine may have none, or another one's.
  """
  if "SPARSEJAX_COMMIT" in os.environ:
    return os.environ["SPARSEJAX_COMMIT"]
  root = str(pathlib.Path(__file__).parents[2])
  describe = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
  try:
    found = subprocess.run(
      ["git", "-C", root, *describe], capture_output=True, text=True, check=True
    )
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
  return found.stdout.strip()


def write(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, backends: Sequence[str]
) -> None:
  """Writes `config.json` and appends to `environment.jsonl` (one line per start).

  Args:
    config: of the run.
    workdir: where to.
    backends: what the operations of attention run on, in words.
  """
  content = dict(hash=digest(config), config=as_json(config))
  (workdir / "config.json").write_text(json.dumps(content, indent=2) + "\n")
  with open(workdir / "environment.jsonl", "a") as file:
    more = dict(backends=list(backends), config_hash=digest(config))
    file.write(json.dumps(environment() | more) + "\n")


def restore(
  flat: dict[str, Any], template: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
  """A config with the saved values of `as_json`, on the keys and types of `template`.

  Keys that the template has and the save has not keep the template's value.

  Raises:
    CheckpointError: a saved key that the template does not have.
  """
  config = copy.deepcopy(template)
  known = overrides.flatten(config)
  for key, value in flat.items():
    if key not in known:
      raise errors.CheckpointError(
        f"the checkpoint's configuration has a key {key!r} that this version does not know."
      )
    *sections, name = key.split(".")
    holder = config
    for section in sections:
      holder = holder[section]
    holder[name] = tuple(value) if isinstance(value, list) else value
  return config.lock()


def _version(package: str) -> str:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return "not installed"
