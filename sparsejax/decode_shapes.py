r"""How fast models of a shape decode, without a checkpoint: weights and caches are random.

  python -m sparsejax.decode_shapes --config=configs/nosa_8b.py \
    --methods=full,infllmv2,nosa --contexts=16384,65536 --kv_gib=4 --spare=16 \
    --lists=nosa=runs/a/eval/200/lists --out=results/decoding

Every method decodes as many rows as have caches of `--kv_gib` on the device, or `--rows`.
Sparse methods have the rest of their pages in the host's memory. Random weights choose random
blocks, which no trained model does: `--lists` replays what one chose (the task `locality` of
eval.py records it), while choosing is computed as well.
"""

import argparse
import dataclasses
import gc
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sparsejax import attention, command_line, errors, model, parameters, sharding
from sparsejax.attention import backends, past
from sparsejax.configuration import build, checks, overrides, record
from sparsejax.decoding import cache as caches
from sparsejax.decoding import pinned
from sparsejax.evaluation import decode_timing, markdown, pictures, recordings, throughput

# Flags that set keys of the config, for each method anew.
OWN_FLAGS = {"attention.method": "methods", "attention.kernels": "kernels"}

# Bytes are counted in 64 bits.
MOST_GIB = 2**33


def random_params(transformer: model.Transformer, mesh: jax.sharding.Mesh, seed: int) -> dict:
  """Parameters as `caches.cast` would leave them, without ever being anything larger."""
  abstract = parameters.abstract(transformer, mesh)
  leaves, tree = jax.tree.flatten_with_path(abstract)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  dtype, scale = transformer.shape.dtype, transformer.shape.initializer_range

  def make(path, x, key):
    if path[-1].key == "scale":
      return jax.jit(lambda: jnp.ones(x.shape, x.dtype), out_shardings=x.sharding)()
    draw = jax.jit(
      lambda key: scale * jax.random.normal(key, x.shape, dtype), out_shardings=x.sharding
    )
    return draw(key)

  made = [make(path, x, key) for (path, x), key in zip(leaves, keys, strict=True)]
  return jax.tree.unflatten(tree, made)


def random_cache(spec: past.Cache, context: int, seed: int) -> past.Cache:
  """A cache of rows with so many tokens: random on the device, zeros on the host."""
  cache = caches.make(spec)
  arrays = []
  for number, own in enumerate(cache.arrays):
    key = jax.random.fold_in(jax.random.key(seed), number)
    filled = dict(own)
    for place, (name, x) in enumerate(sorted(own.items())):
      is_float = jnp.issubdtype(x.dtype, jnp.floating)
      if is_float and x.sharding.memory_kind != "pinned_host":
        filled[name] = _randomize(x, jax.random.fold_in(key, place))
    arrays.append(filled)
  lengths_B = jnp.full_like(cache.lengths_B, context)
  return cache.replace(lengths_B=lengths_B, arrays=tuple(arrays))


@jax.jit(donate_argnums=0)
def _randomize(x, key):
  return jax.random.normal(key, x.shape, x.dtype)


def run(asked: argparse.Namespace, changes: list[str]) -> int:
  """Does what was asked; returns the exit status.

  Args:
    asked: the flags of `main`.
    changes: `--config.a.b=value`, for the configs of all methods.

  Raises:
    UserError: and its kinds; before anything is measured, but for what does not fit in memory
      or cannot run on the device.
  """
  methods, contexts = _methods(asked.methods), _numbers("contexts", asked.contexts)
  _check_flags(asked)
  _check_changes(asked, changes)
  folders = recordings.folders(asked.lists, methods)
  configs = {name: _config(asked, name, changes) for name in methods}
  models = {name: build.make_model(own, max_documents=1) for name, own in configs.items()}
  lengths = {context: _length(asked, context) for context in contexts}
  lists = {
    name: recordings.read(folder, models[name], lengths) for name, folder in folders.items()
  }
  out = None if asked.out is None else _make_folder(asked.out, asked.name)
  cells, seen = [], {}
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  for name, transformer in models.items():
    params = random_params(transformer, mesh, configs[name].seed)
    for context in contexts:
      lists_SLBKM = lists.get(name, {}).get(context)
      cell, choices = _measure(asked, transformer, params, mesh, context, lists_SLBKM)
      cells.append(cell)
      for choice in choices:
        if str(choice) not in seen:
          seen[str(choice)] = choice
          _say(f"backend of {choice}")
      _say_cell(cell)
    del params
    gc.collect()
  _say(f"\n{markdown.align(decode_timing.rows(cells))}")
  if out is not None:
    about = dict(
      environment=record.environment(),
      backends=list(seen),
      weights="random",
      lists={name: "recorded" if name in lists else "chosen" for name in methods},
      configs={name: record.as_json(config) for name, config in configs.items()},
    )
    _write(out, asked.name, about, cells)
  return 0


