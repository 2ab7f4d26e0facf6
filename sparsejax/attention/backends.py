"""Which backends a model's attention runs on, asked before anything runs.

Letters: B batch, T tokens, H query heads, K key/value heads, D head size, M blocks listed.
"""

from collections.abc import Callable, Sequence
import functools

import jax
import jax.numpy as jnp

import pallas_kernels
from sparsejax import attention, errors
from sparsejax.attention import block_sparse, compression, method, pages


def choose(
  options: method.Options,
  *,
  dtype: str,
  num_heads: int,
  num_kv_heads: int,
  head_dim: int,
  length: int,
) -> list[pallas_kernels.Choice]:
  """What each operation of attention runs on, and why.

  Whatever the method trains, validation runs it full and sparse: the operations of both
  streams are always among them, each once.

  Args:
    options: settings of attention.
    dtype: of queries, keys and values.
    num_heads, num_kv_heads, head_dim: H, K and D.
    length: T, tokens per row.

  Raises:
    ConfigError: for each operation that cannot run on what was asked for, why not, and what
      to set.
  """
  asked = _Questions(options, dtype, num_heads, num_kv_heads, head_dim, length)
  layers = [options.of_layer(place) for place in range(len(options.pattern))]
  choices = answers([ask for own in layers for ask in asked.of_layer(own)])
  choices += [asked.dual_path_attention(own) for own in layers if asked.has_dual_path(own)]
  # Methods share operations, and a window may be as long as another's.
  return list(dict.fromkeys(choices))


# The key of `attention` that names a backend, and what tells which one it is.
type Question = tuple[str, Callable[[], pallas_kernels.Choice]]


def answers(questions: Sequence[Question]) -> list[pallas_kernels.Choice]:
  """What was chosen; raises one ConfigError for all that cannot run, a line for each."""
  choices, problems = [], {}
  for key, ask in questions:
    try:
      choices.append(ask())
    except pallas_kernels.CannotRunError as error:
      problems[error.op, key] = _problem(key, error)
  if problems:
    raise errors.ConfigError("\n".join(problems.values()))
  return choices


