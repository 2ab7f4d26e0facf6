"""How fast a checkpoint decodes behind contexts of held-out text, all rows different."""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools

import jax.numpy as jnp

from sparsejax import model
from sparsejax.attention import method
from sparsejax.configuration import build
from sparsejax.decoding import cache as caches
from sparsejax.decoding import generate, sampling
from sparsejax.evaluation import contexts, decode_timing
from sparsejax.evaluation import subject as subjects
from sparsejax.evaluation.decode_timing import Cell

# Steps that fill the slots before time is taken.
WARM_STEPS = 32


def run(
  subject: subjects.Subject,
  *,
  modes: Sequence[str],
  budgets: Sequence[int] = (),
  lengths: Sequence[int],
  num_rows: int = 8,
  kv_gib: Sequence[float] = (),
  spare: Sequence[int] = (),
  num_steps: int = 128,
) -> list[Cell]:
  """Decodes behind contexts of held-out text.

  Args:
    subject: the checkpoint.
    modes: of inference.
    budgets: keys a token reads under sparse inference; () is that of training.
    lengths: of the contexts, in tokens.
    num_rows: that are decoded together, the same in all cells, unless there are
    kv_gib: sizes of caches on the device, for each of which as many rows are decoded as fit.
    spare: sparse inference with all pages on the device comes first, then for each of these
      with pages in the host's memory and so many slots beyond those that a token reads.
    num_steps: that are timed.

  Raises:
    ConfigError: not a row fits in `kv_gib`, or pages of the host's memory over several devices.
    DataError: too little held-out text.
    UserError: a cache is larger than memory.
  """
  asked = list(cells_asked(modes, budgets, lengths, kv_gib, spare, num_rows))
  for cell in asked:
    check(subject, cell, num_steps)
  return [measure(subject, cell, num_steps) for cell in asked]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
  """What a cell is to be of.

  Attributes:
    mode: of inference.
    budget: keys a token reads when sparse; None is that of training, or full inference.
    context: tokens before the first step.
    spare: slots beyond those that a token reads; None is all pages on the device.
    kv_gib: of caches on the device, which give the number of rows; None is `num_rows`.
    num_rows: that are decoded together, where `kv_gib` is None.
  """

  mode: method.Stream
  budget: int | None
  context: int
  spare: int | None
  kv_gib: float | None
  num_rows: int


def cells_asked(
  modes: Sequence[method.Stream],
  budgets: Sequence[int],
  lengths: Sequence[int],
  kv_gib: Sequence[float],
  spare: Sequence[int],
  num_rows: int,
) -> Iterator[Asked]:
  """The cells of `run`, in their order."""
  for mode in modes:
    is_sparse = mode == "sparse"
    for budget, context, extra, size in itertools.product(
      (budgets or (None,)) if is_sparse else (None,),
      lengths,
      (None, *spare) if is_sparse else (None,),
      kv_gib or (None,),
    ):
      yield Asked(
        mode=mode,
        budget=budget,
        context=context,
        spare=extra,
        kv_gib=size,
        num_rows=num_rows,
      )


def check(subject: subjects.Subject, asked: Asked, num_steps: int) -> None:
  """Refuses what cannot be measured; parameters may be shapes alone.

  Raises:
    ConfigError: not a row fits in `kv_gib`, or pages of the host's memory over several devices.
    DataError: too little held-out text.
  """
  transformer, count, slots = _sizes(subject, asked, num_steps)
  length = asked.context + WARM_STEPS + num_steps
  room = caches.room(transformer, batch=count, length=length, num_slots=slots)
  caches.check_slots(transformer, asked.mode, room, subject.mesh)
  # Devices that share rows may have some that nobody asked for.
  devices = subject.mesh.shape["data"] * subject.mesh.shape["fsdp"]
  contexts.rows(subject, -(-count // devices) * devices, asked.context)


def _sizes(subject: subjects.Subject, asked: Asked, num_steps: int):
  """The model, how many rows, and slots, if pages lie on the host."""
  transformer = subject.transformer
  if asked.budget is not None:
    transformer = build.with_budget(transformer, asked.budget)
  length, slots = asked.context + WARM_STEPS + num_steps, None
  if asked.spare is not None:
    slots = decode_timing.num_slots(transformer, length, asked.spare)
  count = asked.num_rows
  if asked.kv_gib is not None:
    kv_bytes = int(asked.kv_gib * 2**30)
    count = decode_timing.rows_within(transformer, asked.mode, length, slots, kv_bytes)
  return transformer, count, slots


def measure(subject: subjects.Subject, asked: Asked, num_steps: int) -> Cell:
  """One cell; see `run`."""
  transformer, count, slots = _sizes(subject, asked, num_steps)
  return _after_text(subject, transformer, asked.mode, asked.context, count, slots, num_steps)


def _after_text(
  subject: subjects.Subject,
  transformer: model.Transformer,
  stream: method.Stream,
  context: int,
  num_rows: int,
  slots: int | None,
  num_steps: int,
) -> Cell:
  decoder = generate.Decoder(
    transformer,
    subject.params,
    stream=stream,
    mesh=subject.mesh,
    sampling=sampling.Sampling(temperature=0),
    seed=0,
    num_ids=subject.corpus.tokenizer.vocab_size,
    rows=num_rows,
    length=context + WARM_STEPS + num_steps,
    offload="never" if slots is None else "always",
    num_slots=slots,
    prompt_lengths=(context,),
  )
  texts = contexts.rows(subject, len(decoder.cache.lengths_B), context)
  first = [decoder.begin(row, text.tolist(), row) for row, text in enumerate(texts)]
  cell, _ = decode_timing.measure(
    transformer,
    decoder.params,
    decoder.cache,
    jnp.asarray(first, jnp.int32),
    stream=stream,
    mesh=subject.mesh,
    num_steps=num_steps,
    num_warm=WARM_STEPS,
  )
  return dataclasses.replace(cell, backends=tuple(map(str, decoder.backends)))
