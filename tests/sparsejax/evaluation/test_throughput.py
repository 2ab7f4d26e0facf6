"""What is decoded, counted and written where decoding is timed; no test looks at times."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from sparsejax import decode_shapes, errors, sharding
from sparsejax.decoding import cache as caches
from sparsejax.decoding import generate, sampling
from sparsejax.evaluation import contexts, decode_timing, kernel_times, table, throughput
from sparsejax.evaluation import request as requests
from sparsejax.evaluation import subject as subjects
from tests import small
from tests.sparsejax.evaluation import nosa

CONTEXT, STEPS, WARM = 20, 8, 3


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  found = tmp_path_factory.mktemp("runs") / "nosa"
  nosa.save(found)
  return found


@pytest.fixture(autouse=True)
def few_warm_steps(monkeypatch):
  monkeypatch.setattr(throughput, "WARM_STEPS", WARM)


def short_request(workdir, out, **more):
  options = dict(lengths=(CONTEXT,), num_steps=2, out=out) | more
  return requests.Request(path=workdir, tasks=("throughput",), **options)


def test_every_mode_budget_length_and_place_of_pages_has_a_cell(workdir):
  cells = throughput.run(
    nosa.load(workdir),
    modes=("full", "sparse"),
    budgets=(32, 40),
    lengths=(CONTEXT,),
    num_rows=2,
    spare=(1,),
    num_steps=STEPS,
  )
  asked = [(c.mode, c.budget, c.context, c.num_slots) for c in cells]
  assert asked == [
    *[("full", None, length, None) for length in (CONTEXT,)],
    *[
      ("sparse", budget, length, slots)
      for budget in (32, 40)
      for length in (CONTEXT,)
      # Blocks of 8: no more slots than there are pages.
      for slots in (None, min(budget // 8 + 1, -(-(length + WARM + STEPS) // 8)))
    ],
  ]
  for cell in cells:
    assert (cell.method, cell.batch, cell.num_steps) == ("nosa", 2, STEPS)
    assert cell.tokens_per_second > 0
    assert "pages: " in cell.backends[0]
    assert (cell.host_bytes > 0) == (cell.misses is not None) == (cell.num_slots is not None)
  sizes = {name: i for i, name in enumerate(decode_timing.rows(cells)[0])}
  for cell, row in zip(cells, decode_timing.rows(cells)[1:], strict=True):
    assert row[sizes["KV on device"]] == caches.in_words(cell.device_bytes)
    # Small ones in small units; none where pages have no place on the host.
    expected = "-" if cell.num_slots is None else f"{cell.host_bytes / 2**10:.2f} KiB"
    assert row[sizes["KV on host"]] == expected


def make_decoder(subject, rows):
  return generate.Decoder(
    subject.transformer,
    subject.params,
    stream="sparse",
    mesh=subject.mesh,
    sampling=sampling.Sampling(temperature=0),
    seed=0,
    num_ids=None,
    rows=rows,
    length=CONTEXT + WARM + STEPS,
  )


def test_steps_continue_the_text(workdir):
  """What is timed is decoding: the cache afterwards is that of greedy text."""
  subject = nosa.load(workdir)
  decoder = make_decoder(subject, rows=2)
  prompts = contexts.rows(subject, 2, CONTEXT)
  first = [decoder.begin(row, prompt.tolist(), row) for row, prompt in enumerate(prompts)]
  _, cache = decode_timing.measure(
    subject.transformer,
    decoder.params,
    decoder.cache,
    jnp.asarray(first, jnp.int32),
    stream="sparse",
    mesh=subject.mesh,
    num_steps=STEPS,
    num_warm=WARM,
  )
  np.testing.assert_array_equal(cache.lengths_B, CONTEXT + WARM + STEPS)
  texts = generate.generate(
    subject.transformer,
    subject.params,
    prompts.tolist(),
    max_new_tokens=WARM + STEPS,
    stream="sparse",
    mesh=subject.mesh,
    sampling=sampling.Sampling(temperature=0),
  )
  whole = np.concatenate([prompts, texts], axis=1)
  for row, ids in enumerate(whole):
    again = make_decoder(subject, rows=1)
    again.begin(0, ids.tolist(), 0)
    # By layer, row, key head and token, of which the last page has room for more.
    k = np.asarray(cache.arrays[0]["k"]).reshape(2, 2, 2, -1, 8)[:, row]
    expected = np.asarray(again.cache.arrays[0]["k"]).reshape(k.shape)
    np.testing.assert_allclose(k[:, :, : len(ids)], expected[:, :, : len(ids)], atol=2e-4)


def test_no_row_is_full_while_it_is_timed(workdir, monkeypatch):
  """Rows that are full take no token: what is timed would not be decoding."""
  lengths, measure = [], decode_timing.measure

  def remember(*args, **options):
    cell, cache = measure(*args, **options)
    lengths.append((int(cache.lengths_B.max()), cache.room.length))
    return cell, cache

  monkeypatch.setattr(decode_timing, "measure", remember)
  # The context ends with a page, and either kind of steps alone within the next one.
  options = dict(modes=("full",), lengths=(24,), num_rows=1, num_steps=6)
  throughput.run(nosa.load(workdir), **options)
  assert lengths == [(24 + WARM + 6, 40)]


def recorded_cell(lists, num_steps, num_traced=0, **config):
  """Of a cache with four slots for pages of 8, whose tokens read what `lists` says."""
  config = dict(attention__num_blocks=4, nosa__num_query_aware=1) | config
  transformer = small.make_model(attention__method="nosa", **config)
  mesh = nosa.one_device()
  length = 64
  room = caches.room(transformer, batch=2, length=length, num_slots=4)
  spec = caches.spec(transformer, "sparse", room)
  cache = decode_shapes.random_cache(spec, 40, seed=0)
  cell, _ = decode_timing.measure(
    transformer,
    jax.device_put(small.make_params(transformer), sharding.replicated(mesh)),
    cache,
    jnp.zeros(2, jnp.int32),
    stream="sparse",
    mesh=mesh,
    num_steps=num_steps,
    num_warm=4,
    num_traced=num_traced,
    lists_SLBKM=jnp.asarray(lists, jnp.int32),
  )
  return cell


def test_recorded_lists_are_read_in_place_of_those_that_are_chosen():
  """Two lists in turn, which share two pages; the token's own, 5, among them."""
  lists = [[0, 1, 2, 5], [3, 4, 2, 5]]
  cell = recorded_cell(np.reshape(lists, (2, 1, 1, 1, 4)), num_steps=4)
  assert cell.misses == 2.0
  assert cell.hit_rate == 0.5
  page = 2 * 8 * 8 * 4 + 8 * 4  # keys and values of 8 numbers, and biases, of 8 tokens
  assert cell.fetched_bytes == 2 * 2 * 2 * page  # misses, layers, heads
  # From 44 tokens to 48: one page is full for each layer and head.
  assert cell.written_bytes == 2 * 2 * page / 4


