"""Where numbers go: metrics.jsonl, TensorBoard and, if asked, Weights & Biases."""

from collections.abc import Mapping
import json
import os
import pathlib
import time
from typing import Protocol

import tensorboardX

from sparsejax import errors


class Writer(Protocol):
  """Something that takes numbers by name at a step."""

  def write(self, step: int, values: Mapping[str, float]) -> None: ...

  def close(self) -> None: ...


class JsonLines:
  """One JSON object per call, appended; survives crashes and resumed runs."""

  def __init__(self, path: pathlib.Path, first_step: int):
    """Opens the file, dropping what lies after `first_step`.

    A resumed run takes those steps again. A line that a crash cut short goes too.
    """
    kept = []
    if path.is_file():
      for line in path.read_text().splitlines():
        try:
          if json.loads(line)["step"] <= first_step:
            kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
          continue
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("".join(kept))
    os.replace(unfinished, path)
    self._file = open(path, "a")

  def write(self, step: int, values: Mapping[str, float]) -> None:
    line = dict(step=step, time=round(time.time(), 3), **values)
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()

  def close(self) -> None:
    self._file.close()


class TensorBoard:
  """Scalars in TensorBoard's event files."""

  def __init__(self, directory: pathlib.Path, first_step: int):
    self._writer = tensorboardX.SummaryWriter(
      str(directory), purge_step=first_step + 1 if first_step else None
    )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    self._writer.close()


class WeightsAndBiases:
  """A Weights & Biases run; the package is an extra."""

  def __init__(self, project: str, directory: pathlib.Path, config: Mapping):
    try:
      import wandb
    except ImportError:
      raise errors.ConfigError(
        f"train.wandb_project={project!r} needs the package wandb; "
        f"{errors.install('wandb')}, or set it to none."
      ) from None
    self._run = wandb.init(
      project=project,
      dir=str(directory),
      config=dict(config),
      # The same directory is the same run, however often it is resumed.
      id=directory.name,
      resume="allow",
    )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log(dict(values), step=step)

  def close(self) -> None:
    self._run.finish()


class Writers:
  """Several writers as one."""

  def __init__(self, writers: list[Writer]):
    self._writers = writers

  def write(self, step: int, values: Mapping[str, float]) -> None:
    for writer in self._writers:
      writer.write(step, values)

  def close(self) -> None:
    for writer in self._writers:
      writer.close()
