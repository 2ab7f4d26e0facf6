"""What block selection refuses, and which implementation it takes."""

import functools

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import devices
from pallas_kernels.block_selection import pooling as poolings


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(num_initial=2), "3 forced blocks"),
    (dict(num_by_query=1), "belong together"),
    (dict(pooling=poolings.Pooling(4, 3, 0, 1)), "do not divide blocks of 4"),
    (dict(query_offset=1), "do not lie within 16 keys"),
    (dict(rule="half_local", num_local=2), "takes neither"),
    (dict(normalizer=poolings.Pooling(8, 0, 0, 1)), "to normalise over have no size or no"),
    (
      dict(
        num_by_query=1,
        key_score_BSK=jnp.ones((1, 16, 2)),
        pooling=poolings.Pooling(3, 1, -1, 5),
      ),
      "raise num_local=1",
    ),
  ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
  q, keys = jnp.ones((1, 16, 4, 4)), jnp.ones((1, 16, 2, 4))
  with pytest.raises(ValueError, match=message):
    pallas_kernels.select_blocks(q, keys, block_size=4, num_blocks=2, **options)


def test_a_block_without_quarters_is_refused():
  with pytest.raises(ValueError, match="no quarters"):
    poolings.infllm_v2(6)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(num_kv=3), "do not group"),
    (dict(num_blocks=0), "must be at least 1"),
    (dict(key_length=8), "do not lie within 8 keys"),
    (dict(segments=(1, 3)), "segments must be"),
  ],
)
def test_wrong_input_is_refused(change, message):
  q = jnp.ones((1, 16, 4, 4))
  keys = jnp.ones((1, change.get("key_length", 16), change.get("num_kv", 2), 4))
  segments = jnp.ones(change["segments"], jnp.int32) if "segments" in change else None
  # The hook that checks array types sees mismatched shapes first where it is installed.
  with pytest.raises(Exception, match=f"{message}|Type-check"):
    pallas_kernels.select_blocks(
      q, keys, block_size=4, num_blocks=change.get("num_blocks", 2), segments_BS=segments
    )


def test_unknown_rule_is_refused():
  q, keys = jnp.ones((1, 16, 2, 4)), jnp.ones((1, 16, 1, 4))
  with pytest.raises(Exception, match=r"no selection rule|Type-check"):
    pallas_kernels.select_blocks(q, keys, block_size=4, num_blocks=2, rule="best")


@pytest.mark.parametrize("implementation", [None, "auto"])
@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({}, "mosaic_gpu (the first choice)"),
    (dict(head_dim=128, block_size=64), "mosaic_gpu (the first choice)"),
    (dict(rule="half_local"), "mosaic_gpu (the first choice)"),
    (dict(dtype=jnp.float32), "xla (mosaic_gpu takes bfloat16, not float32 and float32)"),
    (dict(head_dim=32), "xla (mosaic_gpu takes head sizes (64, 128), not 32)"),
    (
      dict(num_blocks=4096),
      "xla (mosaic_gpu has no room in shared memory for num_blocks=4096)",
    ),
    (dict(num_blocks=4096, num_by_query=4), "mosaic_gpu (the first choice)"),
    (
      dict(normalizer=poolings.Pooling(64, 64, 0, 1)),
      "xla (mosaic_gpu normalises over the windows it scores, not over those of 64 keys every "
      "64)",
    ),
  ],
)
def test_a_hopper_takes_its_kernel_where_it_can_run(changes, said, implementation, monkeypatch):
  monkeypatch.setattr(devices, "why_not_hopper", lambda: None)
  options = dict(dtype=jnp.bfloat16, head_dim=64, block_size=16, num_blocks=4) | changes
  dtype, head_dim = options.pop("dtype"), options.pop("head_dim")
  q, keys = (jax.ShapeDtypeStruct((1, 64, n, head_dim), dtype) for n in (4, 2))
  choice = pallas_kernels.choose_block_selection(
    q, keys, **options, implementation=implementation
  )
  assert str(choice) == f"block_selection: {said}"


def test_without_a_hopper_xla_runs_and_strict_is_refused():
  if jax.devices()[0].platform == "gpu":
    pytest.skip("this machine has a GPU")
  q, keys = (jax.ShapeDtypeStruct((1, 64, n, 64), jnp.bfloat16) for n in (4, 2))
  choose = functools.partial(
    pallas_kernels.choose_block_selection, q, keys, block_size=16, num_blocks=4
  )
  why = "mosaic_gpu needs a Hopper GPU, this is cpu"
  assert str(choose()) == f"block_selection: xla ({why})"
  with pytest.raises(ValueError, match=f"='strict' cannot run: {why}; 'xla' runs anywhere"):
    choose(implementation="strict")
