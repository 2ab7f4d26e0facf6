"""The benchmark's lists and counts; what it times needs a GPU."""

import dataclasses
import fcntl
import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
  benchmark,
  benchmark_check,
  benchmark_clock,
  benchmark_lists,
  benchmark_passes,
  devices,
)
from pallas_kernels.benchmark_shape import Shape

T, BLOCK, M = 128, 16, 3


def make(kind):
  q = jax.random.normal(jax.random.key(0), (2, T, 4, 8))
  k = jax.random.normal(jax.random.key(1), (2, T, 2, 8))
  return benchmark_lists.make_lists(kind, q, k, block_size=BLOCK, num_blocks=M)


@pytest.mark.parametrize("kind", ["independent", "clustered", "steady", "exact"])
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


def mean_union(blocks, tile):
  lists = np.asarray(blocks[0, :, 0]).reshape(-1, tile * M)
  return np.mean([len(set(x[x >= 0])) for x in lists])


def test_neighbours_agree_more_in_clustered_lists():
  far, near, nearest = (
    mean_union(make(kind), 8) for kind in ("independent", "clustered", "steady")
  )
  assert M <= nearest < near < far


def test_pairs_are_those_of_the_causal_mask():
  blocks = jnp.array([[[[0, -1]], [[0, 1]], [[1, 0]], [[1, 5]]]])  # B=1, T=4, K=1, M=2
  # Blocks of 2 keys: 1, 2 (block 1 is ahead), 1 + 2, and 2 keys.
  assert benchmark_lists.num_pairs(blocks, 2) == 1 + 2 + 3 + 2


def test_lists_from_a_file(tmp_path):
  lists = np.zeros((T, M), np.int32)
  np.save(tmp_path / "lists.npy", lists)
  np.testing.assert_array_equal(make(str(tmp_path / "lists.npy"))[1, :, 1], lists)
  layers = np.arange(3)[:, None, None, None] + np.zeros((3, T, 2, M), np.int32)
  layers[:, :, 1] += 10
  np.save(tmp_path / "layers.npy", layers)
  np.testing.assert_array_equal(make(f"{tmp_path}/layers.npy:2")[1], layers[2])
  np.save(tmp_path / "short.npy", lists[:5])
  with pytest.raises(ValueError, match=r"holds \(5, 3\), not \(128, 3\) or \(128, 2, 3\)"):
    make(str(tmp_path / "short.npy"))
  with pytest.raises(ValueError, match="'nothing' is none of independent, clustered, steady"):
    make("nothing")


def test_where_it_cannot_run_it_says_so(capsys):
  if jax.devices()[0].platform == "gpu":
    pytest.skip("this is a GPU")
  assert benchmark.main([]) == 2
  assert "the benchmark needs a Hopper GPU, this is cpu" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    benchmark.main(["ssa_9k"])
  assert "no shape 'ssa_9k'; there are ssa_2k" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    benchmark.main(["--what=op,all"])
  assert "--what=all is none of kernels, op" in capsys.readouterr().err


def test_passes_are_built_as_on_a_gpu(monkeypatch):
  """Everything but running: arguments, shapes and implementations fit together."""
  monkeypatch.setattr(devices, "why_not_hopper", lambda: None)
  monkeypatch.setattr(devices, "num_multiprocessors", lambda: 132)
  shape = Shape(1, 96, 32, 2, 64, 16, 4)
  arrays, timed = benchmark_passes.inputs(shape), set()
  for p in benchmark_passes.passes(shape, set(benchmark_passes.GROUPS) - {"mosaic"}):
    timed |= {p.what} if p.dense else set()
    assert {*p.args, *p.moved} <= arrays.keys()
    if not p.what.startswith("dual path"):  # its dense stream is cuDNN's
      arrays[p.what] = jax.eval_shape(p.function, *(arrays[name] for name in p.args))
  assert arrays["selection"].shape == (1, 96, 2, 4)
  assert arrays["selection and lists of query tiles"].count_RX.shape == (2, 8)
  assert arrays["op, forward"] == arrays["forward"][0] == arrays["q"]
  gradients = [arrays[name] for name in ("q", "k", "v")]
  for what in ("op", "op in XLA", "sparse layer"):
    assert [*arrays[f"{what}, forward and backward"]] == gradients
  assert [arrays["dq"][0], *arrays["dk dv, adding parts"][:2]] == gradients
  assert len(timed) == 6 + 2 + 2 + 2 + 2


def test_a_time_is_that_of_kernels_alone():
  def plane(name, **lines):
    events = {k: [SimpleNamespace(duration_ns=x) for x in v] for k, v in lines.items()}
    return SimpleNamespace(
      name=name, lines=[SimpleNamespace(name=k, events=v) for k, v in events.items()]
    )

  gpu = plane("/device:GPU:0", **{"Stream #1": [3, 4], "XLA Modules": [100], "Stream #2": [5]})
  planes = [plane("/host:CPU", **{"Stream #1": [1000]}), gpu]
  assert benchmark_clock.busy(planes) == 3 + 4 + 5
  with pytest.raises(RuntimeError, match="no kernel of a GPU"):
    benchmark_clock.busy(planes[:1])


def test_results_are_those_of_the_function():
  timed = benchmark_clock.Timed(lambda x, y: (x + y, x), *[jnp.zeros(3)] * 2)
  total, same = timed.result(jnp.arange(3.0), jnp.ones(3))
  np.testing.assert_array_equal(total, [1, 2, 3])
  np.testing.assert_array_equal(same, [0, 1, 2])
  if jax.devices()[0].platform == "cpu":
    with pytest.raises(RuntimeError, match="no kernel of a GPU"):
      timed.milliseconds(jnp.arange(3.0), jnp.ones(3))


@pytest.mark.gpu
def test_times_are_those_of_the_work():
  x = jnp.ones((2048, 2048), jnp.bfloat16)

  def power(n, x):
    return functools.reduce(jnp.matmul, [x] * n)

  once, often = (
    benchmark_clock.Timed(functools.partial(power, n), x).milliseconds(x) for n in (2, 11)
  )
  assert 5 * once < often < 20 * once


def test_turns_do_not_overlap(tmp_path):
  with (tmp_path / "turns").open("w") as other:
    with benchmark_clock.turn(tmp_path / "turns"), pytest.raises(BlockingIOError):
      fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
  with benchmark_clock.turn(None):
    pass


def test_a_shape_is_saved_in_a_file_of_its_own(tmp_path):
  row = benchmark.Row("ssa_8k", "clustered", "forward", 0.2, ratio=0.15)
  path = benchmark.save(tmp_path / "new", "ssa_8k", [row])
  assert path.name.endswith("_ssa_8k.json")
  content = json.loads(path.read_text())
  assert content["shape"]["length"] == 8192
  assert content["rows"] == [dataclasses.asdict(row)]
  assert {"device", "commit", "command", "versions"} <= content["environment"].keys()


@pytest.mark.gpu
def test_errors_are_measured_before_anything_is_timed():
  for name in benchmark.DEFAULT:
    errors = benchmark_check.Check(benchmark.SHAPES[name]).errors("clustered")
    assert errors.keys() == {"lists", "out", "lse", "dq", "dk", "dv"}
