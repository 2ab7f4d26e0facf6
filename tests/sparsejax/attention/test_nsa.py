"""NSA against a transcription of its paper's equations, one query at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.attention import method, moba, nsa
from tests import small

B, T, H, K, D, E = 2, 40, 4, 2, 8, 16
BLOCK, M = 8, 3


def make_options(**changes):
  options = small.make_model(attention__method="nsa").options
  own = {name: changes.pop(name) for name in list(changes) if hasattr(options.nsa, name)}
  sizes = dict(block_size=BLOCK, num_blocks=M) | changes
  return dataclasses.replace(options, nsa=dataclasses.replace(options.nsa, **own), **sizes)


def make_arrays(seed=0):
  keys = jax.random.split(jax.random.key(seed), 5)
  q = jax.random.normal(keys[0], (B, T, H, D))
  k, v = (jax.random.normal(key, (B, T, K, D)) for key in keys[1:3])
  batch = small.make_batch(rows=B, length=T, num_documents=2)
  angles = batch.positions[..., None] * jnp.asarray([[[1.0, 0.3, 0.1, 0.03]]])
  inputs = jax.random.normal(keys[3], (B, T, E))
  return q, k, v, method.Tokens(batch.segments, None, jnp.asarray(True), inputs, angles)


def make(options, seed=0):
  """The module, its parameters and its arguments."""
  module = nsa.Nsa(options, jax.nn.initializers.normal(0.4))
  arrays = make_arrays(seed)
  params = jax.jit(lambda rng: module.init(rng, *arrays, "sparse"))(jax.random.key(7))
  return module, {"params": jax.tree.map(jnp.asarray, _unboxed(params["params"]))}, arrays


def _unboxed(tree):
  return jax.tree.map(
    lambda x: x.unbox() if hasattr(x, "unbox") else x,
    tree,
    is_leaf=lambda x: hasattr(x, "unbox"),
  )


def softmax(scores):
  weights = np.exp(scores - scores.max())
  return weights / weights.sum()


def turned(x, angles):
  z = (x[..., : D // 2] + 1j * x[..., D // 2 :]) * np.exp(1j * angles)[:, :, None]
  return np.concatenate([z.real, z.imag], axis=-1)


def expected(options, params, arrays, segments, *, reads_all):
  """Equations 5 and 7 to 12, and section 3.3.3; windows and blocks count from 0."""
  q, k, v, tokens = arrays
  q, k, v, x, angles = (
    np.asarray(a, np.float64) for a in (q, k, v, tokens.inputs_BTE, tokens.angles_BTD)
  )
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
  own, own_of = options.nsa, {}
  for branch in ("cmp", "win"):
    own_of[branch] = k, v
    if own.kv == "separate":
      keys, values = (
        np.einsum("bte,ekd->btkd", x, p[f"{name}_{branch}"]["kernel"]) for name in "kv"
      )
      own_of[branch] = turned(keys, angles), values
  gates = 1 / (1 + np.exp(-np.einsum("bte,ech->btch", x, p["branch_gate"]["kernel"])))
  size, stride, group = own.compress_length, own.compress_stride, H // K

  def compress(name, array, row, window, head):
    at = range(window * stride, window * stride + size)
    is_own = [segments[row, s] == segments[row, at[-1]] for s in at]
    if own.compression == "mean":
      return array[row, [s for s, is_in in zip(at, is_own, strict=True) if is_in], head].mean(0)
    weights = p[f"{name}_compress"]
    shown = [
      (array[row, s, head] + weights["position"][i, head]) * is_own[i] for i, s in enumerate(at)
    ]
    inner = sum(shown[i] @ weights["up"][i, head] for i in range(size))
    return (inner / (1 + np.exp(-inner))) @ weights["down"][head]

  out = np.zeros(q.shape)
  lists = {}
  for row, t, head in np.ndindex(B, T, K):
    document = segments[row, t]
    windows = [
      w
      for w in range(T)
      if w * stride + size - 1 <= t and segments[row, w * stride + size - 1] == document
    ]
    keys = [compress("k", own_of["cmp"][0], row, w, head) for w in windows]
    values = [compress("v", own_of["cmp"][1], row, w, head) for w in windows]
    importance = np.zeros(T // BLOCK)
    heads = range(head * group, (head + 1) * group)
    for h in heads:
      if windows:
        weights = softmax(np.stack(keys) @ q[row, t, h] / np.sqrt(D))
        out[row, t, h] += gates[row, t, 0, h] * (weights @ np.stack(values))
        for weight, w in zip(weights, windows, strict=True):
          for block in range(T // BLOCK):
            shared = {*range(w * stride, w * stride + size)} & {
              *range(block * BLOCK, (block + 1) * BLOCK)
            }
            importance[block] += weight * len(shared) / stride
    current = t // BLOCK
    blocks = [b for b in range(current) if segments[row, (b + 1) * BLOCK - 1] == document]
    blocks.append(current)
    forced = {*blocks[: own.num_initial], *(b for b in blocks if b > current - own.num_local)}
    chosen = sorted(blocks, key=lambda b: (b not in forced, -importance[b], b))
    lists[row, t, head] = {*chosen[: options.num_blocks]}
    listed = blocks if reads_all else lists[row, t, head]
    seen = [s for s in range(t + 1) if segments[row, s] == document]
    selected = [s for s in seen if reads_all or s // BLOCK in listed]
    recent = [s for s in seen if t - s < own.window]
    for h in heads:
      for i, (keys, values), read in ((1, (k, v), selected), (2, own_of["win"], recent)):
        weights = softmax(keys[row, read, head] @ q[row, t, h] / np.sqrt(D))
        out[row, t, h] += gates[row, t, i, h] * (weights @ values[row, read, head])
  return out, lists


VARIANTS = {
  "paper": {},
  "forced": dict(num_initial=0, num_local=2),
  "mean": dict(compression="mean"),
  "shared": dict(kv="shared"),
  "released": dict(
    compression="mean",
    kv="shared",
    compress_length=BLOCK,
    compress_stride=BLOCK,
    num_initial=0,
    num_local=1,
  ),
  "learned_whole_blocks": dict(compress_length=BLOCK, compress_stride=BLOCK),
  "long_windows": dict(compress_length=16, compress_stride=8),
  "short_window": dict(window=1),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_the_paper(variant):
  options = make_options(**VARIANTS[variant])
  module, params, arrays = make(options)
  segments = np.asarray(arrays[3].segments_BT)
  run = jax.jit(
    lambda stream: module.apply(params, *arrays, stream, mutable=["intermediates"]),
    static_argnums=0,
  )
  (actual, *_), seen = run("sparse")
  wanted, lists = expected(options, params, arrays, segments, reads_all=False)
  np.testing.assert_allclose(actual, wanted, atol=2e-5)
  (blocks,) = seen["intermediates"]["blocks"]
  for (row, t, head), chosen in lists.items():
    assert {*np.asarray(blocks[row, t, head])} - {-1} == chosen


@pytest.mark.parametrize("mask", ["both", "full", "none"])
def test_run_full_the_selection_reads_everything(mask):
  """And every branch stops at documents where its stream does."""
  options = make_options(document_mask=mask)
  module, params, arrays = make(options)
  segments = np.asarray(arrays[3].segments_BT)
  run = jax.jit(lambda stream: module.apply(params, *arrays, stream)[0], static_argnums=0)
  stops = dict(both=("full", "sparse"), full=("full",), none=())[mask]
  for stream in ("full", "sparse"):
    kept = segments if stream in stops else np.ones_like(segments)
    wanted, _ = expected(options, params, arrays, kept, reads_all=stream == "full")
    np.testing.assert_allclose(run(stream), wanted, atol=2e-5)
  np.testing.assert_array_equal(run("train"), run("sparse"))


@pytest.mark.parametrize("selection", ["exact", "half_local"])
def test_as_released_it_selects_as_moba_does(selection):
  """Mean windows that are the blocks, shared keys and nothing forced."""
  options = make_options(**VARIANTS["released"], selection=selection, num_blocks=2)
  module, params, arrays = make(options)
  both = module, moba.Moba(options)
  lists = [
    jax.jit(lambda m=m, p=p: m.apply(p, *arrays, "sparse", mutable=["intermediates"])[1])()[
      "intermediates"
    ]["blocks"][0]
    for m, p in zip(both, (params, {}), strict=True)
  ]
  np.testing.assert_array_equal(*lists)


def test_only_what_an_option_needs_has_parameters():
  def names(**changes):
    _, params, _ = make(make_options(**changes))
    return set(params["params"])

  projections = {"k_cmp", "v_cmp", "k_win", "v_win"}
  assert names() == {"branch_gate", "k_compress", "v_compress", *projections}
  assert names(kv="shared") == {"branch_gate", "k_compress", "v_compress"}
  assert names(compression="mean", kv="shared") == {"branch_gate"}


def test_every_parameter_learns():
  module, params, arrays = make(make_options())
  gradients = jax.jit(
    jax.grad(lambda params: (module.apply(params, *arrays, "train")[0] ** 2).sum())
  )(params)
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
    assert jnp.isfinite(gradient).all(), path
    assert gradient.any(), path


@pytest.mark.parametrize(("num_blocks", "forced"), [(1, 1), (2, 2)])
def test_a_budget_below_the_forced_blocks_is_spent_on_the_nearest(num_blocks, forced):
  """A sweep over budgets asks for such."""
  options = make_options(num_blocks=num_blocks, num_initial=1, num_local=2)
  module, params, arrays = make(options)
  _, seen = jax.jit(
    lambda: module.apply(params, *arrays, "sparse", mutable=["intermediates"])
  )()
  (blocks,) = seen["intermediates"]["blocks"]
  last = {*np.asarray(blocks[0, -1, 0])} - {-1}
  assert last == {T // BLOCK - 1 - i for i in range(forced)}


def test_it_can_be_the_sparse_side_of_ssa():
  batch = small.make_batch()
  transformers = [
    small.make_model(attention__method=name, attention__sparse_method="nsa")
    for name in ("ssa", "nsa")
  ]
  params = small.make_params(transformers[0], scale=4.0)

  trained = small.run(transformers[0], params, batch, "train", use_full=False)
  alone = small.run(transformers[1], params, batch, "sparse")
  np.testing.assert_allclose(trained.hidden_BTE, alone.hidden_BTE, atol=1e-5)
  assert (trained.align_L > 0).all()
