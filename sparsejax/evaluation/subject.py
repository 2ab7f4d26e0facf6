"""A checkpoint made ready for questions: its own config, its data, its parameters."""

from collections.abc import Sequence
import dataclasses
import pathlib

import jax
import ml_collections

import pallas_kernels
from sparsejax import checkpoint, errors, model, parameters, sharding
from sparsejax.configuration import build, record
from sparsejax.data import corpus as corpora


@dataclasses.dataclass(frozen=True)
class Subject:
  """What evaluations read.

  Attributes:
    path: of the checkpoint.
    step: steps it was trained for.
    config: its own, with this evaluation's changes.
    transformer: the model.
    backends: what its operations of attention run on, at every budget.
    params: on the mesh.
    corpus: the data, by default that of training.
    mesh: all devices side by side.
  """

  path: pathlib.Path
  step: int
  config: ml_collections.ConfigDict
  transformer: model.Transformer
  backends: list[pallas_kernels.Choice]
  params: dict
  corpus: corpora.Corpus
  mesh: jax.sharding.Mesh


def load(
  path: str | pathlib.Path,
  template: ml_collections.ConfigDict,
  *,
  step: int | None = None,
  sources: Sequence[str] = (),
  sequence_length: int | None = None,
  kernels: str | None = None,
  budgets: Sequence[int] = (),
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

  Raises:
    ConfigError: an operation cannot run on what is asked for, or a budget is too small.
    CheckpointError: no checkpoint, a damaged one, or data that are not its own.
    DataError: the data are missing or have another tokenizer.
  """
  found = checkpoint.find(path, step)
  saved = checkpoint.read_record(found)
  config = record.restore(saved.config, template)
  if sources:
    config.data.sources, config.data.weights = tuple(sources), ()
  if sequence_length is not None:
    config.data.sequence_length = sequence_length
  if kernels is not None:
    config.attention.update(
      kernels=kernels, full_implementation="auto", sparse_implementation="auto"
    )
  # WORKDIR/checkpoints/STEP: built-in data were prepared beside the checkpoints.
  corpus = build.make_corpus(config, found.parent.parent / "data")
  if corpus.tokenizer.fingerprint != saved.tokenizer:
    raise errors.DataError(
      f"{found} was trained with tokenizer {saved.tokenizer}, the data have "
      f"{corpus.tokenizer.fingerprint}; prepare the text with the checkpoint's tokenizer."
    )
  if not sources and sequence_length is None and corpus.fingerprint != saved.corpus:
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
    params=checkpoint.load_params(found, parameters.abstract(transformer, mesh)),
    corpus=corpus,
    mesh=mesh,
  )


def _choose_backends(config, models) -> list[pallas_kernels.Choice]:
  """Each choice once: a kernel may have room for the lists of some budgets alone."""
  choices = [choice for model in models for choice in build.choose_backends(config, model)]
  return list(dict.fromkeys(choices))
