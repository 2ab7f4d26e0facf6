"""Problems of block-sparse attention, and how wrong an answer may be."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import block_sparse_attention

FIELDS = ("q", "k", "v", "key_bias")
NAMES = ("out", "lse", "dq", "dk", "dv", "dkey_bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """Inputs and cotangents in float32, of values that bfloat16 can hold."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  key_bias: jax.Array | None
  blocks: jax.Array
  dout: jax.Array
  dlse: jax.Array
  block_size: int
  query_offset: int
  segments: jax.Array | None


def make(
  b,
  t,
  h,
  k,
  d,
  block_size,
  m,
  *,
  seed=0,
  offset=0,
  ahead=0,
  documents=False,
  bias=False,
  scale=1.0,
) -> Problem:
  """Random queries `[offset, offset + t)` over keys that end `ahead` behind the last one.

  Lists hold empty slots, repeats, blocks of the future and blocks that are not there.
  """
  s = offset + t + ahead
  shapes = dict(q=(b, t, h, d), k=(b, s, k, d), v=(b, s, k, d), key_bias=(b, s, k))
  shapes |= dict(blocks=(b, t, k, m), dout=(b, t, h, d), dlse=(b, t, h))
  if not bias:
    del shapes["key_bias"]
  # What is drawn at a place depends on nothing but the place, so that shapes can share.
  size = 2 ** max(16, *((math.prod(shape) - 1).bit_length() for shape in shapes.values()))
  drawn = _draw(jax.random.key(seed), s // block_size + 3, scale, size)
  arrays = {
    name: jnp.asarray(np.asarray(drawn[name])[: math.prod(shape)].reshape(shape))
    for name, shape in shapes.items()
  }
  segments = make_documents(b, s, seed) if documents else None
  fixed = dict(block_size=block_size, query_offset=offset, segments=segments)
  return Problem(**dict(key_bias=None) | arrays | fixed)


@functools.partial(jax.jit, static_argnames="size")
def _draw(key, num_blocks, scale, size):
  """`size` numbers for every array of a problem."""
  keys = jax.random.split(key, 7)

  def normal(key):
    values = scale * jax.random.normal(key, (size,))
    return values.astype(jnp.bfloat16).astype(jnp.float32)

  return dict(
    q=normal(keys[0]),
    k=normal(keys[1]),
    v=normal(keys[2]),
    key_bias=normal(keys[3]),
    blocks=jax.random.randint(keys[4], (size,), -1, num_blocks),
    dout=normal(keys[5]),
    dlse=jax.random.normal(keys[6], (size,)),
  )


def make_documents(b, s, seed=0):
  """Runs of equal segments of random length, different in every row."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(np.cumsum(rng.random((b, s)) < 0.1, axis=1), jnp.int32)


def run(problem: Problem, *, dtype, attend=block_sparse_attention, **options) -> dict:
  """Outputs and the gradient of every input, computed in `dtype`, by name."""
  return program(problem, dtype=dtype, attend=attend, **options)(problem)


def program(problem: Problem, *, dtype, attend=block_sparse_attention, **options):
  """What `run` runs, compiled once, for this problem and others that differ in arrays alone.

  Segments are part of the program.
  """
  fixed = dict(
    block_size=problem.block_size,
    query_offset=problem.query_offset,
    segments_BS=problem.segments,
    **options,
  )

  @jax.jit
  def outputs_and_gradients(inputs, blocks, dout, dlse):
    def of(q, k, v, key_bias):
      return attend(q, k, v, blocks, key_bias_BSK=key_bias, **fixed)

    q, k, v, key_bias = inputs
    (out, lse), vjp = jax.vjp(of, *(x.astype(dtype) for x in (q, k, v)), key_bias)
    # A query that sees nothing has no log-normaliser to push on.
    dlse = jnp.where(jnp.isfinite(lse), dlse, 0.0)
    return out, lse, *vjp((dout.astype(dtype), dlse))

  def of_problem(problem):
    inputs = tuple(getattr(problem, name) for name in FIELDS)
    values = outputs_and_gradients(inputs, problem.blocks, problem.dout, problem.dlse)
    return {n: x for n, x in zip(NAMES, values, strict=True) if x is not None}

  return of_problem


def reference(*args, **kwargs):
  return block_sparse_attention(*args, **kwargs, implementation="reference")


def plain(q, k, v, blocks, *, block_size, query_offset, segments_BS, key_bias_BSK):
  """What one would write without thinking, every product rounded to the input's dtype."""
  (b, t, h, d), (_, s, num_kv, _) = q.shape, k.shape
  q = q.reshape(b, t, num_kv, h // num_kv, d)
  logits = jnp.einsum("btkgd,bskd->btkgs", q, k).astype(jnp.float32) * d**-0.5
  if key_bias_BSK is not None:
    logits += key_bias_BSK.transpose(0, 2, 1)[:, None, :, None]
  block_of_key = jnp.arange(s) // block_size
  seen = (blocks[..., None] == block_of_key[None, None, None, None]).any(-2)
  position = query_offset + jnp.arange(t)
  seen &= (position[:, None] >= jnp.arange(s)[None])[None, :, None]
  if segments_BS is not None:
    own = segments_BS[:, position]
    seen &= (own[:, :, None] == segments_BS[:, None])[:, :, None]
  logits = jnp.where(seen[:, :, :, None], logits, -jnp.inf)
  lse = jax.nn.logsumexp(logits, axis=-1)
  weights = jnp.exp(logits - jnp.where(jnp.isneginf(lse), 0.0, lse)[..., None]).astype(v.dtype)
  out = jnp.einsum("btkgs,bskd->btkgd", weights, v)
  return out.reshape(b, t, h, d), lse.reshape(b, t, h)


def assert_no_worse(name, actual, low, exact, factor=2.0, floor=2e-5):
  """`actual` may be at most `factor` times as wrong as plain low precision."""

  # In NumPy: XLA would compile each of these lines for every shape.
  exact, low, actual = (np.asarray(x, np.float32) for x in (exact, low, actual))
  assert actual.shape == low.shape == exact.shape, name

  def error(x):
    # Equal infinities are no error; their difference would be NaN.
    difference = np.subtract(x, exact, out=np.zeros_like(exact), where=x != exact)
    return float(np.abs(difference).max())

  size = float(np.abs(exact, out=np.zeros_like(exact), where=np.isfinite(exact)).max())
  budget = factor * error(low) + floor * max(1.0, size)
  assert error(actual) <= budget, f"{name}: error {error(actual):.1e}, budget {budget:.1e}"
