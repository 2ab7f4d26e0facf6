"""Attention over a mesh: every device runs kernels on its own part, and gathers nothing.

What the parts add up to is in `test_methods.py` and `training/test_step.py`.
"""

import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import devices
from pallas_kernels.full_attention import cudnn
from sparsejax import parameters, sharding
from tests import small

ROWS, T, H, K, D = 8, 64, 4, 2, 64
COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-broadcast",
  "collective-permute",
  "reduce-scatter",
)


@pytest.fixture
def hopper(monkeypatch):
  """A machine that calls itself one: enough to lower a program for it, not to run it."""
  from jax._src.cudnn import fused_attention_stablehlo

  monkeypatch.setattr(devices, "why_not_hopper", lambda: None)
  monkeypatch.setattr(cudnn, "why_not", lambda *shape, **options: None)
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda *_: True)


def make_gradient(transformer, stream):
  def loss(params, batch):
    output = transformer.apply(
      {"params": params}, batch.inputs, batch.positions, batch.segments, stream=stream
    )
    return output.hidden_BTE.astype(jnp.float32).sum() + output.align_L.sum()

  return jax.jit(jax.grad(loss))


def trace(mesh, stream, kernels, **changes):
  transformer = small.make_model(
    model__head_dim=D,
    model__dtype="bfloat16",
    attention__block_size=16,
    attention__kernels=kernels,
    **changes,
  )
  params = parameters.abstract(transformer, mesh)
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(mesh)),
    small.make_batch(rows=ROWS, length=T),
  )
  with sharding.use(mesh):
    return make_gradient(transformer, stream).trace(params, batch)


def calls_of_kernels(traced):
  """Of each call in a GPU's program: the kernel, and (rows, heads) of what it reads."""
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  calls = []
  for line in text.splitlines():
    if found := re.search(r"custom_call @(mosaic_gpu|__cudnn)", line):
      operands = line[line.rindex(": (") : line.rindex("->")]
      shapes = re.findall(rf"tensor<(\d+)x{T}x(\d+)x{D}xbf16>", operands)
      calls.append((found[1], [(int(rows), int(heads)) for rows, heads in shapes]))
  return calls


def count_kernels(traced):
  return [str(traced.jaxpr).count(name) for name in ("mpmd_map[", "dot_product_attention")]


@pytest.mark.skipif(
  jax.devices()[0].platform == "gpu", reason="pretends to have eight GPUs that it has not"
)
@pytest.mark.parametrize(
  ("stream", "sizes", "kernels"),
  [
    ("full", (2, 2, 2), {"__cudnn"}),
    ("sparse", (8, 1, 1), {"mosaic_gpu"}),
    ("train", (2, 2, 2), {"mosaic_gpu", "__cudnn"}),
  ],
)
def test_gpus_run_kernels_on_their_own_rows_and_heads(hopper, stream, sizes, kernels):
  data, fsdp, tensor = sizes
  mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
  strict = trace(mesh, stream, "strict")
  calls = calls_of_kernels(strict)
  assert {kernel for kernel, _ in calls} == kernels
  own_rows = ROWS // (data * fsdp)
  own = {(own_rows, H // tensor), (own_rows, K // tensor)}
  assert {shape for _, shapes in calls for shape in shapes} == own
  # Lowering takes long; that `auto` traces as many kernels is enough.
  assert count_kernels(trace(mesh, stream, "auto")) == count_kernels(strict)


@pytest.mark.skipif(
  jax.devices()[0].platform == "gpu", reason="pretends to have eight GPUs that it has not"
)
def test_a_bias_leaves_everything_on_kernels(hopper):
  """SSA over NOSA: full attention, selection and sparse attention, and their gradients."""
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  changes = dict(attention__sparse_method="nosa", infllmv2__num_windows=7)
  text = trace(mesh, "train", "strict", **changes).lower(lowering_platforms=("cuda",)).as_text()
  # The bias comes to cuDNN as eight further channels of a device's own rows and heads.
  calls = [line for line in text.splitlines() if "custom_call @__cudnn" in line]
  assert calls
  for call in calls:
    assert f"tensor<{ROWS // 4}x{T}x{K // 2}x{D + 8}xbf16>" in call
    assert f"x{T}x{T}x" not in call
  # Selection, attention, and its two gradients.
  assert text.count("custom_call @mosaic_gpu") >= 4


# A method of each kind in training; of the other streams, those that no method trains on.
@pytest.mark.parametrize(
  ("name", "stream"),
  [
    *((name, "train") for name in ("ssa", "nosa", "nsa", "sliding_window")),
    ("full", "sparse"),
    ("nosa", "full"),
  ],
)
def test_rows_never_leave_their_device(name, stream):
  """Only sums over the batch do: of the loss, and of the gradient of parameters."""
  mesh = sharding.make_mesh(data=8, fsdp=1, tensor=1)
  transformer = small.make_model(attention__method=name)
  params = jax.device_put(small.make_params(transformer), sharding.replicated(mesh))
  with sharding.use(mesh):
    batch = sharding.put_batch(small.make_batch(rows=ROWS, length=T), mesh)
    text = make_gradient(transformer, stream).lower(params, batch).compile().as_text()
  collectives = set(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text))
  assert collectives == {"all-reduce"}
