"""Checkpoints: exact, atomic, kept by rule, and distrusted until their sums agree."""

import json
import pathlib
import shutil
import subprocess
import sys

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import checkpoint, errors, sharding


@flax.struct.dataclass
class State:
  step: jax.Array
  params: dict


RECORD = checkpoint.Record(
  next_row=12, corpus="c0ffee", config={"seed": 1, "data.sources": ["a"]}, tokenizer="byte-1"
)


def make_state(step, seed=0):
  rng = np.random.default_rng(seed + step)
  params = {
    "w": rng.normal(size=(8, 6)).astype(np.float32),
    "b": {"c": np.arange(3.0, dtype="f4")},
  }
  return State(jnp.int32(step), jax.tree.map(jnp.asarray, params))


def make_abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def make_checkpoints(path, **changes):
  return checkpoint.Checkpoints(
    path, **dict(keep_latest=2, keep_every=0, keep_best=0) | changes
  )


def save_all(path, steps, losses=(), **changes):
  checkpoints = make_checkpoints(path, **changes)
  for i, step in enumerate(steps):
    loss = losses[i] if losses else None
    checkpoints.save(make_state(step), RECORD, validation_loss=loss, wait=True)
  checkpoints.close()
  return checkpoints


def spoil_a_sum(path):
  """As if a bit of the array had changed where Orbax does not look."""
  file = path / "_CHECKPOINT_METADATA"
  content = json.loads(file.read_text())
  content["custom_metadata"]["checksums"]["params/w"] ^= 1
  file.write_text(json.dumps(content))


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_what_was_saved_comes_back(tmp_path):
  save_all(tmp_path, [3])
  checkpoints = make_checkpoints(tmp_path)
  restored = checkpoints.restore(make_abstract(make_state(0)))
  assert restored.step == 3
  assert restored.record == RECORD
  assert_same(restored.state, make_state(3))
  checkpoints.close()


def test_nothing_there_is_none(tmp_path):
  checkpoints = make_checkpoints(tmp_path)
  assert checkpoints.restore(make_abstract(make_state(0))) is None
  checkpoints.close()


@pytest.mark.parametrize(
  ("rules", "kept"),
  [
    (dict(keep_latest=2), [5, 6]),
    (dict(keep_latest=1, keep_every=3), [3, 6]),
    (dict(keep_latest=1, keep_best=2), [2, 4, 6]),
  ],
)
def test_retention(tmp_path, rules, kept):
  losses = [5.0, 1.0, 4.0, 2.0, 3.0, 9.0]
  assert save_all(tmp_path, [1, 2, 3, 4, 5, 6], losses, **rules).steps == kept


def test_a_step_without_validation_is_not_among_the_best(tmp_path):
  losses = [None, 3.0, None, None]
  assert save_all(tmp_path, [1, 2, 3, 4], losses, keep_latest=1, keep_best=1).steps == [2, 4]


