"""A checkpoint made ready for questions: its own config, its data, its parameters."""

from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any

import jax
import ml_collections

import pallas_kernels
from sparsejax import checkpoint, errors, model, parameters, sharding
from sparsejax.configuration import build, checks, overrides, record
from sparsejax.data import corpus as corpora
from sparsejax.decoding import checks as numbers
from sparsejax.evaluation import extrapolation


@dataclasses.dataclass(frozen=True)
class Subject:
  """What evaluations read.

  Attributes:
    path: of the checkpoint.
    step: steps it was trained for.
    config: its own, with this evaluation's changes.
    transformer: the model.
    backends: what its operations of attention run on, at every budget.
    params: on the mesh; of `describe`, their shapes alone.
    corpus: the data, by default that of training.
    mesh: all devices side by side.
    changes: keys of its config that this evaluation changed, each with both values.
    fingerprint: of the parameters.
  """

  path: pathlib.Path
  step: int
  config: ml_collections.ConfigDict
  transformer: model.Transformer
  backends: list[pallas_kernels.Choice]
  params: dict
  corpus: corpora.Corpus
  mesh: jax.sharding.Mesh
  changes: dict[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
  fingerprint: str = ""

  @property
  def name(self) -> str:
    """Of the run: what its workdir is called."""
    return self.path.parent.parent.name


def load(
  path: str | pathlib.Path,
  template: ml_collections.ConfigDict,
  *,
  step: int | None = None,
  sources: Sequence[str] = (),
  sequence_length: int | None = None,
  kernels: str | None = None,
  budgets: Sequence[int] = (),
  rope_scaling: extrapolation.RopeScaling | None = None,
) -> Subject:
  """Restores a checkpoint from its own config.

  Args:
    path: a workdir, or one checkpoint.
    template: the config with every key, for those that an older checkpoint lacks.
    step: of a workdir; None is the newest.
    sources: data to evaluate on instead of the training data's validation split.
    sequence_length: tokens per row; None is that of training.
    kernels: `auto` or `strict` in place of the config's `attention.kernels` and of any
      implementation that it names; None is as trained.
    budgets: that will be asked about; () is that of training.
    rope_scaling: in place of the config's; None is as trained.

  Raises:
    ConfigError: an operation cannot run on what is asked for, a budget is too small, or a name
      or number makes no sense.
    CheckpointError: no checkpoint, a damaged one, one of another step, or data that are not
      its own.
    DataError: the data are missing or have another tokenizer.
  """
  return with_params(
    describe(
      path,
      template,
      step=step,
      sources=sources,
      sequence_length=sequence_length,
      kernels=kernels,
      budgets=budgets,
      rope_scaling=rope_scaling,
    )
  )


def with_params(subject: Subject) -> Subject:
  """What was described, with its parameters.

  Raises:
    CheckpointError: they are damaged.
  """
  return dataclasses.replace(
    subject, params=checkpoint.load_params(subject.path, subject.params)
  )


def describe(
  path: str | pathlib.Path,
  template: ml_collections.ConfigDict,
  *,
  step: int | None = None,
  sources: Sequence[str] = (),
  sequence_length: int | None = None,
  kernels: str | None = None,
  budgets: Sequence[int] = (),
  rope_scaling: extrapolation.RopeScaling | None = None,
  checks_data: bool = True,
) -> Subject:
  """What `load` gives, but that no parameters are read, and refuses but for damaged ones.

  Data that have changed since training are taken as they are where `checks_data` is not set:
  by what reads nothing of them but the tokenizer.
  """
  if kernels not in (None, *(names := checks.CHOICES["attention.kernels"])):
    raise errors.ConfigError(errors.one_of("--kernels", str(kernels), names))
  if sequence_length is not None:
    numbers.whole("--sequence_length", sequence_length, least=1)
  found = checkpoint.find(path, step)
  saved = checkpoint.read_record(found)
  config = record.restore(saved.config, template)
  trained = overrides.flatten(config)
  if sources:
    config.data.sources, config.data.weights = tuple(sources), ()
  if sequence_length is not None:
    config.data.sequence_length = sequence_length
  if kernels is not None:
    config.attention.update(
      kernels=kernels, full_implementation="auto", sparse_implementation="auto"
    )
  if rope_scaling is not None:
    extrapolation.apply(config, rope_scaling, trained["data.sequence_length"])
  # WORKDIR/checkpoints/STEP: built-in data were prepared beside the checkpoints.
  try:
    corpus = build.make_corpus(config, found.parent.parent / "data")
  except errors.DataError as error:
    if sources:
      raise
    raise errors.DataError(
      f"{error}\nThe checkpoint's tokenizer is with its data; where they lie elsewhere now, "
      "name them with --sources."
    ) from error
  if corpus.tokenizer.fingerprint != saved.tokenizer:
    raise errors.DataError(
      f"{found} was trained with tokenizer {saved.tokenizer}, the data have "
      f"{corpus.tokenizer.fingerprint}; prepare the text with the checkpoint's tokenizer."
    )
  is_own = not sources and sequence_length is None
  if checks_data and is_own and corpus.fingerprint != saved.corpus:
    raise errors.CheckpointError(
      f"the data of {found} have changed since training ({saved.corpus}, now "
      f"{corpus.fingerprint}); name them with --sources to evaluate on them as they are."
    )
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  transformer = build.make_model(config, max_documents=corpus.max_documents)
  models = [build.with_budget(transformer, budget) for budget in budgets] or [transformer]
  try:
    backends = _choose_backends(config, models)
  except errors.ConfigError as error:
    raise errors.ConfigError(
      f"{error}\nFor a checkpoint, --kernels=auto does so for this evaluation."
    ) from error
  return Subject(
    path=found,
    step=int(found.name),
    config=config,
    transformer=transformer,
    backends=backends,
    params=parameters.abstract(transformer, mesh),
    corpus=corpus,
    mesh=mesh,
    changes={
      key: (trained[key], value)
      for key, value in overrides.flatten(config).items()
      if trained[key] != value
    },
    fingerprint=checkpoint.fingerprint(found),
  )


def _choose_backends(config, models) -> list[pallas_kernels.Choice]:
  """Each choice once: a kernel may have room for the lists of some budgets alone."""
  choices = [choice for model in models for choice in build.choose_backends(config, model)]
  return list(dict.fromkeys(choices))