def test_pages_of_methods_in_turn_are_counted_by_what_each_has():
  """MoBA's have no biases; both miss two pages of four at every step."""
  lists = np.reshape([[0, 1, 2, 5], [3, 4, 2, 5]], (2, 1, 1, 1, 4))
  cell = recorded_cell(lists, num_steps=4, attention__layer_methods=("nosa", "moba"))
  assert cell.misses == 2.0
  keys_and_values, biases = 2 * 8 * 8 * 4, 8 * 4
  assert cell.fetched_bytes == 2 * 2 * (2 * keys_and_values + biases)  # misses, heads
  assert cell.written_bytes == 2 * (2 * keys_and_values + biases) / 4


def test_the_rate_of_fetching_is_of_the_steps_that_were_traced(monkeypatch):
  """Their bytes by their time: the one traced misses a page, the three timed before it four."""

  def trace(run, num_steps):
    run()
    names = "fetch_pages_mosaic_gpu_kernel", "write_pages_mosaic_gpu_kernel", "fusion"
    return [kernel_times.KernelTime(name, 40.0 / num_steps, 2.0) for name in names]

  monkeypatch.setattr(kernel_times, "of_steps", trace)
  lists = [[0, 1, 2, 5], [3, 4, 2, 5], [3, 4, 2, 5], [3, 4, 1, 5]]
  # Warm until step 3, timed until step 6, which two pages, two and none are missed at.
  lists = np.reshape(lists[:2] * 2 + lists, (8, 1, 1, 1, 4))
  cell = recorded_cell(lists, num_steps=3, num_traced=1)
  page = 2 * 8 * 8 * 4 + 8 * 4
  assert cell.fetch_rate == pytest.approx(2 * 2 * 2 * page / 40e-6)  # rows, layers, heads
  assert cell.misses == pytest.approx(4 / 3)


def test_without_a_kernel_that_fetches_there_is_no_rate():
  other = [kernel_times.KernelTime("fusion", 5.0, 1.0)]
  assert decode_timing.fetch_rate(other, num_bytes=100, num_steps=1) is None
  assert decode_timing.fetch_rate([], num_bytes=0, num_steps=0) is None


def test_rows_are_as_many_as_fit():
  transformer = small.make_model()
  room = caches.room(transformer, batch=1, length=64)
  size = 3 * caches.num_bytes(caches.spec(transformer, "full", room))
  rows = [
    decode_timing.rows_within(transformer, "full", 64, None, size - less) for less in (1, 0)
  ]
  assert rows == [2, 3]
  with pytest.raises(errors.ConfigError, match=r"a row of 64 tokens takes .* KiB on"):
    decode_timing.rows_within(transformer, "full", 64, None, 10)


def test_a_request_leaves_a_table_json_and_a_picture(workdir, tmp_path):
  # One row on each device.
  request = short_request(workdir, tmp_path, modes=("sparse",), batch_size=8)
  text, _ = table.run(request, base.get_config())
  assert "| nosa   | sparse    | 32     |" in text
  (cell,) = json.loads((tmp_path / "throughput.json").read_text())["cells"]
  assert (cell["batch"], cell["num_steps"]) == (8, 2)
  assert (tmp_path / "throughput.png").stat().st_size > 1000


