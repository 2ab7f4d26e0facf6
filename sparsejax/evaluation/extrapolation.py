"""Contexts longer than those of training: another RoPE scaling, and how far each reaches."""

from collections.abc import Sequence
import dataclasses
import math

import ml_collections

from sparsejax import errors
from sparsejax.configuration import checks

_TYPES = checks.CHOICES["model.rope_scaling.rope_type"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """What takes the place of a checkpoint's `model.rope_scaling`, whose names these are.

  Attributes:
    rope_type: how frequencies are stretched; `default` leaves them alone.
    factor: how much longer contexts become; None is what the checkpoint's config says.
    low_freq_factor, high_freq_factor: None is what the checkpoint's config says.
    original_max_position_embeddings: None is the length of the rows of training where those
      had no scaling, and else what the checkpoint's config says.
  """

  rope_type: str
  factor: float | None = None
  low_freq_factor: float | None = None
  high_freq_factor: float | None = None
  original_max_position_embeddings: int | None = None

  def __post_init__(self):
    if self.rope_type not in _TYPES:
      raise errors.ConfigError(errors.one_of("--rope_scaling", self.rope_type, _TYPES))
    given = {key: value for key, value in self.given.items() if key != "rope_type"}
    if self.rope_type == "default" and given:
      raise errors.ConfigError(
        f"--rope_scaling=default stretches nothing and has no {', '.join(given)}; take llama3."
      )

  @property
  def given(self) -> dict[str, str | float]:
    """What is not None."""
    return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


def parse(words: Sequence[str]) -> RopeScaling | None:
  """`["llama3", "factor=4"]` as a scaling; None of no words.

  Raises:
    ConfigError: an unknown type or name, or a value that is no number; `apply` refuses
      numbers that make no sense.
  """
  if not words:
    return None
  words = [word.strip() for word in words]
  kinds = {field.name: field.type for field in dataclasses.fields(RopeScaling)}
  del kinds["rope_type"]
  values = {}
  for word in words[1:]:
    key, _, text = word.partition("=")
    if key not in kinds:
      raise errors.ConfigError(errors.one_of("value of --rope_scaling", key, kinds))
    if key in values:
      raise errors.ConfigError(f"--rope_scaling={','.join(words)} has {key} twice; give one.")
    number = int if "int" in str(kinds[key]) else float
    try:
      values[key] = number(text)
    except ValueError:
      raise errors.ConfigError(
        f"--rope_scaling: {word} takes {'a whole' if number is int else 'a'} number."
      ) from None
  return RopeScaling(rope_type=words[0], **values)


def apply(config: ml_collections.ConfigDict, scaling: RopeScaling, trained_length: int) -> None:
  """Puts a scaling into a config.

  Args:
    config: of a checkpoint; changed.
    scaling: to put there.
    trained_length: tokens of a row of training.

  Raises:
    ConfigError: what comes out contradicts itself.
  """
  own = config.model.rope_scaling
  values = scaling.given
  if own.rope_type == "default" and scaling.rope_type != "default":
    # Without scaling the config's number was never read.
    values = {"original_max_position_embeddings": trained_length} | values
  own.update(values)
  if problems := list(checks.rope_scaling(own)):
    raise errors.ConfigError("\n".join(f"--rope_scaling: {problem}" for problem in problems))


def reach(config: ml_collections.ConfigDict, trained_length: int) -> int:
  """Positions that a model has been trained on, or that its RoPE is stretched to."""
  scaling = config.model.rope_scaling
  if scaling.rope_type == "default":
    return trained_length
  stretched = int(scaling.factor * scaling.original_max_position_embeddings)
  return max(trained_length, stretched)


def check(
  config: ml_collections.ConfigDict,
  trained_length: int,
  lengths: Sequence[int],
  scaling: RopeScaling | None,
) -> None:
  """Refuses lengths beyond what RoPE is made for.

  Args:
    config: of the evaluation.
    trained_length: tokens of a row of training.
    lengths: tokens of what will be read.
    scaling: that was asked for; one of type `default` says that lengths are meant.

  Raises:
    ConfigError: a length beyond the reach of RoPE.
  """
  if scaling is not None and scaling.rope_type == "default":
    return
  longest, most = max(lengths, default=0), reach(config, trained_length)
  if longest > most:
    own = config.model.rope_scaling
    original = own.original_max_position_embeddings
    if own.rope_type == "default":
      original = trained_length
    factor = math.ceil(longest / original)
    raise errors.ConfigError(
      f"a length of {longest} tokens is beyond the {most} that this checkpoint's RoPE is made "
      f"for; take shorter ones, --rope_scaling=llama3,factor={factor} to stretch it, or "
      "--rope_scaling=default to leave it alone all the same."
    )
