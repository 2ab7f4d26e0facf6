"""What is said of the backends that read prompts is what reads them."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from sparsejax import errors
from sparsejax.attention import prompt_backends
from sparsejax.decoding import cache as caches
from sparsejax.decoding import prefill
from tests import small
from tests.sparsejax.decoding.models import METHODS, STREAMS

LENGTH, CHUNK = 45, 16
MORE = {
  "dense": dict(attention__method="infllmv2", infllmv2__dense_length=20),
  "nsa_in_ssa": dict(attention__method="ssa", attention__sparse_method="nsa"),
  "nsa_beside_full": dict(attention__method="nsa", attention__layer_methods=("full", "nsa")),
  "full_that_runs_nsa": dict(attention__method="full", attention__sparse_method="nsa"),
  "everything": dict(attention__method="nosa", attention__num_blocks=8),
}


def make(name, **changes):
  return caches.for_decoding(small.make_model(**(METHODS | MORE)[name] | changes))


def choose(transformer, stream, lengths=()):
  return prompt_backends.choose(
    transformer.options,
    stream,
    caches.room(transformer, batch=1, length=LENGTH),
    num_heads=transformer.shape.num_attention_heads,
    chunk=CHUNK,
    lengths=lengths,
  )


@pytest.mark.parametrize(
  ("name", "stream"),
  [*STREAMS, *((name, stream) for name in MORE for stream in ("full", "sparse"))],
)
@pytest.mark.parametrize("length", [None, 3])
def test_what_runs_was_said_before(name, stream, length, monkeypatch):
  """Of prompts as long as a row, and of those so short that a block has room for them."""
  transformer = make(name)
  said = [choice.op for choice in choose(transformer, stream, (length,) if length else ())]
  assert len(set(said)) == len(said)
  ran, choose_one = set(), dispatch.choose

  def remember(op, *args, **options):
    ran.add(op)
    return choose_one(op, *args, **options)

  monkeypatch.setattr(dispatch, "choose", remember)
  run = functools.partial(
    prefill.prefill,
    transformer,
    stream=stream,
    room=caches.room(transformer, batch=1, length=LENGTH),
    chunk=CHUNK,
  )
  params = small.shapes_of_params(transformer)
  ids = jax.ShapeDtypeStruct((1, length or LENGTH), jnp.int32)
  ran.clear()
  jax.eval_shape(run, params, ids, jax.ShapeDtypeStruct((1,), jnp.int32))
  # Attention to windows is attention of a chunk of them.
  assert {op.removeprefix("compressed_") for op in said} == ran


def test_short_and_long_prompts_are_both_asked_about():
  transformer = make("moba")
  ops = [
    {choice.op for choice in choose(transformer, "sparse", lengths)}
    for lengths in ((4,), (LENGTH,), (4, LENGTH))
  ]
  assert ops[0] & ops[1] == set()
  assert ops[2] == ops[0] | ops[1]


def test_kernels_alone_are_refused_without_a_gpu():
  transformer = make("nsa", attention__kernels="strict")
  with pytest.raises(errors.ConfigError) as caught:
    choose(transformer, "sparse")
  said = str(caught.value).splitlines()
  assert [line.partition(" can run ")[2].partition(" ")[0] for line in said] == [
    "block_selection",
    "block_sparse_attention",
    "compressed_chunk_attention",
    "sliding_window_chunk_attention",
  ]
  assert all(line.startswith("attention.kernels='strict': no GPU kernel") for line in said)
