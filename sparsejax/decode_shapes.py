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
import numpy as np

from sparsejax import command_line, errors, model, parameters, sharding
from sparsejax.attention import backends, past
from sparsejax.configuration import build, checks, overrides, record
from sparsejax.decoding import cache as caches
from sparsejax.decoding import pinned
from sparsejax.evaluation import decode_timing, markdown, pictures, throughput


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
  """Does what was asked; returns the exit status."""
  methods = asked.methods.split(",")
  contexts = _numbers("contexts", asked.contexts)
  recordings = _recordings(asked.lists)
  if (asked.kv_gib is None) == (asked.rows is None):
    raise errors.ConfigError("give either --kv_gib or --rows: how many rows are decoded.")
  for name, least in dict(rows=1, steps=1, spare=0, trace=0).items():
    value = getattr(asked, name)
    if value is not None and value < least:
      raise errors.ConfigError(f"--{name}={value} must be at least {least}.")
  if asked.kv_gib is not None and asked.kv_gib <= 0:
    raise errors.ConfigError(f"--kv_gib={asked.kv_gib} must be above 0.")
  configs = {}
  for name in methods:
    more = [f"--config.attention.method={name}", f"--config.attention.kernels={asked.kernels}"]
    configs[name] = overrides.load(asked.config, [*more, *changes])
    checks.check(configs[name])
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  cells, seen = [], {}
  for name, config in configs.items():
    transformer = build.make_model(config, max_documents=1)
    params = random_params(transformer, mesh, config.seed)
    for context in contexts:
      cell, choices = _measure(asked, transformer, params, mesh, context, recordings.get(name))
      cells.append(cell)
      for choice in choices:
        if str(choice) not in seen:
          seen[str(choice)] = choice
          _say(f"backend of {choice}")
      _say(markdown.align(decode_timing.rows([cell])).splitlines()[-1])
      for kernel in cell.kernels[:30]:
        _say(f"  {kernel.microseconds:9.1f} us {kernel.calls:6.1f} x {kernel.name[:90]}")
      if cell.fetch_rate is not None:
        _say(f"  pages came at {cell.fetch_rate / 1e9:.1f} GB/s")
    del params
    gc.collect()
  text = markdown.align(decode_timing.rows(cells))
  _say(f"\n{text}")
  if asked.out:
    out = pathlib.Path(asked.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{asked.name}.md").write_text(text)
    content = dict(
      environment=record.environment(),
      backends=list(seen),
      weights="random",
      lists={name: "recorded" if name in recordings else "chosen" for name in methods},
      configs={name: record.as_json(config) for name, config in configs.items()},
      cells=[dataclasses.asdict(cell) for cell in cells],
    )
    (out / f"{asked.name}.json").write_text(json.dumps(content, indent=2) + "\n")
    if (reason := pictures.why_none()) is None:
      pictures.draw_throughput(cells, out / f"{asked.name}.png")
    else:
      _say(f"no picture: {reason}")
  return 0


def _say(text: str) -> None:
  sys.stdout.write(text + "\n")
  sys.stdout.flush()


def _measure(asked, transformer, params, mesh, context: int, recording):
  """One cell, and what it ran on."""
  stream, options = transformer.options.home_stream, transformer.options
  length = context + throughput.WARM_STEPS + asked.steps + asked.trace
  lists_SLBKM = None
  if recording is not None:
    lists_SLBKM = _recording(recording, context, transformer, length)
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
    lists_SLBKM=lists_SLBKM,
  )
  return dataclasses.replace(cell, backends=tuple(map(str, choices))), choices


def _numbers(name: str, text: str) -> list[int]:
  wrong = [part for part in text.split(",") if not part.isdigit() or int(part) < 1]
  if wrong:
    raise errors.ConfigError(f"--{name} takes whole numbers from 1 up; {wrong[0]!r} is none.")
  return [int(part) for part in text.split(",")]


def _recordings(text: str) -> dict[str, pathlib.Path]:
  """By method, where its recordings are."""
  found = {}
  for part in filter(None, text.split(",")):
    name, _, path = part.partition("=")
    if not path or not pathlib.Path(path).is_dir():
      raise errors.DataError(f"--lists={part} names no directory with CONTEXT.npy in it.")
    found[name] = pathlib.Path(path)
  return found


def _recording(
  path: pathlib.Path, context: int, transformer: model.Transformer, length: int
) -> jax.Array:
  """What a model listed behind a context, [S, L, B, K, M] of any S, L and B."""
  file = path / f"{context}.npy"
  if not file.exists():
    raise errors.DataError(f"{file} is missing; record lists at a context of {context}.")
  lists = np.load(file)
  *_, k, m = lists.shape
  wanted_k = transformer.shape.num_key_value_heads
  wanted_m = transformer.options.num_listed(length)
  if (k, m) != (wanted_k, wanted_m):
    raise errors.DataError(
      f"{file} has lists of {m} blocks for {k} key heads; this shape has {wanted_m} and "
      f"{wanted_k}. Record them with a model of as many."
    )
  return jnp.asarray(lists, jnp.int32)


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
  add("--kernels", choices=("auto", "strict"), default="auto")
  add("--out", help="directory for NAME.json, NAME.md and NAME.png, if they are wanted")
  add("--name", default="decode_shapes", help="of these files")
  asked, changes = parser.parse_known_args(arguments)
  wrong = [change for change in changes if not overrides.is_override(change)]
  if wrong:
    parser.error(f"unrecognized argument {wrong[0]}")
  return command_line.friendly(lambda _: run(asked, changes))([])


if __name__ == "__main__":
  sys.exit(main())
