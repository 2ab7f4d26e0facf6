"""Continues prompts with a cache: many rows at a time, and new prompts in place of ended ones.

With a checkpoint, as in a notebook:

  found = subject.load("runs/smoke", base.get_config())  # sparsejax.evaluation, configs
  tokenizer = found.corpus.tokenizer
  prompts = [[tokenizer.bos_id, *tokenizer.encode("def main(")]]
  texts = generate(
    found.transformer, found.params, prompts, max_new_tokens=64, stream="sparse",
    mesh=found.mesh, num_ids=tokenizer.vocab_size, stop_ids=(tokenizer.eos_id,),
  )
  print(tokenizer.decode(texts[0]))

Letters: B rows, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
import functools

import jax
import numpy as np

import pallas_kernels
from sparsejax import model, sharding
from sparsejax.attention import backends, method, prompt_backends
from sparsejax.decoding import cache as caches
from sparsejax.decoding import checks, pinned, prefill, programs
from sparsejax.decoding import sampling as samplings


def generate(
  transformer: model.Transformer,
  params: dict,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  stream: method.Stream,
  mesh: jax.sharding.Mesh,
  sampling: samplings.Sampling | None = None,
  seed: int = 0,
  num_ids: int | None = None,
  stop_ids: Iterable[int] = (),
  is_over: Callable[[Sequence[int]], bool] | None = None,
  rows: int = 8,
  length: int | None = None,
  offload: str = "auto",
  num_slots: int | None = None,
  prefill_chunk: int | None = None,
  prefill_stream: method.Stream | None = None,
  on_token: Callable[[int, int], None] | None = None,
  on_choice: Callable[[pallas_kernels.Choice], None] | None = None,
) -> list[list[int]]:
  """Returns the ids that follow each prompt.

  A prompt's draws depend on the seed and its number alone, not on what is decoded beside it.

  Args:
    transformer, params: the model.
    prompts: ids, at least one each.
    max_new_tokens: after which a prompt's text ends, if it has not before.
    stream: `full` or `sparse`.
    mesh: where the parameters are.
    sampling: how ids are drawn; None is from the model's own distribution.
    seed: of the draws.
    num_ids: ids that may be drawn; None is the whole vocabulary.
    stop_ids: ids that end a text; they are its last.
    is_over: asked after each id whether a prompt's text, all of its ids, ends there.
    rows: prompts that are decoded at the same time.
    length: tokens that a row has room for; None is what the longest prompt needs.
    offload: whether pages lie in the host's memory, `never`, `always`, or `auto`: where they
      do not fit on the device (see `cache.place`).
    num_slots: pages per row and key head that are kept on the device then; giving it asks for
      pages in the host's memory.
    prefill_chunk: tokens of a prompt that are read at a time, whole blocks; None is about
      4096 (see `prefill.chunk_size`).
    prefill_stream: by which prompts are read, `full` or the one above; None is that.
    on_token: called with the number of a prompt and an id, as each is drawn.
    on_choice: called before that with where pages are, what reads and moves them, and what
      reads prompts.

  Raises:
    ConfigError: a number that makes no sense, a prompt that does not fit in `length`, streams
      that do not go together, or `attention.kernels=strict` where there is no kernel.
    DataError: a prompt that is empty, is no list of ids, or has one the model does not know.
    UserError: the cache does not fit in the memory of the device, or of the host.
  """
  longest = checks.check_prompts(
    prompts,
    max_new_tokens=max_new_tokens,
    length=length,
    vocab_size=transformer.shape.vocab_size,
  )
  checks.whole("rows", rows, least=1)
  stop_ids = checks.check_stop_ids(stop_ids, transformer.shape.vocab_size)
  if not len(prompts):
    return []
  rows = min(rows, len(prompts))
  decoder = Decoder(
    transformer,
    params,
    stream=stream,
    mesh=mesh,
    sampling=sampling or samplings.Sampling(),
    seed=seed,
    num_ids=num_ids,
    rows=rows,
    length=length or longest + max_new_tokens,
    offload=offload,
    num_slots=num_slots,
    prefill_chunk=prefill_chunk,
    prefill_stream=prefill_stream,
    prompt_lengths=[len(prompt) for prompt in prompts],
  )
  for choice in decoder.backends if on_choice is not None else ():
    on_choice(choice)
  texts: list[list[int]] = [[] for _ in prompts]
  waiting = iter(range(len(prompts)))
  in_row: list[int | None] = [None] * rows

  def take(row: int, token: int) -> None:
    number = in_row[row]
    texts[number].append(token)
    if on_token is not None:
      on_token(number, token)
    ended = token in stop_ids or len(texts[number]) == max_new_tokens
    if ended or (is_over is not None and is_over(texts[number])):
      in_row[row] = None

  while True:
    for row in range(rows):
      # A text may end with its first token.
      while in_row[row] is None and (number := next(waiting, None)) is not None:
        in_row[row] = number
        take(row, decoder.begin(row, prompts[number], number))
    busy = [row for row in range(rows) if in_row[row] is not None]
    if not busy:
      return texts
    last, numbers, places = np.zeros((3, rows), np.int32)
    for row in busy:
      text = texts[in_row[row]]
      last[row], numbers[row], places[row] = text[-1], in_row[row], len(text)
    tokens = decoder.step(last, numbers, places)
    for row in busy:
      take(row, int(tokens[row]))


class Decoder:
  """A model, its cache, and the programs that fill and read it.

  Prompts are read in chunks, by one program. Those that are shorter than a chunk are padded to
  powers of two, so that few programs are compiled.

  Attributes:
    backends: where pages are, what reads and moves them, and what reads prompts.
    params: of the model, as steps take them.
    cache: of the rows; every call gives up the one before.
  """

  def __init__(
    self,
    transformer: model.Transformer,
    params: dict,
    *,
    stream: method.Stream,
    mesh: jax.sharding.Mesh,
    sampling: samplings.Sampling,
    seed: int,
    num_ids: int | None,
    rows: int,
    length: int,
    offload: str = "auto",
    num_slots: int | None = None,
    prefill_chunk: int | None = None,
    prefill_stream: method.Stream | None = None,
    prompt_lengths: Sequence[int] = (),
  ):
    """Makes an empty cache; see `generate` for arguments and errors.

    `prompt_lengths` are those of prompts to come, where they are known: what reads them
    depends on it.
    """
    checks.check_settings(
      transformer,
      stream=stream,
      prefill_stream=prefill_stream,
      mesh=mesh,
      seed=seed,
      num_ids=num_ids,
      rows=rows,
      length=length,
      offload=offload,
      num_slots=num_slots,
      prefill_chunk=prefill_chunk,
    )
    self._transformer = caches.for_decoding(transformer)
    self._stream, self._mesh = stream, mesh
    self._prefill_stream = prefill_stream or stream
    # What devices divide among themselves is whole rows for each.
    self._devices = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = -(-rows // self._devices) * self._devices
    self._rows = rows
    shape, options = self._transformer.shape, self._transformer.options
    self._chunk = prefill.chunk_size(options.block_size, prefill_chunk)
    with sharding.use(mesh):
      self.params = jax.block_until_ready(caches.cast(shape.dtype, params))
    room = caches.room(self._transformer, batch=batch, length=length)
    free = caches.free_bytes()
    # Beside the cache there is a prompt that is being read.
    beside = prefill.num_bytes(self._transformer, stream, room, self._chunk)
    self._room, choice = caches.place(
      self._transformer,
      stream,
      room,
      offload=offload,
      num_slots=num_slots,
      limit=None if free is None else max(0, free - beside),
      num_devices=mesh.size,
    )
    # Before anything counts on it that slots have room.
    caches.check_slots(self._transformer, stream, self._room, mesh)
    self.backends = [
      choice,
      *backends.choose_decoding(
        options, stream, self._room, num_heads=shape.num_attention_heads, mesh=mesh
      ),
      *prompt_backends.choose(
        options,
        self._prefill_stream,
        self._room,
        num_heads=shape.num_attention_heads,
        chunk=self._chunk,
        lengths=sorted({self._padded(length) for length in prompt_lengths}),
      ),
    ]
    spec = caches.spec(self._transformer, stream, self._room)
    caches.check_size(spec, free, pinned.limit(), beside=beside)
    with sharding.use(mesh):
      self.cache = caches.make(spec)
    own = programs.Programs(
      transformer=self._transformer,
      stream=stream,
      prefill_stream=self._prefill_stream,
      room=self._room,
      chunk=self._chunk,
      num_devices=self._devices,
      key=jax.random.key(seed),
      draw=functools.partial(samplings.draw, sampling=sampling, num_ids=num_ids),
    )
    self._begin = jax.jit(own.begin, donate_argnums=1)
    self._step = jax.jit(own.step, donate_argnums=1, compiler_options=caches.COMPILER_OPTIONS)

  def begin(self, row: int, prompt: Sequence[int], number: int) -> int:
    """Forgets what a row holds and reads a prompt into it; the id drawn after it.

    Args:
      row: which.
      prompt: ids.
      number: of the prompt, on which draws depend.
    """
    padded = np.zeros((1, self._padded(len(prompt))), np.int32)
    padded[0, : len(prompt)] = prompt
    with sharding.use(self._mesh):
      token, self.cache = self._begin(
        self.params, self.cache, row, padded, np.int32(len(prompt)), np.int32(number)
      )
      return int(token)

  def step(self, ids_B: np.ndarray, numbers_B: np.ndarray, places_B: np.ndarray) -> np.ndarray:
    """Takes one id of every row; those drawn after it. Rows not in use are read like others.

    Args:
      ids_B: the ids.
      numbers_B: of the prompts in the rows.
      places_B: of what is drawn, in the texts that follow them.
    """
    missing = self._room.batch - self._rows
    given = [np.pad(x_B, (0, missing)) for x_B in (ids_B, numbers_B, places_B)]
    with sharding.use(self._mesh):
      tokens_B, self.cache = self._step(self.params, self.cache, *given)
      return jax.device_get(tokens_B)[: self._rows]

  def _padded(self, length: int) -> int:
    """How long a prompt is made: a power of two up to a chunk, else as long as a row."""
    if length > self._chunk:
      return self._room.length
    return min(self._room.length, self._chunk, 1 << (length - 1).bit_length())