class _Questions:
  """The operations as the methods call them, with shapes for arrays.

  Each takes the settings of a layer, whose `method` is its own.
  """

  def __init__(self, options: method.Options, dtype, num_heads, num_kv_heads, head_dim, length):
    def array(*shape, dtype=dtype):
      return jax.ShapeDtypeStruct((1, length, *shape), dtype)

    self._length = length
    k_BTKD = array(num_kv_heads, head_dim)
    self._qkv = array(num_heads, head_dim), k_BTKD, k_BTKD
    self._bias_BTK = array(num_kv_heads, dtype=jnp.float32)
    self._blocks_BTKM = array(num_kv_heads, options.num_listed(length), dtype=jnp.int32)
    tokens = method.Tokens(array(dtype=jnp.int32), None, None)
    self._full_segments_BT = options.full_segments(tokens)
    self._sparse_segments_BT = options.sparse_segments(tokens)

  def of_layer(self, own: method.Options) -> list[Question]:
    """What a layer runs, full and sparse: the key that names backends, and the question."""
    questions = [("full_implementation", lambda: self.full_attention(own))]
    if own.is_always_full:
      return questions
    name = attention.sparse_name(own)
    window = dict(sliding_window=own.window, nsa=own.nsa.window).get(name)
    if name == "nsa":
      questions.append(("full_implementation", lambda: self.compressed_attention(own)))
    if name != "sliding_window":
      questions += [
        ("sparse_implementation", lambda: self.block_selection(own)),
        ("sparse_implementation", lambda: self.block_sparse_attention(own)),
      ]
    if window is not None:
      questions.append(("full_implementation", lambda: self.sliding_window(own, window)))
    return questions

  def compressed_attention(self, own: method.Options) -> pallas_kernels.Choice:
    q_BTHD, k_BTKD, _ = self._qkv
    return compression.choose(
      q_BTHD,
      k_BTKD,
      size=own.nsa.compress_length,
      stride=own.nsa.compress_stride,
      has_documents=self._sparse_segments_BT is not None,
      max_documents=own.max_documents,
      implementation=own.full_backend,
    )

  def sliding_window(self, own: method.Options, window: int) -> pallas_kernels.Choice:
    return pallas_kernels.choose_full_attention(
      *self._qkv,
      segments_BT=self._sparse_segments_BT,
      max_documents=own.max_documents,
      window=window,
      implementation=own.full_backend,
    )

  def full_attention(self, own: method.Options) -> pallas_kernels.Choice:
    # A layer that trains full attention has no scores of keys in it.
    bias = {} if own.method == "full" else self._bias(own, "key_bias_BTK")
    return pallas_kernels.choose_full_attention(
      *self._qkv,
      segments_BT=self._full_segments_BT,
      max_documents=own.max_documents,
      implementation=own.full_backend,
      **bias,
    )

  def block_selection(self, own: method.Options) -> pallas_kernels.Choice:
    q_BTHD, k_BTKD, _ = self._qkv
    return pallas_kernels.choose_block_selection(
      q_BTHD,
      k_BTKD,
      block_size=own.block_size,
      num_blocks=self._blocks_BTKM.shape[-1],
      implementation=own.selection_backend,
      **attention.sparse_method(own).selection(own, self._length),
    )

  def block_sparse_attention(self, own: method.Options) -> pallas_kernels.Choice:
    return pallas_kernels.choose_block_sparse_attention(
      *self._qkv,
      self._blocks_BTKM,
      block_size=own.block_size,
      segments_BS=self._sparse_segments_BT,
      implementation=own.sparse_backend,
      **self._bias(own, "key_bias_BSK"),
    )

  def has_dual_path(self, own: method.Options) -> bool:
    """Whether a layer runs both streams in one operation."""
    return own.method == "ssa" and issubclass(
      attention.sparse_method(own), block_sparse.BlockSparse
    )

  def dual_path_attention(self, own: method.Options) -> pallas_kernels.Choice:
    return pallas_kernels.choose_dual_path_attention(
      *self._qkv,
      self._blocks_BTKM,
      block_size=own.block_size,
      full_segments_BT=self._full_segments_BT,
      sparse_segments_BT=self._sparse_segments_BT,
      max_documents=own.max_documents,
      full_implementation=own.full_backend,
      sparse_implementation=own.sparse_backend,
      **self._bias(own, "key_bias_BTK"),
    )

  def _bias(self, own: method.Options, name: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The argument that takes the biases of keys, of a method that has them."""
    return {name: self._bias_BTK} if attention.sparse_method(own).has_key_scores else {}


def choose_decoding(
  options: method.Options,
  stream: method.Stream,
  room: pages.Room,
  *,
  num_heads: int,
  mesh: jax.sharding.Mesh,
) -> list[pallas_kernels.Choice]:
  """What a model decodes on: reads of pages, how they are chosen, and moves of them.

  Args:
    options: settings of attention.
    stream: `full` or `sparse`.
    room: of the cache.
    num_heads: H.
    mesh: over which rows are divided.

  Raises:
    ConfigError: for each operation that cannot run on what was asked for, why not.
  """
  b, k = room.batch, room.num_kv_heads
  over_mesh = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  q_BHD = jax.ShapeDtypeStruct((b, num_heads, room.head_dim), room.dtype, sharding=over_mesh)
  layers = [options.of_layer(place) for place in range(len(options.pattern))]
  most = attention.most_pages(options, stream, room.length)
  remembered = [attention.remembers(own, stream, room.length) for own in layers]
  has_bias = any("bias" in kinds for kinds in remembered)
  parts = {"k": ((room.head_dim,), room.dtype), "v": ((room.head_dim,), room.dtype)}
  if has_bias:
    parts["bias"] = (), "float32"
  specs = pages.specs(parts, room, 1)
  held = {name: specs.get(f"slots/{name}", specs[name]) for name in parts}
  list_BKM = jax.ShapeDtypeStruct((b, k, most), jnp.int32)

  def attend():
    return pallas_kernels.choose_decode_attention(
      q_BHD,
      held["k"],
      held["v"],
      list_BKM,
      begin_BKM=list_BKM,
      end_BKM=list_BKM,
      key_bias_PX=held.get("bias"),
      implementation=room.kernels,
    )

  def move(choose: Callable[..., pallas_kernels.Choice], num_entries: int):
    entries_R = jax.ShapeDtypeStruct((b * k * num_entries,), jnp.int32)
    stores, slots = (tuple(of[name] for name in parts) for of in (specs, held))
    return choose(stores, slots, entries_R, entries_R, implementation=room.kernels)

  def plan():
    page_RC = jax.ShapeDtypeStruct((b * k, room.num_slots), jnp.int32)
    count_R = jax.ShapeDtypeStruct((b * k,), jnp.int32)
    slots = pallas_kernels.Slots(page_RC, page_RC, count_R, count_R)
    return pallas_kernels.choose_plan_slots(
      slots, jax.ShapeDtypeStruct((b * k, most), jnp.int32)
    )

  # NSA has windows to read where nothing is left to choose, too.
  windows = [
    kinds.get("windows", kinds.get("windows_k"))
    for own, kinds in zip(layers, remembered, strict=True)
    if not block_sparse.lists_everything(own, room.length)
  ]
  # One answer for all layers that have as many.
  windows = dict.fromkeys(kind.spec(room).shape for kind in windows if kind is not None)

  def select(shape_BKWD: tuple[int, ...]):
    # The past keeps those of a head side by side.
    shape_BWKD = [shape_BKWD[axis] for axis in (0, 2, 1, 3)]
    return pallas_kernels.choose_select_blocks_of_token(
      q_BHD,
      jax.ShapeDtypeStruct(shape_BWKD, room.dtype),
      num_keys=room.length,
      block_size=options.block_size,
    )

  asks = [attend]
  if stream == "sparse":
    asks += [functools.partial(select, shape) for shape in windows]
  if room.num_slots is not None:
    asks.append(plan)
    asks.append(lambda: move(pallas_kernels.choose_fetch_pages, most))
    asks.append(lambda: move(pallas_kernels.choose_write_pages, 1))
  return list(dict.fromkeys(answers([("kernels", ask) for ask in asks])))


def _problem(key: str, error: pallas_kernels.CannotRunError) -> str:
  if error.asked == "strict":
    return (
      f"attention.kernels='strict': no GPU kernel can run {error.op} ({error.reasons}). Set "
      "attention.kernels to 'auto' to run it in XLA."
    )
  return f"attention.{key}={error.asked!r} cannot run: {error.reasons}. Set it to 'auto'."