def _say(text: str) -> None:
  sys.stdout.write(text + "\n")
  sys.stdout.flush()


def _say_cell(cell: decode_timing.Cell) -> None:
  _say(markdown.align(decode_timing.rows([cell])).splitlines()[-1])
  for kernel in cell.kernels[:30]:
    _say(f"  {kernel.microseconds:9.1f} us {kernel.calls:6.1f} x {kernel.name[:90]}")
  if cell.fetch_rate is not None:
    _say(f"  pages came at {cell.fetch_rate / 1e9:.1f} GB/s")


def _methods(text: str) -> list[str]:
  """The names in --methods."""
  names = text.split(",")
  for place, name in enumerate(names):
    if name not in attention.METHODS:
      raise errors.ConfigError(errors.one_of("method in --methods", name, attention.METHODS))
    if name in names[:place]:
      raise errors.ConfigError(f"--methods={text} names {name} twice; name each once.")
  return names


def _numbers(name: str, text: str) -> list[int]:
  wrong = [part for part in text.split(",") if not part.isdecimal() or int(part) < 1]
  if wrong:
    raise errors.ConfigError(f"--{name} takes whole numbers from 1 up; {wrong[0]!r} is none.")
  return [int(part) for part in text.split(",")]


def _check_flags(asked: argparse.Namespace) -> None:
  """Refuses numbers out of range, and paths and names that are none."""
  if (asked.kv_gib is None) == (asked.rows is None):
    raise errors.ConfigError("give either --kv_gib or --rows: how many rows are decoded.")
  for name, least in dict(rows=1, steps=1, spare=0, trace=0).items():
    value = getattr(asked, name)
    if value is not None and value < least:
      raise errors.ConfigError(f"--{name}={value} must be at least {least}.")
  # So written that nan is refused.
  if asked.kv_gib is not None and not 0 < asked.kv_gib < MOST_GIB:
    raise errors.ConfigError(f"--kv_gib={asked.kv_gib} must be above 0, and below {MOST_GIB}.")
  # No path is the working directory to pathlib.
  if asked.out == "":
    raise errors.ConfigError("--out has an empty path; name a directory, or leave it out.")
  if not asked.name or pathlib.PurePath(asked.name).name != asked.name:
    raise errors.ConfigError(
      f"--name={asked.name} cannot begin the names of files; take a word without a /, and name "
      "their directory by --out."
    )


def _check_changes(asked: argparse.Namespace, changes: list[str]) -> None:
  """Refuses changes of what a flag sets, which they would undo for every method."""
  for change in changes:
    key = change.partition("=")[0]
    key = key.removeprefix(overrides.PREFIX).removeprefix(overrides.NEGATED_PREFIX)
    if (flag := OWN_FLAGS.get(key)) is not None:
      raise errors.ConfigError(
        f"{change} would undo --{flag}={getattr(asked, flag)}; set --{flag} in its place."
      )


def _config(
  asked: argparse.Namespace, name: str, changes: list[str]
) -> ml_collections.ConfigDict:
  """The config of a method, checked."""
  own = dict(method=name, kernels=asked.kernels)
  more = [f"{overrides.PREFIX}attention.{key}={value}" for key, value in own.items()]
  config = overrides.load(asked.config, [*more, *changes])
  checks.check(config)
  layers = config.attention.layer_methods
  if layers and "," in asked.methods:
    raise errors.ConfigError(
      f"attention.layer_methods={layers} would run in place of each of --methods="
      f"{asked.methods}; name one of them, or empty it with {overrides.PREFIX}"
      "attention.layer_methods= and nothing behind that."
    )
  return config