def test_without_matplotlib_the_table_is_kept_and_it_is_said(workdir, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  request = short_request(workdir, tmp_path, modes=("full",), batch_size=1)
  text, _ = table.run(request, base.get_config())
  assert "no picture: pictures need the package matplotlib; pip install -e '.[eval]' in" in text
  (cell,) = json.loads((tmp_path / "throughput.json").read_text())["cells"]
  assert (cell["mode"], cell["context"]) == ("full", CONTEXT)


@pytest.mark.parametrize(
  ("kv_gib", "spare", "message"),
  [
    (
      (0.001, 10.0),
      (),
      r"rows of 20 tokens are more than the \d+ tokens of the valid",
    ),
    ((), (0,), "pages in the host's memory .* take one device and not"),
    ((0.001, 1e-6), (), "a row of 60 tokens takes .*, more than the 1.05 KiB that were given"),
  ],
)
def test_what_one_cell_cannot_have_is_refused_before_any_is_measured(
  kv_gib, spare, message, workdir, tmp_path, monkeypatch
):
  monkeypatch.setattr(subjects.checkpoint, "load_params", None)
  request = short_request(
    workdir, tmp_path, num_steps=60 - CONTEXT - WARM, kv_gib=kv_gib, spare=spare
  )
  with pytest.raises(errors.UserError, match=message):
    table.run(request, base.get_config())


def test_every_cell_is_kept_by_itself(workdir, tmp_path, monkeypatch):
  """What was measured before one failed is not measured again."""
  asked, measure = [], throughput.measure

  def fail_later(subject, cell, num_steps):
    asked.append(cell.num_rows if cell.kv_gib is None else cell.kv_gib)
    if len(asked) == 2:
      raise errors.UserError("the device is gone")
    return measure(subject, cell, num_steps)

  monkeypatch.setattr(throughput, "measure", fail_later)
  request = short_request(workdir, tmp_path, modes=("full",), kv_gib=(0.0001, 0.0002))
  with pytest.raises(errors.UserError, match="the device is gone"):
    table.run(request, base.get_config())
  table.run(request, base.get_config())
  assert asked == [0.0001, 0.0002, 0.0002]


def test_pages_of_the_host_are_refused_over_several_devices(workdir):
  subject = subjects.load(workdir, base.get_config())
  with pytest.raises(errors.ConfigError, match=r"pages in .* take one device and not"):
    throughput.run(subject, modes=("sparse",), lengths=(CONTEXT,), spare=(0,), num_steps=2)


def test_shapes_are_decoded_without_a_checkpoint(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(sharding, "make_mesh", lambda **_: nosa.one_device())
  lists = tmp_path / "lists"
  lists.mkdir()
  np.save(lists / "100.npy", np.tile(np.arange(4, dtype=np.int32), (1, 1, 1, 2, 1)) + 3)
  given = ["--config=configs/smoke.py", "--contexts=100", "--rows=2", "--steps=2", "--spare=1"]
  more = ["--config.model.num_hidden_layers=2", f"--out={tmp_path}", "--trace=2"]
  status = decode_shapes.main([*given, "--methods=full,nosa", f"--lists=nosa={lists}", *more])
  assert status == 0
  out = capsys.readouterr().out
  assert "| nosa   | sparse    | 64     | 100     | 2    | 5     |" in out
  found = json.loads((tmp_path / "decode_shapes.json").read_text())
  assert (tmp_path / "decode_shapes.png").stat().st_size > 10_000
  assert found["lists"] == dict(full="chosen", nosa="recorded")
  assert [cell["method"] for cell in found["cells"]] == ["full", "nosa"]
  assert found["cells"][1]["hit_rate"] == 1.0


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--contexts=0", "--rows=1"], "--contexts takes whole numbers from 1 up; '0' is none"),
    ([], "give either --kv_gib or --rows"),
    (["--rows=1", "--kv_gib=1"], "give either --kv_gib or --rows"),
    (["--rows=1", "--lists=nosa="], "--lists=nosa= names no directory"),
    (["--rows=1", "--lists=nosa=/nowhere"], "--lists=nosa=/nowhere names no directory"),
    (["--rows=1", "--methods=nose"], "nose"),
    (["--rows=0"], "--rows=0 must be at least 1"),
    (["--rows=1", "--steps=0"], "--steps=0 must be at least 1"),
    (["--rows=1", "--spare=-1"], "--spare=-1 must be at least 0"),
    (["--kv_gib=0"], "--kv_gib=0.0 must be above 0"),
  ],
)
def test_shapes_that_make_no_sense_are_refused(arguments, message, capsys):
  assert decode_shapes.main(["--config=configs/smoke.py", *arguments]) == 2
  assert message in capsys.readouterr().err


def test_kernels_are_added_up_by_name(tmp_path):
  """Without a GPU there are none."""
  if jax.devices()[0].platform == "gpu":
    pytest.skip("this machine has a GPU")
  assert kernel_times.of_steps(lambda: jax.block_until_ready(jnp.ones(8) + 1), 1) == []
