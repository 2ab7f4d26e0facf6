"""Both streams at once against the definition of each: values, gradients, documents."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
  block_sparse_attention,
  choose_dual_path_attention,
  devices,
  dual_path_attention,
  full_attention,
)
from tests.pallas_kernels import problems

OPTIONS = dict(block_size=8, max_documents=16)
BY_DEFINITION = dict(full_implementation="reference", sparse_implementation="reference")


def make_problem():
  return problems.make(2, 48, 4, 2, 16, 8, 2, documents=True, bias=True)


def definitions(q, k, v, bias, blocks, full_segments, sparse_segments):
  full = full_attention(
    q,
    k,
    v,
    segments_BT=full_segments,
    max_documents=16,
    key_bias_BTK=bias,
    implementation="reference",
  )
  sparse, _ = block_sparse_attention(
    q,
    k,
    v,
    blocks,
    block_size=8,
    segments_BS=sparse_segments,
    key_bias_BSK=bias,
    implementation="reference",
  )
  return full, sparse


@pytest.mark.parametrize("is_full_split", [True, False], ids=["full_split", "full_whole"])
@pytest.mark.parametrize("is_sparse_split", [True, False], ids=["split", "whole"])
def test_both_streams_and_their_gradients_match_the_definitions(is_full_split, is_sparse_split):
  """Also where only one of the streams stops at the borders of documents."""
  problem = make_problem()
  arrays = problem.q, problem.k, problem.v, problem.key_bias
  full_segments = problem.segments if is_full_split else None
  sparse_segments = problem.segments if is_sparse_split else None
  # Not the same cotangent twice, so that streams which changed places show.
  cotangents = problem.dout, problem.dout[:, ::-1]

  def run(q, k, v, bias):
    return dual_path_attention(
      q,
      k,
      v,
      problem.blocks,
      full_segments_BT=full_segments,
      sparse_segments_BT=sparse_segments,
      key_bias_BTK=bias,
      **OPTIONS,
    )

  def wanted(q, k, v, bias):
    return definitions(q, k, v, bias, problem.blocks, full_segments, sparse_segments)

  def outputs_and_gradients(function):
    outs, vjp = jax.vjp(jax.jit(function), *arrays)
    return *outs, *vjp(cotangents)

  names = "full", "sparse", "dq", "dk", "dv", "dbias"
  pairs = zip(outputs_and_gradients(run), outputs_and_gradients(wanted), strict=True)
  for name, (actual, exact) in zip(names, pairs, strict=True):
    np.testing.assert_allclose(actual, exact, atol=1e-4, err_msg=name)


def test_each_stream_runs_on_what_it_is_told():
  problem = make_problem()
  arrays = problem.q, problem.k, problem.v, problem.blocks
  attend = functools.partial(dual_path_attention, *arrays, **OPTIONS)
  for options, unavailable in (
    (dict(full_implementation="strict"), "full_attention: .*'strict' cannot run: cudnn"),
    (dict(full_implementation="cudnn"), "full_attention: .*'cudnn' cannot run: cudnn"),
    (dict(sparse_implementation="strict"), "block_sparse_attention: .*'strict' cannot run: mo"),
    (dict(sparse_implementation="triton"), "block_sparse_attention: .*'triton' cannot run: tr"),
  ):
    if jax.devices()[0].platform == "cpu":
      with pytest.raises(ValueError, match=unavailable):
        attend(**options)
      with pytest.raises(ValueError, match=unavailable):
        choose_dual_path_attention(*arrays, **OPTIONS, **options)
  for actual, exact in zip(attend(**BY_DEFINITION), attend(), strict=True):
    np.testing.assert_allclose(actual, exact, atol=1e-5)


def test_the_choice_names_the_backends_of_both_streams():
  arrays = [
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in (
      ((2, 64, 4, 8), jnp.float32),
      ((2, 64, 2, 8), jnp.float32),
      ((2, 64, 2, 8), jnp.float32),
      ((2, 64, 2, 3), jnp.int32),
    )
  ]
  choose = functools.partial(choose_dual_path_attention, *arrays, block_size=8)
  assert str(choose()) == (
    "dual_path_attention: separate (full_attention by xla, block_sparse_attention by xla)"
  )
  assert choose(full_implementation="reference", implementation="separate").reason == (
    "full_attention by reference, block_sparse_attention by xla"
  )


@pytest.mark.parametrize(
  ("dtype", "backend"), [(jnp.bfloat16, "mosaic_gpu"), (jnp.float32, "xla")]
)
def test_on_a_hopper_the_sparse_stream_takes_its_kernels(dtype, backend, monkeypatch):
  monkeypatch.setattr(devices, "why_not_hopper", lambda: None)
  q, k = (jax.ShapeDtypeStruct((2, 64, n, 64), dtype) for n in (4, 2))
  blocks = jax.ShapeDtypeStruct((2, 64, 2, 3), jnp.int32)
  choice = choose_dual_path_attention(q, k, k, blocks, block_size=16, full_implementation="xla")
  assert choice.reason == f"full_attention by xla, block_sparse_attention by {backend}"


def test_there_is_no_other_implementation():
  problem = make_problem()
  for function in (dual_path_attention, choose_dual_path_attention):
    # Unwrapped, since the hook that checks types would see the unknown name first.
    with pytest.raises(KeyError, match="no implementation 'fused' of dual_path_attention"):
      inspect.unwrap(function)(
        problem.q, problem.k, problem.v, problem.blocks, **OPTIONS, implementation="fused"
      )
