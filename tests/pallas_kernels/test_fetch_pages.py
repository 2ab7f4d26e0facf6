"""Pages between stores and slots: all implementations against loops in numpy, bit by bit.

The CPU has the memory kinds `device` and `pinned_host` as well, so that all but the kernel
runs here as it does on a GPU. The kernel's interpreter takes arrays in device memory alone,
and copies in its place; the instructions themselves only a GPU tests.
"""

import functools
import re

import jax
from jax import export
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.fetch_pages import mosaic_gpu
from tests.pallas_kernels.pages import P, R, S, large, make, make_lists, put


def move(sources, targets, from_R, to_R):
  """The definition: targets in numpy after the copies."""
  targets = [np.array(x) for x in targets]
  for a, b in zip(np.asarray(from_R), np.asarray(to_R), strict=True):
    if 0 <= a < len(sources[0]) and 0 <= b < len(targets[0]):
      for source, target in zip(sources, targets, strict=True):
        target[b] = source[a]
  return tuple(targets)


def assert_same_bits(actual, wanted):
  for a, w in zip(actual, wanted, strict=True):
    assert a.dtype == w.dtype
    a, w = (np.array(x).view(f"uint{8 * w.dtype.itemsize}") for x in (a, w))
    np.testing.assert_array_equal(a, w)


def is_interpreted(implementation):
  return implementation == "mosaic_gpu" and jax.devices()[0].platform != "gpu"


@functools.cache
def fetching(implementation):
  """A jitted fetch that donates its slots."""
  if is_interpreted(implementation):
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    fetch = functools.partial(mosaic_gpu.fetch_pages, interpret=interpret)
  else:
    fetch = functools.partial(pallas_kernels.fetch_pages, implementation=implementation)
  return jax.jit(fetch, donate_argnums=1)


@functools.cache
def writing(implementation):
  """A jitted write that donates its stores."""
  if is_interpreted(implementation):
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    write = functools.partial(mosaic_gpu.write_pages, interpret=interpret)
  else:
    write = functools.partial(pallas_kernels.write_pages, implementation=implementation)
  return jax.jit(write, donate_argnums=0)


FETCH = [
  ("resident", "device", 12),
  ("dma", "device", 12),
  ("dma", "pinned_host", 12),
  ("mosaic_gpu", "device", 4),
]
WRITE = [("resident", "device"), ("dma", "device"), ("dma", "pinned_host")]
WRITE_STEPS = [(*case, 12) for case in WRITE] + [("mosaic_gpu", "device", 4)]


@pytest.mark.parametrize(("implementation", "kind", "steps"), FETCH)
def test_fetched_slots_hold_the_pages_bit_by_bit(implementation, kind, steps):
  rng = np.random.default_rng(0)
  fetch = fetching(implementation)
  wanted_stores, wanted = make(P, rng), make(S, rng)
  stores, slots = put(wanted_stores, kind), put(wanted, "device")
  for _ in range(steps):
    pages, rows = make_lists(rng, "rows")
    wanted = move(wanted_stores, wanted, pages, rows)
    slots = fetch(stores, slots, pages, rows)
    assert_same_bits(slots, wanted)
    assert {x.sharding.memory_kind for x in slots} == {"device"}
  assert_same_bits(stores, wanted_stores)
  assert_no_race(implementation)


def assert_no_race(implementation):
  if is_interpreted(implementation):
    assert not gpu_callbacks.get_races().races_found
    gpu_callbacks.reset_gpu_interpret_mode_state()


@pytest.mark.parametrize(("implementation", "kind", "steps"), WRITE_STEPS)
def test_written_stores_hold_the_slots_and_nothing_else_changes(implementation, kind, steps):
  rng = np.random.default_rng(1)
  write = writing(implementation)
  wanted, wanted_slots = make(P, rng), make(S, rng)
  stores, slots = put(wanted, kind), put(wanted_slots, "device")
  for _ in range(steps):
    pages, rows = make_lists(rng, "pages")
    wanted = move(wanted_slots, wanted, rows, pages)
    stores = write(stores, slots, pages, rows)
    assert_same_bits(stores, wanted)
    assert {x.sharding.memory_kind for x in stores} == {kind}
  assert_same_bits(slots, wanted_slots)
  assert_no_race(implementation)


