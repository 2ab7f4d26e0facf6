"""Weights of another run to begin with, whatever its layers ran.

A sparse method continues a model that was trained with full attention; a pattern of methods
continues one of another pattern, whose layers are stacked otherwise.
"""

from collections.abc import Iterator
import pathlib
from typing import NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_collections

from sparsejax import checkpoint, errors
from sparsejax.configuration import record

type Path = tuple[str, ...]

_LAYERS = "layers"
# Sections of a config that say how weights are trained; all others say weights of what.
_TRAINING = ("seed", "loss", "data", "optimizer", "train")


class Beginning(NamedTuple):
  """What a run begins with.

  Attributes:
    params: the checkpoint's, and new ones where it has none.
    notes: lines on what is new, and on how the configuration differs from the checkpoint's.
  """

  params: dict
  notes: list[str]


def load(path: pathlib.Path, new: dict, config: ml_collections.ConfigDict) -> Beginning:
  """The parameters of a checkpoint, laid out for a model that may run other methods.

  Args:
    path: of the checkpoint (see `checkpoint.find`).
    new: freshly made parameters of the model; what the checkpoint lacks stays as it is here.
    config: of the run that begins.

  Raises:
    CheckpointError: parameters of other shapes, or that the model does not know, each named;
      or damaged files.
  """
  saved = _Stacks(traverse_util.flatten_dict(checkpoint.describe_params(path)))
  wanted = _Stacks(traverse_util.flatten_dict(new))
  wrong = list(_wrong(saved, wanted))
  if wrong:
    rest = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    raise errors.CheckpointError(
      f"{path} is of another model:\n" + "\n".join(wrong[:8]) + f"{rest}\ntrain.init_from "
      "begins with weights of the same sizes, all of which the model has; set the keys of "
      "model and attention to fit."
    )
  loaded = checkpoint.load_params(path, _abstract(saved, wanted))
  flat, lacking = _laid_out(saved, wanted, traverse_util.flatten_dict(loaded))
  notes = [f"train.init_from: {text}" for text in (*lacking, *_changes(path, config))]
  return Beginning(traverse_util.unflatten_dict(flat), [f"weights are those of {path}", *notes])


class _Stacks:
  """Parameters by their path, and which layer is where in them."""

  def __init__(self, flat: dict[Path, jax.Array | jax.ShapeDtypeStruct]):
    self.flat = flat
    self.places = {path[1] for path in flat if _is_placed(path)}
    self.period = max(1, len(self.places))

  @property
  def num_layers(self) -> int:
    sizes = {x.shape[0] for path, x in self.flat.items() if path[0] == _LAYERS}
    return max(sizes) * self.period

  def layers(self, path: Path) -> list[int | None]:
    """The layers whose parameters a stack holds, in its order; [None] for what is no stack."""
    if path[0] != _LAYERS:
      return [None]
    place = int(path[1]) if _is_placed(path) else 0
    return list(range(place, self.num_layers, self.period))

  def where(self, layer: int | None, name: Path) -> tuple[Path, int | None]:
    """The stack that a layer's parameter would be in, and its place there."""
    if layer is None:
      return name, None
    place = (str(layer % self.period),) if self.places else ()
    return (_LAYERS, *place, *name), layer // self.period


def _is_placed(path: Path) -> bool:
  return path[0] == _LAYERS and path[1].isdigit()


def _name(path: Path) -> Path:
  """Of a parameter within its layer, or of one outside of all."""
  if path[0] != _LAYERS:
    return path
  return path[2:] if _is_placed(path) else path[1:]


def _wrong(saved: _Stacks, wanted: _Stacks) -> Iterator[str]:
  """What stands in the way, a line for every stack."""
  if saved.num_layers != wanted.num_layers:
    yield f"  {saved.num_layers} layers saved, {wanted.num_layers} wanted"
    return
  for path, x in saved.flat.items():
    found = [wanted.where(layer, _name(path))[0] for layer in saved.layers(path)]
    unknown = [
      layer
      for layer, other in zip(saved.layers(path), found, strict=True)
      if other not in wanted.flat
    ]
    if unknown:
      yield f"  {'/'.join(path)}: {_form(x)} saved, unknown to {_of(unknown, saved, path)}"
      continue
    skipped = 0 if path[0] != _LAYERS else 1
    likes = [wanted.flat[other] for other in dict.fromkeys(found)]
    for like in likes:
      same = x.shape[skipped:] == like.shape[skipped:] and x.dtype == like.dtype
      if not same:
        yield f"  {'/'.join(path)}: {_form(x)} saved, {_form(like)} wanted"
        break


def _of(layers: list, stacks: _Stacks, path: Path) -> str:
  if layers == stacks.layers(path):
    return "this model"
  return f"this model's layers {', '.join(map(str, layers))}"


def _form(x) -> str:
  return f"{jnp.dtype(x.dtype).name}{list(x.shape)}"


def _abstract(saved: _Stacks, wanted: _Stacks) -> dict:
  """The checkpoint's own tree, divided over devices as the model's is."""
  flat = {}
  for path, x in saved.flat.items():
    like = wanted.flat[wanted.where(saved.layers(path)[0], _name(path))[0]]
    flat[path] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.sharding)
  return traverse_util.unflatten_dict(flat)


def _laid_out(saved: _Stacks, wanted: _Stacks, loaded: dict) -> tuple[dict, list[str]]:
  """The model's parameters, and a line for each that is new."""
  flat, lacking = {}, []
  for path, new in wanted.flat.items():
    layers = wanted.layers(path)
    sources = [saved.where(layer, _name(path)) for layer in layers]
    absent = [
      layer
      for layer, (source, _) in zip(layers, sources, strict=True)
      if source not in saved.flat
    ]
    if absent:
      where = "" if absent == layers else f" of layers {', '.join(map(str, absent))}"
      lacking.append(f"{'/'.join(path)}{where} is new, the checkpoint has none")
    if absent == layers:
      flat[path] = new
    elif sources[0] == (path, None) or (saved.period == wanted.period and not absent):
      flat[path] = loaded[path]
    else:
      flat[path] = _stack(new, sources, loaded)
  return flat, lacking


def _stack(new: jax.Array, sources: list[tuple[Path, int]], loaded: dict) -> jax.Array:
  """Slices of the checkpoint's stacks, and of `new` where there are none."""
  used = {path: loaded[path] for path, _ in sources if path in loaded}

  def stack(new, used):
    rows = [
      used[path][index] if path in used else new[i] for i, (path, index) in enumerate(sources)
    ]
    return jnp.stack(rows)

  return jax.jit(stack, out_shardings=new.sharding)(new, used)


def _changes(path: pathlib.Path, config: ml_collections.ConfigDict) -> Iterator[str]:
  """How what the weights are used for differs from what they were trained for."""
  saved = checkpoint.read_record(path).config
  for key, (old, now) in record.differences(saved, config).items():
    is_said = key.partition(".")[0] not in _TRAINING or key == "data.sequence_length"
    if is_said and key in saved:
      yield f"{key} was {old!r}, is {now!r}"