def test_saving_does_not_wait_and_takes_a_copy(tmp_path):
  """What is written is the state at the call, even if its buffers are given away at once."""
  checkpoints = make_checkpoints(tmp_path)
  state = make_state(1)
  expected = jax.device_get(state)
  checkpoints.save(state, RECORD)
  advance = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
  advance(state)
  checkpoints.close()
  again = make_checkpoints(tmp_path)
  assert_same(again.restore(make_abstract(make_state(1))).state, expected)
  again.close()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "sums", "record", "empty"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
  save_all(tmp_path, [1, 2])
  newest = tmp_path / "2"
  data = max((newest / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
  match damage:
    case "flip":
      content = bytearray(data.read_bytes())
      content[len(content) // 2] ^= 1
      data.write_bytes(content)
    case "truncate":
      data.write_bytes(data.read_bytes()[:-40])
    case "remove":
      data.unlink()
    case "sums":
      spoil_a_sum(newest)
    case "record":
      (newest / "_CHECKPOINT_METADATA").write_text("{")
    case "empty":
      (tmp_path / "9").mkdir()
  checkpoints = make_checkpoints(tmp_path)
  restored = checkpoints.restore(make_abstract(make_state(0)))
  assert restored.step == (2 if damage == "empty" else 1)
  assert_same(restored.state, make_state(restored.step))
  checkpoints.set_aside_newer_than(restored.step)
  assert checkpoints.steps == ([1, 2] if damage == "empty" else [1])
  # The damaged step can be taken, and saved, again.
  checkpoints.save(make_state(9 if damage == "empty" else 2), RECORD, wait=True)
  checkpoints.close()
  assert list(tmp_path.glob("*.corrupt"))


def test_only_damaged_checkpoints_are_an_error(tmp_path):
  save_all(tmp_path, [1])
  for file in (tmp_path / "1" / "state").rglob("d/*"):
    file.unlink()
  checkpoints = make_checkpoints(tmp_path)
  with pytest.raises(errors.CheckpointError, match=r"no checkpoint in .* can be read"):
    checkpoints.restore(make_abstract(make_state(0)))
  checkpoints.close()


@pytest.mark.parametrize("change", ["shape", "dtype", "missing", "extra"])
def test_another_model_is_refused_by_name(tmp_path, change):
  """Orbax would cast a dtype in silence, and say of the rest only that a handler failed."""
  save_all(tmp_path, [1])
  params = dict(make_state(0).params)
  match change:
    case "shape":
      params["w"] = jnp.zeros((8, 7))
    case "dtype":
      params["w"] = params["w"].astype(jnp.bfloat16)
    case "missing":
      del params["w"]
    case "extra":
      params["v"] = jnp.zeros(3)
  checkpoints = make_checkpoints(tmp_path)
  with pytest.raises(errors.CheckpointError, match=r"is of another model:\n  params/[vw]: "):
    checkpoints.restore(make_abstract(State(jnp.int32(0), params)))
  checkpoints.close()


def test_it_comes_back_on_other_devices(tmp_path):
  eight = sharding.make_mesh(data=1, fsdp=4, tensor=2)
  spec = jax.sharding.PartitionSpec("fsdp", "tensor")
  rows = jax.sharding.NamedSharding(eight, spec)
  state = make_state(1)
  state = state.replace(params=state.params | {"w": jax.device_put(state.params["w"], rows)})
  checkpoints = make_checkpoints(tmp_path)
  checkpoints.save(state, RECORD, wait=True)
  restored = checkpoints.restore(make_abstract(make_state(0)))
  checkpoints.close()
  assert_same(restored.state, make_state(1))
  assert len(restored.state.params["w"].sharding.device_set) == 1


def test_checksums_see_every_bit_and_every_place():
  state = make_state(1)
  clean = checkpoint.checksums(state)
  for change in (
    lambda w: w.at[3, 2].set(-w[3, 2]),
    lambda w: w[::-1],
    lambda w: w.T.reshape(w.shape),
    lambda w: w.at[0, 0].set(jnp.nextafter(w[0, 0], 9.0)),
  ):
    changed = state.replace(params=state.params | {"w": change(state.params["w"])})
    differing = {k for k, v in checkpoint.checksums(changed).items() if v != clean[k]}
    assert differing == {"params/w"}


def test_parameters_alone(tmp_path):
  save_all(tmp_path / "checkpoints", [1, 2])
  path = checkpoint.find(tmp_path)
  assert path.name == "2"
  assert checkpoint.find(tmp_path, 1).name == checkpoint.find(path.parent / "1").name == "1"
  # A run has the name of its directory.
  assert checkpoint.find(path / ".." / "..") == path
  params = checkpoint.load_params(path, make_abstract(make_state(0).params))
  assert_same(params, make_state(2).params)
  shapes = jax.eval_shape(lambda: make_state(2).params)
  assert checkpoint.describe_params(path) == shapes
  with pytest.raises(errors.CheckpointError, match="has no step 7; it has"):
    checkpoint.find(tmp_path, 7)
  assert checkpoint.find(path, int(path.name)) == path
  with pytest.raises(errors.CheckpointError, match="is one checkpoint, and step=7 asks for an"):
    checkpoint.find(path, 7)
  with pytest.raises(errors.CheckpointError, match="holds no checkpoint"):
    checkpoint.find(tmp_path / "elsewhere")
  wrong = make_abstract({"w": jnp.zeros((8, 6)), "b": {"d": jnp.zeros(3)}})
  with pytest.raises(errors.CheckpointError, match=r"params/b/c: float32\[3\] saved, absent"):
    checkpoint.load_params(path, wrong)


def test_damaged_parameters_are_refused(tmp_path):
  save_all(tmp_path, [1, 2])
  data = max((tmp_path / "1" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
  data.unlink()
  spoil_a_sum(tmp_path / "2")
  for step, reason in ((1, "cannot be read"), (2, "checksum of params/w differs")):
    with pytest.raises(errors.CheckpointError, match=f"is damaged: .*{reason}"):
      checkpoint.load_params(tmp_path / str(step), make_abstract(make_state(0).params))


def test_another_schema_is_refused(tmp_path):
  save_all(tmp_path, [1])
  file = tmp_path / "1" / "_CHECKPOINT_METADATA"
  content = json.loads(file.read_text())
  content["custom_metadata"]["schema"] = 99
  file.write_text(json.dumps(content))
  with pytest.raises(errors.CheckpointError, match="schema 99; this version reads 1"):
    checkpoint.read_record(tmp_path / "1")


def test_a_disk_too_small_is_refused_at_the_start(tmp_path):
  """Room is needed for those kept and for one being written."""
  free = shutil.disk_usage(tmp_path).free
  big = jax.ShapeDtypeStruct((int(free / 3.5),), jnp.uint8)
  checkpoint.check_space(tmp_path, big, 2)
  with pytest.raises(errors.CheckpointError, match=r"4 checkpoints take .* free. Make room"):
    checkpoint.check_space(tmp_path, big, 3)


# Writes nothing beyond the limit, as a full disk would.
FULL_DISK = """
import resource, signal, sys
import jax.numpy as jnp, numpy as np
from tests.sparsejax import test_checkpoint as t
from sparsejax import errors

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints = t.make_checkpoints(sys.argv[1])
checkpoints.save(t.make_state(1), t.RECORD, wait=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
noise = jnp.asarray(np.random.default_rng(0).normal(size=(400, 400)).astype("f4"))
big = lambda step: t.State(jnp.int32(step), {"w": noise})
checkpoints.save(big(2), t.RECORD, wait=True)
assert checkpoints.has_failed, "the failure was not noticed"
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
checkpoints.save(big(3), t.RECORD, wait=True)
assert not checkpoints.has_failed, "the disk had room again"
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
  for step in (4, 5, 6, 7):
    checkpoints.save(big(step), t.RECORD, wait=True)
except errors.CheckpointError as error:
  assert "3 saves in a row have failed" in str(error), error
  print("gave up at", step, "with", checkpoints.steps)
"""


def test_a_full_disk_is_survived_until_it_stays_full(tmp_path):
  """Training goes on, earlier steps stay, a later try succeeds; three failures stop it."""
  root = pathlib.Path(__file__).parents[2]
  done = subprocess.run(
    [sys.executable, "-c", FULL_DISK, str(tmp_path)],
    capture_output=True,
    text=True,
    cwd=root,
    timeout=120,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert "gave up at 6 with [1, 3]" in done.stdout