def _length(asked: argparse.Namespace, context: int) -> int:
  """Tokens that a row has room for."""
  return context + throughput.WARM_STEPS + asked.steps + asked.trace


def _make_folder(path: str, name: str) -> pathlib.Path:
  """The directory, in which files of the name can be written."""
  out = pathlib.Path(path)
  try:
    out.mkdir(parents=True, exist_ok=True)
    for kind in ("json", "md", "png"):
      # As it is written once all is measured; what is there stays until then.
      file = out / f"{name}.{kind}"
      with open(file, "ab") as probe:
        is_empty = probe.tell() == 0
      if is_empty:
        file.unlink()
  except OSError as error:
    raise errors.UserError(
      f"cannot write {name}.json, .md and .png to --out={path}: {error.strerror}. Choose "
      "another --out or --name, or mend permissions."
    ) from error
  return out


def _write(out: pathlib.Path, name: str, about: dict, cells: list[decode_timing.Cell]) -> None:
  """Leaves the table, all that is known of it, and a picture if one can be drawn."""
  (out / f"{name}.md").write_text(markdown.align(decode_timing.rows(cells)))
  content = about | dict(cells=[dataclasses.asdict(cell) for cell in cells])
  (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
  if (reason := pictures.why_none()) is None:
    pictures.draw_throughput(cells, out / f"{name}.png")
  else:
    _say(f"no picture: {reason}")


def _measure(asked, transformer, params, mesh, context: int, lists_SLBKM: np.ndarray | None):
  """One cell, and what it ran on."""
  stream, options = transformer.options.home_stream, transformer.options
  length = _length(asked, context)
  slots = None
  if stream == "sparse" and not asked.resident:
    slots = decode_timing.num_slots(transformer, length, asked.spare)
  rows = asked.rows or decode_timing.rows_within(
    transformer, stream, length, slots, int(asked.kv_gib * 2**30)
  )
  room = caches.room(transformer, batch=rows, length=length, num_slots=slots)
  caches.check_slots(transformer, stream, room, mesh)
  choices = backends.choose_decoding(
    options, stream, room, num_heads=transformer.shape.num_attention_heads, mesh=mesh
  )
  spec = caches.spec(transformer, stream, room)
  caches.check_size(spec, caches.free_bytes(), pinned.limit())
  with sharding.use(mesh):
    cache = random_cache(spec, context, seed=1)
    ids_B = jax.random.randint(jax.random.key(2), (rows,), 0, transformer.shape.vocab_size)
  cell, _ = decode_timing.measure(
    transformer,
    params,
    cache,
    ids_B,
    stream=stream,
    mesh=mesh,
    num_steps=asked.steps,
    num_warm=throughput.WARM_STEPS,
    num_traced=asked.trace,
    lists_SLBKM=None if lists_SLBKM is None else jnp.asarray(lists_SLBKM, jnp.int32),
  )
  return dataclasses.replace(cell, backends=tuple(map(str, choices))), choices


def main(arguments: list[str] | None = None) -> int:
  """The command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m sparsejax.decode_shapes",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--config", required=True, help="a preset: its shape and settings")
  add("--methods", default="full,infllmv2,nosa", help="in place of the config's method")
  add("--contexts", default="16384", help="tokens of every row before the first step")
  add("--kv_gib", type=float, help="of caches on the device; gives the number of rows")
  add("--rows", type=int, help="how many, if not by --kv_gib")
  add("--spare", type=int, default=16, help="slots beyond what a token reads (16)")
  add("--resident", action="store_true", help="keep all pages on the device")
  add("--lists", default="", help="METHOD=FOLDER,... of recordings to replay")
  add("--steps", type=int, default=128, help="that are timed (128)")
  add("--trace", type=int, default=0, help="steps after them, to see which kernels they run")
  add("--kernels", choices=("auto", "strict"), default="auto", help="in place of the config's")
  add("--out", help="directory for NAME.json, NAME.md and NAME.png, if they are wanted")
  add("--name", default="decode_shapes", help="of these files")
  asked, changes = parser.parse_known_args(arguments)
  wrong = [change for change in changes if not overrides.is_override(change)]
  if wrong:
    parser.error(f"unrecognized argument {wrong[0]}")
  return command_line.friendly(lambda _: run(asked, changes))([])


if __name__ == "__main__":
  sys.exit(main())