NOTHING = {  # pages and rows of lists that move nothing
  "no_pages": ([-1] * R, range(R)),
  "no_rows": (range(R), [S, -1] * (R // 2)),
  "never_both": ([-1, 2, P, 3, -1, 5], [1, -1, 2, S, 3, -1]),
  "empty": ([], []),
}


@pytest.mark.parametrize("lists", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize(("implementation", "kind"), WRITE)
def test_where_no_entry_means_anything_nothing_changes(implementation, kind, lists):
  rng = np.random.default_rng(2)
  stores, slots = make(P, rng), make(S, rng)
  lists = [jnp.asarray(list(x), jnp.int32) for x in lists]
  write, fetch = writing(implementation), fetching(implementation)
  assert_same_bits(write(put(stores, kind), put(slots, "device"), *lists), stores)
  assert_same_bits(fetch(put(stores, kind), put(slots, "device"), *lists), slots)


@pytest.mark.parametrize(("implementation", "kind"), WRITE)
def test_what_was_written_comes_back(implementation, kind):
  """Rows finish pages one by one; other slots then get them from the store."""
  rng = np.random.default_rng(3)
  write, fetch = writing(implementation), fetching(implementation)
  finished = make(S, rng)
  stores, slots = put(make(P, rng), kind), put(finished, "device")
  for row in range(S):
    pages = np.full(S, -1, np.int32)
    pages[row] = P - 1 - row
    stores = write(stores, slots, pages, np.arange(S, dtype=np.int32))
  # Into the slots in the opposite order.
  rows = np.arange(S, dtype=np.int32)
  slots = fetch(stores, put(make(S, rng), "device"), P - S + rows, rows)
  assert_same_bits(slots, [x[::-1] for x in finished])


def test_donated_stores_stay_where_they_are():
  rng = np.random.default_rng(4)
  write = writing("dma")
  slots, lists = put(make(S, rng), "device"), make_lists(rng, "pages")
  # What numpy made is copied once.
  stores = write(put(make(P, rng), "pinned_host"), slots, *lists)
  where = [x.unsafe_buffer_pointer() for x in stores]
  for _ in range(3):
    before, stores = stores, write(stores, slots, *make_lists(rng, "pages"))
    assert all(x.is_deleted() for x in before)
    assert [x.unsafe_buffer_pointer() for x in stores] == where
    assert {x.sharding.memory_kind for x in stores} == {"pinned_host"}


def assert_stores_are_not_copied(compiled, stores):
  text = compiled.as_text()
  for store in stores:
    kind = {"bfloat16": "bf16", "float32": "f32"}[store.dtype.name]
    shape = re.escape(f"{kind}[{','.join(map(str, store.shape))}]")
    assert re.search(shape, text)
    assert not re.search(rf"= \(?{shape}\S* (\S+ )*(copy|copy-start|convert)\(", text)
  memory = compiled.memory_analysis()
  temporary = memory.temp_size_in_bytes + memory.host_temp_size_in_bytes
  assert temporary < min(x.nbytes for x in stores)


@pytest.mark.parametrize("operation", [fetching, writing])
def test_page_by_page_no_store_is_copied(operation):
  jitted = operation("dma")
  stores, slots, *lists = large("pinned_host")
  compiled = jitted.lower(stores, slots, *lists).compile()
  assert_stores_are_not_copied(compiled, stores)
  donated = slots if operation is fetching else stores
  memory = compiled.memory_analysis()
  aliased = memory.alias_size_in_bytes + memory.host_alias_size_in_bytes
  assert aliased == sum(x.nbytes for x in donated)


@pytest.mark.parametrize(
  ("operation", "to"), [(fetching, ["device"]), (writing, ["device", "pinned_host"])]
)
def test_lowered_for_cuda_single_pages_move_between_memories(operation, to):
  jitted = operation("dma")
  stores, slots, *lists = large("pinned_host")
  traced = jitted.trace(stores, slots, *lists)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  moves = re.findall(r'placement = "(\w+)".* -> tensor<(\S+)>', text)
  pages = "1x16x64xbf16", "1x16x64xbf16", "1x16xf32"
  assert moves == [(kind, page) for kind in to for page in pages]
  # XLA would leave these to the processor, end the process, or wait for the host.
  for name in ("gather", "scatter", "case", "if"):
    assert f"stablehlo.{name}" not in text


PROMISED = [(64, 128), (64, 64), (16, 64), (128, 256), (24, 72), (4, 2)]


@pytest.mark.parametrize(("x", "d"), PROMISED)
@pytest.mark.parametrize("operation", ["fetch_pages", "write_pages"])
def test_what_is_promised_is_lowered_for_cuda_with_stores_on_the_host(operation, x, d):
  stores, slots, *lists = large("pinned_host", num_pages=64, x=x, d=d)
  assert mosaic_gpu.why_not(stores) is None
  is_fetch = operation == "fetch_pages"
  lowered = export.export(
    jax.jit(getattr(mosaic_gpu, operation), donate_argnums=1 if is_fetch else 0),
    platforms=["cuda"],
    disabled_checks=[export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
  )(stores, slots, *lists)
  text = lowered.mlir_module()
  # One operation, the kernel, and nothing before or after it.
  assert re.findall(r"= stablehlo\.(\w+)", text) == ["custom_call"]
  main = text[text.index("@main") :]
  on_host = re.findall(r"%arg(\d): tensor<\S+> {mhlo.memory_kind = \"pinned_host\"", main)
  assert on_host == ["0", "1", "2"]
  # Lists, from where, to where: the results take the place of the latter.
  order = "67012345" if is_fetch else "76345012"
  operands = ", ".join(f"%arg{number}" for number in order)
  assert f"@mosaic_gpu_v2({operands})" in main
  aliases = re.findall(r"output_tuple_indices = \[(\d)\], operand_index = (\d)", main)
  assert aliases == [("0", "5"), ("1", "6"), ("2", "7")]
  donated = re.findall(r"%arg(\d): [^%]* tf.aliasing_output = (\d)", main)
  assert donated == [(number, str(i)) for i, number in enumerate(order[5:])]
  # Slots, and the results of a fetch; those of a write are where stores are.
  assert main.count('mhlo.memory_kind = "device"') == (6 if is_fetch else 3)
  assert main.count('mhlo.memory_kind = "pinned_host"') == (3 if is_fetch else 6)


def test_over_a_mesh_every_device_moves_its_own_pages():
  if len(jax.devices()) < 2:
    pytest.skip("needs two devices")
  mesh = jax.make_mesh((2,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec("device")
  on_host, on_device = (
    jax.sharding.NamedSharding(mesh, spec, memory_kind=kind)
    for kind in ("pinned_host", "device")
  )
  rng = np.random.default_rng(8)
  parts = [(make(P, rng), make(S, rng), *make_lists(rng, "rows")) for _ in range(2)]
  stores, *others = jax.tree.map(lambda *x: np.concatenate(x), *parts)
  arrays = jax.device_put(stores, on_host), *jax.device_put(others, on_device)
  manual = functools.partial(
    jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
  )
  slots = jax.jit(manual(pallas_kernels.fetch_pages))(*arrays)
  wanted = [move(*part) for part in parts]
  assert_same_bits(slots, jax.tree.map(lambda *x: np.concatenate(x), *wanted))
  lowered = export.export(
    jax.jit(manual(mosaic_gpu.fetch_pages)),
    platforms=["cuda"],
    disabled_checks=[export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
  )(*arrays)
  assert lowered.mlir_module().count("custom_call @mosaic_gpu_v2") == 1


ON_GPU = [("dma", "pinned_host"), ("mosaic_gpu", "pinned_host"), ("mosaic_gpu", "device")]


@pytest.mark.gpu
@pytest.mark.parametrize(("x", "d"), PROMISED)
@pytest.mark.parametrize(("implementation", "kind"), ON_GPU)
def test_on_a_gpu_all_fetch_the_same_bits(implementation, kind, x, d):
  p, s, r = 700, 300, 200
  rng = np.random.default_rng(6)
  resident = fetching("resident")
  fetch = fetching(implementation)
  numbers, content = make(p, rng, x, d), make(s, rng, x, d)
  stores, slots, wanted = put(numbers, kind), put(content, "device"), put(content, "device")
  on_device = put(numbers, "device")
  for _ in range(5):
    pages, rows = make_lists(rng, "rows", p, s, r)
    wanted = resident(on_device, wanted, pages, rows)
    slots = fetch(stores, slots, pages, rows)
    assert_same_bits(slots, wanted)
  assert_same_bits(stores, numbers)


@pytest.mark.gpu
@pytest.mark.parametrize(("implementation", "kind"), ON_GPU)
def test_on_a_gpu_pages_are_written_in_place_and_come_back(implementation, kind):
  p, s, r = 700, 300, 40
  rng = np.random.default_rng(7)
  write, fetch = writing(implementation), fetching("mosaic_gpu")
  wanted, finished = make(p, rng, 64, 128), make(s, rng, 64, 128)
  stores, slots = put(wanted, kind), put(finished, "device")
  where = None
  for _ in range(5):
    pages, rows = make_lists(rng, "pages", p, s, r)
    wanted = move(finished, wanted, rows, pages)
    stores = write(stores, slots, pages, rows)
    assert {x.sharding.memory_kind for x in stores} == {kind}
    now = [x.unsafe_buffer_pointer() for x in stores]
    assert where in (None, now)
    where = now
  assert_same_bits(stores, wanted)
  pages = jnp.asarray(rng.integers(0, p, s), jnp.int32)
  slots = fetch(stores, slots, pages, jnp.arange(s, dtype=jnp.int32))
  assert_same_bits(slots, [x[np.asarray(pages)] for x in wanted])


@pytest.mark.gpu
@pytest.mark.parametrize(
  ("operation", "implementation"),
  [
    (fetching, "dma"),
    (fetching, "mosaic_gpu"),
    (writing, "dma"),
    (writing, "mosaic_gpu"),
  ],
)
def test_on_a_gpu_no_store_is_copied(operation, implementation):
  jitted = operation(implementation)
  stores, slots, *lists = large("pinned_host", x=64, d=128)
  assert_stores_are_not_copied(jitted.lower(stores, slots, *lists).compile(), stores)
