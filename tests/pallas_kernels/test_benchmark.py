"""The benchmark's lists and counts; what it times needs a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import benchmark, benchmark_lists

T, BLOCK, M = 128, 16, 3


def make(kind):
  q = jax.random.normal(jax.random.key(0), (2, T, 4, 8))
  k = jax.random.normal(jax.random.key(1), (2, T, 2, 8))
  return benchmark_lists.make_lists(kind, q, k, block_size=BLOCK, num_blocks=M)


@pytest.mark.parametrize("kind", ["independent", "clustered", "exact"])
def test_lists_hold_the_own_block_and_no_later_one(kind):
  blocks = np.asarray(make(kind))
  assert blocks.shape == (2, T, 2, M)
  own = np.arange(T)[None, :, None, None] // BLOCK
  assert (blocks == own).any(-1).all()
  assert (blocks <= own).all()
  # As many as there are, each once.
  expected = np.broadcast_to(np.minimum(own + 1, M)[..., 0], (2, T, 2))
  np.testing.assert_array_equal((blocks >= 0).sum(-1), expected)
  for lists in blocks.reshape(-1, M)[:: T // 8]:
    there = lists[lists >= 0]
    assert len(set(there)) == len(there)


def test_neighbours_agree_more_in_clustered_lists():
  far, near = (
    benchmark_lists.mean_union(make(kind), 8) for kind in ("independent", "clustered")
  )
  assert M <= near < far


def test_pairs_are_those_of_the_causal_mask():
  blocks = jnp.array([[[[0, -1]], [[0, 1]], [[1, 0]], [[1, 5]]]])  # B=1, T=4, K=1, M=2
  # Blocks of 2 keys: 1, 2 (block 1 is ahead), 1 + 2, and 2 keys.
  assert benchmark_lists.num_pairs(blocks, 2) == 1 + 2 + 3 + 2


def test_lists_from_a_file(tmp_path):
  lists = np.zeros((T, M), np.int32)
  np.save(tmp_path / "lists.npy", lists)
  np.testing.assert_array_equal(make(str(tmp_path / "lists.npy"))[1, :, 1], lists)
  np.save(tmp_path / "short.npy", lists[:5])
  with pytest.raises(ValueError, match=r"holds \(5, 3\), not \(128, 3\)"):
    make(str(tmp_path / "short.npy"))
  with pytest.raises(ValueError, match="'nothing' is neither"):
    make("nothing")


def test_where_it_cannot_run_it_says_so(capsys):
  if jax.devices()[0].platform == "gpu":
    pytest.skip("this is a GPU")
  assert benchmark.main([]) == 2
  assert "the benchmark needs a Hopper GPU, this is cpu" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    benchmark.main(["ssa_9k"])
  assert "no shape 'ssa_9k'; there are ssa_8k" in capsys.readouterr().err


@pytest.mark.gpu
def test_errors_are_measured_before_anything_is_timed():
  for name in benchmark.DEFAULT:
    errors = benchmark.check(benchmark.SHAPES[name], "clustered")
    assert errors.keys() == {"out", "lse", "dq", "dk", "dv"}
