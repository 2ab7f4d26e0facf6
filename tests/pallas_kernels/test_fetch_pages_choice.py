"""What moves pages, and what is refused."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import choose_fetch_pages, choose_write_pages
from pallas_kernels.fetch_pages import mosaic_gpu
from tests.pallas_kernels.pages import P, S, large, make, make_lists, put


class FakeDevice:
  """What choosing looks at."""

  platform = "gpu"
  device_kind = "NVIDIA Test"

  def __init__(self, compute_capability):
    self.compute_capability = compute_capability


@pytest.mark.parametrize(
  ("kind", "implementation", "said"),
  [
    ("device", None, "resident (the first choice)"),
    ("pinned_host", None, "mosaic_gpu (resident needs stores in device memory)"),
    ("device", "strict", "mosaic_gpu (strict)"),
    ("pinned_host", "strict", "mosaic_gpu (strict)"),
    ("pinned_host", "mosaic_gpu", "mosaic_gpu (asked for)"),
  ],
)
def test_on_hopper_the_kernel_moves_what_is_on_the_host(
  kind, implementation, said, monkeypatch
):
  arrays = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), large(kind)
  )
  monkeypatch.setattr(jax, "devices", lambda: [FakeDevice("9.0")])
  for choose in (choose_fetch_pages, choose_write_pages):
    choice = choose(*arrays, implementation=implementation)
    assert str(choice) == f"{choose.__name__.removeprefix('choose_')}: {said}"


def test_choices_are_explained():
  if jax.devices()[0].platform == "gpu":
    pytest.skip("this machine has a GPU")
  arrays = large("pinned_host")
  why = "resident needs stores in device memory"
  said = f"{why}; mosaic_gpu needs a Hopper GPU, this is cpu"
  assert choose_fetch_pages(*arrays) == ("fetch_pages", "dma", said)
  assert choose_write_pages(*arrays).backend == "dma"
  assert choose_write_pages(*large("device")).backend == "resident"
  rng = np.random.default_rng(5)
  stores, slots = put(make(P, rng), "pinned_host"), put(make(S, rng), "device")
  arrays = (stores, slots, *make_lists(rng, "rows"))
  for operation in (pallas_kernels.fetch_pages, pallas_kernels.write_pages):
    with pytest.raises(ValueError, match=f"='resident' cannot run: {why}; 'dma' runs anywhere"):
      operation(*arrays, implementation="resident")
  for choose in (choose_fetch_pages, choose_write_pages):
    # Unwrapped, since the hook that checks types would see the unknown name first.
    with pytest.raises(KeyError, match="no implementation 'tma' of "):
      inspect.unwrap(choose)(*arrays, implementation="tma")
  for operation in (pallas_kernels.fetch_pages, pallas_kernels.write_pages):
    with pytest.raises(ValueError, match="='strict' cannot run: mosaic_gpu needs a Hopper GPU"):
      operation(*arrays, implementation="strict")


@pytest.mark.parametrize(
  ("store", "message"),
  [
    (jax.ShapeDtypeStruct((5, 8, 16), jnp.int8), "takes bfloat16, .* not int8"),
    (jax.ShapeDtypeStruct((5, 3, 4), jnp.bfloat16), "pages of a multiple of 16 bytes, not 24"),
    (jax.ShapeDtypeStruct((5, 3, 4), jnp.float32), None),
  ],
)
def test_what_the_kernel_cannot_take_is_said(store, message):
  why = mosaic_gpu.why_not([store])
  assert why is None if message is None else re.search(message, why)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(slots=[(5, 4, 8)]), "2 stores and 1 arrays of slots; have as many"),
    (dict(stores=[], slots=[]), "0 stores and 0 arrays of slots"),
    (
      dict(slots=[(5, 4, 8), (5, 8)]),
      r"pages of float32\[4\] do not fit into slots of float32\[8\]",
    ),
    (dict(dtype=jnp.bfloat16), r"of float32\[4, 8\] do not fit into slots of bfloat16\[4, 8\]"),
    (dict(stores=[(7, 4, 8), (6, 4)]), r"stores must be equally long, got \[7, 6\]"),
    (dict(slots=[(5, 4, 8), (6, 4)]), r"slots must be equally long, got \[5, 6\]"),
    (dict(slot_kind="pinned_host"), "slots must be in device memory, got some in host memory"),
    (
      dict(kinds=["pinned_host", "device"]),
      "must all be in host memory or all in device memory",
    ),
    (dict(pages=jnp.zeros(3)), r"pages must be int32 \[R\], got float32\[3\]"),
    (
      dict(rows=jnp.zeros((3, 1), jnp.int32)),
      r"rows must be int32 \[R\], got int32\[3, 1\]",
    ),
    (dict(pages=jnp.zeros(2, jnp.int32)), "2 pages for 3 rows; have as many"),
  ],
)
def test_wrong_input_is_refused(change, message):
  shapes = dict(stores=[(7, 4, 8), (7, 4)], slots=[(5, 4, 8), (5, 4)]) | change
  kinds = change.get("kinds", ["device"] * 2)[: len(shapes["stores"])]
  stores = [
    put(jnp.zeros(shape), kind) for shape, kind in zip(shapes["stores"], kinds, strict=True)
  ]
  dtype, kind = change.get("dtype", jnp.float32), change.get("slot_kind", "device")
  slots = [put(jnp.zeros(shape, dtype), kind) for shape in shapes["slots"]]
  pages, rows = (change.get(name, jnp.zeros(3, jnp.int32)) for name in ("pages", "rows"))
  # Unwrapped, since the hook that checks array types would see mismatched shapes first.
  for choose in (choose_fetch_pages, choose_write_pages):
    with pytest.raises(ValueError, match=message):
      inspect.unwrap(choose)(tuple(stores), tuple(slots), pages, rows)
