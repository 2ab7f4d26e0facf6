"""Times the steps of a cache: tokens per second, and what moves between host and device.

Steps are greedy, and sent to the device without waiting for one to end.

Letters: B rows, L layers, K key/value heads, M pages listed, S steps of a recording, P places
of the pattern of methods.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
import time

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import attention, errors, model, sharding
from sparsejax.attention import block_sparse, method, pages, past
from sparsejax.decoding import cache as caches
from sparsejax.evaluation import kernel_times


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """One line of the table.

  Attributes:
    method: of the model.
    mode: of inference, `full` or `sparse`.
    budget: keys a token reads when sparse; None when full.
    context: tokens of every row before the first step, which is not timed yet.
    batch: rows.
    num_slots: pages per row and key head on the device, where the rest lies in the host's
      memory; None where all pages are on the device.
    tokens_per_second: of all rows together.
    milliseconds: of a step.
    misses: pages fetched per token, layer and key head; None where none is.
    hit_rate: of the pages that are listed, those that are in a slot already.
    fetched_bytes, written_bytes: between host and device, per token.
    device_bytes, host_bytes: of the cache.
    peak_bytes: of the device since the program began, all told; None where it does not say.
    num_steps: that were timed.
    kernels: where the time of a step went, the longest first; () if nobody asked.
    fetch_rate: bytes a second while pages were fetched, in the steps whose kernels these are;
      None where no kernel of its own fetched any.
    backends: what moved and read pages.
  """

  method: str
  mode: str
  budget: int | None
  context: int
  batch: int
  num_slots: int | None
  tokens_per_second: float
  milliseconds: float
  misses: float | None
  hit_rate: float | None
  fetched_bytes: float | None
  written_bytes: float | None
  device_bytes: int
  host_bytes: int
  peak_bytes: int | None
  num_steps: int
  kernels: tuple[kernel_times.KernelTime, ...] = ()
  fetch_rate: float | None = None
  backends: tuple[str, ...] = ()


def num_slots(transformer: model.Transformer, length: int, spare: int) -> int:
  """Slots for what a token reads, and for so many pages that others before it did."""
  most = attention.most_pages(transformer.options, "sparse", length)
  return min(most + spare, -(-length // transformer.options.block_size))


def rows_within(
  transformer: model.Transformer,
  stream: method.Stream,
  length: int,
  num_slots: int | None,
  kv_bytes: int,
) -> int:
  """How many rows of so many tokens have caches of `kv_bytes` on the device.

  Raises:
    ConfigError: not one has.
  """
  room = caches.room(transformer, batch=1, length=length, num_slots=num_slots)
  each = caches.num_bytes(caches.spec(transformer, stream, room))
  if each > kv_bytes:
    raise errors.ConfigError(
      f"a row of {length} tokens takes {caches.in_words(each)} on the device, more than the "
      f"{caches.in_words(kv_bytes)} that were given; give more, or take shorter contexts."
    )
  return kv_bytes // each


def measure(
  transformer: model.Transformer,
  params: dict,
  cache: past.Cache,
  ids_B: jax.Array,
  *,
  stream: method.Stream,
  mesh: jax.sharding.Mesh,
  num_steps: int,
  num_warm: int,
  lists_SLBKM: jax.Array | None = None,
  num_traced: int = 0,
) -> tuple[Cell, past.Cache]:
  """Times greedy steps, and counts what they move.

  Args:
    transformer, params: the model, its matrices in the dtype that products take.
    cache: of the tokens before, which is given up.
    ids_B: the first tokens to take.
    stream: the cache's.
    mesh: where the parameters are.
    num_steps: to time, after
    num_warm: others, which fill the slots.
    lists_SLBKM: what tokens read in place of what they choose, which is computed all the
      same: for weights that were never trained. The steps of a recording are replayed in
      turn, and so are its layers and rows where there are more of them.
    num_traced: further steps, not timed, to see which kernels they run.

  Returns:
    The cell, and the cache.
  """
  transformer = caches.for_decoding(transformer)
  step = make_step(transformer, stream)
  begin = int(cache.lengths_B[0])
  with sharding.use(mesh):

    def take(number: int, cache, ids_B):
      for _ in range(number):
        ids_B, cache = step(params, cache, ids_B, lists_SLBKM)
      return jax.block_until_ready(ids_B), cache

    # Compiled on the first; what is timed begins with an empty queue.
    ids_B, cache = take(num_warm, cache, ids_B)
    before = _counts(cache)
    clock = time.perf_counter()
    ids_B, cache = take(num_steps, cache, ids_B)
    seconds = time.perf_counter() - clock
    after = _counts(cache)
    kernels = []
    if num_traced:

      def trace():
        nonlocal ids_B, cache
        ids_B, cache = take(num_traced, cache, ids_B)

      kernels = kernel_times.of_steps(trace, num_traced)
    counts, traced = after - before, _counts(cache) - after
  room, tokens = cache.room, num_steps * len(ids_B)
  spec = caches.spec(transformer, stream, room)
  stats = jax.local_devices()[0].memory_stats() or {}
  moved = _moved(transformer, room, spec, counts, begin + num_warm, num_steps)
  cell = Cell(
    method="+".join(transformer.options.pattern),
    mode=stream,
    budget=transformer.options.budget if stream == "sparse" else None,
    context=begin,
    batch=room.batch,
    num_slots=room.num_slots,
    tokens_per_second=tokens / seconds,
    milliseconds=1e3 * seconds / num_steps,
    device_bytes=caches.num_bytes(spec),
    host_bytes=caches.num_bytes(spec, is_host=True),
    peak_bytes=stats.get("peak_bytes_in_use"),
    num_steps=num_steps,
    kernels=tuple(kernels),
    fetch_rate=fetch_rate(kernels, _bytes_of(traced[1], spec), num_traced),
    **moved,
  )
  return cell, cache


def make_step(transformer: model.Transformer, stream: method.Stream):
  """A jitted greedy step: `(params, cache, ids_B, lists_SLBKM or None) -> (ids_B, cache)`."""

  @functools.partial(jax.jit, donate_argnums=1, compiler_options=caches.COMPILER_OPTIONS)
  def step(params, cache, ids_B, lists_SLBKM):
    with nn.intercept_methods(_replay(lists_SLBKM, cache.step)):
      logits_BV, cache = caches.step(transformer, params, cache, ids_B, stream=stream)
    return logits_BV.argmax(-1).astype(jnp.int32), cache

  return step


def _replay(lists_SLBKM: jax.Array | None, step: jax.Array):
  """What makes tokens read the lists of a recording."""

  def intercept(call, args, kwargs, context):
    chosen_BKM = call(*args, **kwargs)
    is_list = isinstance(context.module, block_sparse.BlockSparse)
    if lists_SLBKM is None or not is_list or context.method_name != "list_of_token":
      return chosen_BKM
    s, layers, b, *_ = lists_SLBKM.shape
    layer = args[1].layer
    recorded_BKM = lists_SLBKM[step % s, layer % layers]
    recorded_BKM = recorded_BKM[jnp.arange(len(chosen_BKM)) % b]
    # No recording has a number below -1, which XLA does not know: choosing is not left out.
    return jnp.where(recorded_BKM >= -1, recorded_BKM, chosen_BKM)

  return intercept


def _counts(cache: past.Cache) -> np.ndarray:
  """Hits and misses until now [2, P], of the P places in the pattern of methods."""

  def total(own: pages.Arrays, name: str) -> int:
    # In numpy, whose sums do not end at 2**31.
    return int(np.asarray(own[name]).sum(dtype=np.int64)) if name in own else 0

  names = "slots/hits", "slots/misses"
  return np.array([[total(own, name) for own in cache.arrays] for name in names])


def _moved(
  transformer: model.Transformer,
  room: pages.Room,
  spec: past.Cache,
  counts: np.ndarray,
  begin: int,
  num_steps: int,
) -> dict[str, float | None]:
  """What of a cell tells of pages that move."""
  if room.num_slots is None:
    names = "misses", "hit_rate", "fetched_bytes", "written_bytes"
    return dict.fromkeys(names)
  hits, misses = counts.sum(1)
  num_layers, num_places = transformer.shape.num_hidden_layers, len(spec.arrays)
  num_full = (begin + num_steps) // room.page_size - begin // room.page_size
  heads_P = np.full(num_places, num_layers // num_places * room.num_kv_heads)
  num_tokens = num_steps * room.batch
  return dict(
    misses=float(misses / num_tokens / heads_P.sum()),
    hit_rate=float(hits / (hits + misses)),
    fetched_bytes=_bytes_of(counts[1], spec) / num_tokens,
    written_bytes=num_full * _bytes_of(heads_P, spec) / num_steps,
  )


def _bytes_of(num_pages_P: np.ndarray, spec: past.Cache) -> int:
  """Of so many pages on the host, by place: methods differ in what a page has."""
  return sum(
    int(number) * x.dtype.itemsize * math.prod(x.shape[1:])
    for number, own in zip(num_pages_P, spec.arrays, strict=True)
    for x in own.values()
    if x.sharding is not None
  )


def fetch_rate(
  kernels: Sequence[kernel_times.KernelTime], num_bytes: int, num_steps: int
) -> float | None:
  """Bytes a second while kernels fetched so many in so many steps; None where none did."""
  microseconds = sum(x.microseconds for x in kernels if x.name.startswith("fetch_pages"))
  return 1e6 * num_bytes / num_steps / microseconds if microseconds else None


def rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
  """Rows of a table, the header first."""
  header = (
    *("method", "inference", "budget", "context", "rows", "slots", "tokens/s", "ms/step"),
    *("hit rate", "fetched/token", "KV on device", "KV on host"),
  )
  return [
    header,
    *(
      (
        cell.method,
        cell.mode,
        "-" if cell.budget is None else str(cell.budget),
        f"{cell.context:,d}",
        str(cell.batch),
        "-" if cell.num_slots is None else str(cell.num_slots),
        f"{cell.tokens_per_second:,.0f}",
        f"{cell.milliseconds:.2f}",
        "-" if cell.hit_rate is None else f"{cell.hit_rate:.1%}",
        "-" if cell.fetched_bytes is None else caches.in_words(cell.fetched_bytes),
        caches.in_words(cell.device_bytes),
        caches.in_words(cell.host_bytes) if cell.host_bytes else "-",
      )
      for cell in cells
    ),
  ]
