"""What a cache of blocks has to load, counted by hand, and lists recorded from a model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from sparsejax import errors
from sparsejax.decoding import cache as caches
from sparsejax.decoding import prefill
from sparsejax.diagnostics import seen
from sparsejax.evaluation import contexts, locality, table
from sparsejax.evaluation import request as requests
from tests.sparsejax.evaluation import nosa as checkpoint

CONTEXT, STEPS = 45, 6


@pytest.fixture(scope="module")
def nosa(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "nosa"
  checkpoint.save(workdir)
  return checkpoint.load(workdir)


def test_recorded_lists_are_those_of_decoding(nosa):
  lists_SLBKM = locality.record(nosa, CONTEXT, num_rows=2, num_steps=STEPS)
  assert lists_SLBKM.shape == (STEPS, 2, 2, 2, 4)
  ids_BT = jnp.asarray(contexts.rows(nosa, 2, CONTEXT + STEPS))
  transformer = caches.for_decoding(nosa.transformer)
  room = caches.room(transformer, batch=2, length=CONTEXT + STEPS)
  lengths = jnp.full(2, CONTEXT)
  _, cache = prefill.prefill(
    transformer, nosa.params, ids_BT[:, :CONTEXT], lengths, stream="sparse", room=room
  )

  @jax.jit
  def step(cache, ids_B):
    output, shown = transformer.apply(
      {"params": nosa.params},
      ids_B[:, None],
      cache.lengths_B[:, None],
      jnp.ones_like(ids_B)[:, None],
      stream="sparse",
      cache=cache,
      mutable=["intermediates"],
    )
    return seen.by_place(shown, "pages")[0], output.cache

  for number in range(STEPS):
    lists_LBKM, cache = step(cache, ids_BT[:, CONTEXT + number])
    expected = np.sort(lists_SLBKM[number], -1)
    np.testing.assert_array_equal(np.sort(lists_LBKM, -1), expected)


def test_hits_and_misses_are_counted_once_slots_are_full(nosa):
  """One layer, row and head; lists of two."""
  steps = [[0, 1], [1, 2], [0, 1], [2, 1], [3, 0], [1, 3]]
  lists = np.array(steps, np.int32).reshape(6, 1, 1, 1, 2)
  exact, spare = locality.run(nosa.transformer.options, lists, 100, [0, 1])
  # With two slots: 2 in for 0 (kept 1), then 3 and 0, then 1 for 0.
  assert (exact.misses, exact.most_misses) == ((1 + 2 + 1) / 3, 2)
  assert exact.hit_rate == pytest.approx(2 / 6)
  # With three, 0, 1 and 2 are there at the fourth; 3 drives out 1, which then comes back.
  assert (spare.misses, spare.most_misses) == ((0 + 1 + 1) / 3, 1)
  assert exact.gamma == pytest.approx(np.mean([0.5, 0.5, 0.5, 0.0, 0.5]))
  assert (exact.least_gamma, exact.bound) == (0.0, 2)
  assert exact.misses_by_layer == ((exact.misses,),)
  # There is no layer before the only one.
  assert (exact.foreseen, exact.moved_in_vain) == (None, None)


def test_what_the_layer_before_foresees_is_counted(nosa):
  """Three layers, two rows, one head; lists of two at four steps, of which the last count."""
  row = [
    [[0, 1], [0, 1], [2, 6], [2, 4]],
    [[0, 1], [0, 1], [2, 5], [1, 5]],
    [[5, 6], [5, 6], [5, 6], [1, 6]],
  ]
  # Nothing is loaded, and an empty slot of a list is neither foreseen nor moved.
  quiet = [
    [[8, 9], [8, 9], [8, -1], [8, 9]],
    [[8, 9], [8, 9], [8, -1], [8, 9]],
    [[8, 9], [8, 9], [8, 9], [8, 9]],
  ]
  lists = np.array([row, quiet], np.int32).transpose(2, 1, 0, 3)[:, :, :, None]
  exact, spare = locality.run(nosa.transformer.options, lists, 100, [0, 1])
  # Layer 1 misses 2 and 5, then 1; layer 2 misses 1. Foreseen are 2 and the latter 1.
  # Of layer 0, 6 and 4 are moved in vain, 2 is there at the last step; of layer 1, 2 is moved.
  assert (exact.foreseen, exact.moved_in_vain) == (2 / 4, 3 / 8)
  assert exact.misses == (3 + 3 + 1) / 12
  # With three slots, layer 1 still has 1 at the last step.
  assert (spare.foreseen, spare.moved_in_vain) == (2 / 3, 3 / 8)


def test_the_bound_of_nosa_holds(nosa):
  lists = locality.record(nosa, CONTEXT, num_rows=2, num_steps=16)
  (cell,) = locality.run(nosa.transformer.options, lists, CONTEXT, [0])
  assert 0 < cell.most_misses <= cell.bound == 2


def test_what_chooses_no_blocks_is_refused(nosa):
  options = dataclasses.replace(nosa.transformer.options, method="sliding_window")
  windowed = dataclasses.replace(nosa, transformer=nosa.transformer.clone(options=options))
  with pytest.raises(errors.ConfigError, match="does not choose blocks in every layer of rows"):
    locality.record(windowed, CONTEXT, num_rows=1, num_steps=2)


def test_more_rows_than_there_is_text_are_refused(nosa):
  with pytest.raises(errors.DataError, match=r"rows of 51 tokens are more than the \d+ tokens"):
    locality.record(nosa, CONTEXT, num_rows=10**6, num_steps=STEPS)


def test_rows_of_text_go_on_where_the_one_before_ended(nosa):
  (whole,) = contexts.rows(nosa, 1, 150)
  parts = contexts.rows(nosa, 3, 50)
  np.testing.assert_array_equal(parts.reshape(-1), whole)


def test_every_budget_has_lists_of_its_own(tmp_path):
  checkpoint.save(tmp_path / "run")
  request = requests.Request(
    path=tmp_path / "run", tasks=("locality",), budgets=(24, 40), num_steps=8, spare=(0,)
  )
  _, out = table.run(request, base.get_config())
  cells = json.loads((out / "locality.json").read_text())["cells"]
  assert [cell["budget"] for cell in cells] == [24, 40]
  assert len({cell["misses"] for cell in cells}) == 2
  for budget in (24, 40):
    (path,) = (out / f"lists_{budget}").glob("*.npy")
    assert np.load(path).shape[-1] == budget // 8
