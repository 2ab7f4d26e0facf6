"""How fast a checkpoint decodes behind contexts of held-out text, all rows different."""

from collections.abc import Sequence
import dataclasses

import jax.numpy as jnp

from sparsejax import model
from sparsejax.attention import method
from sparsejax.configuration import build
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
  cells = []
  for mode in modes:
    is_sparse = mode == "sparse"
    for budget in (budgets or [None]) if is_sparse else [None]:
      transformer = subject.transformer
      if budget is not None:
        transformer = build.with_budget(transformer, budget)
      for context in lengths:
        length = context + WARM_STEPS + num_steps
        offloaded = [
          decode_timing.num_slots(transformer, length, x) for x in spare if is_sparse
        ]
        for slots in (None, *offloaded):
          counts = [
            decode_timing.rows_within(transformer, mode, length, slots, int(size * 2**30))
            for size in kv_gib
          ]
          for count in counts or [num_rows]:
            cells.append(
              _after_text(subject, transformer, mode, context, count, slots, num_steps)
            )
  return cells


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
  )
  # Devices that share rows may have some that nobody asked for.
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
