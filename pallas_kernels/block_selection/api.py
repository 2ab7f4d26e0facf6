"""From queries and keys to the list of key blocks that each query reads.

Shape letters, used in every file of this folder:
  B batch   T queries   S keys   N = ceil(S / block_size) key blocks   W windows of keys
  H query heads   K key/value heads   G = H // K   D head size
  M blocks per query (shared by the G heads of a group; -1 marks an empty slot)
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import devices, dispatch, positions
from pallas_kernels.block_selection import by_key, mosaic_gpu, plan, reference, xla
from pallas_kernels.block_selection.pooling import Pooling
from pallas_kernels.block_selection.problem import Problem, Rules, check_rules, make_rules
from pallas_kernels.dispatch import Shaped

type SelectionImplementation = Literal["auto", "strict", "mosaic_gpu", "xla", "reference"]
type Rule = Literal["exact", "half_local"]

# What `auto` tries, in this order.
AUTOMATIC = ("mosaic_gpu", "xla")


def select_blocks(
  q_BTHD: Float[Array, "B T H D"],
  k_BSKD: Float[Array, "B S K D"],
  *,
  block_size: int,
  num_blocks: int,
  query_offset: int | Int[Array, ""] = 0,
  segments_BS: Int[Array, "B S"] | None = None,
  scale: float | None = None,
  rule: Rule = "exact",
  num_initial: int = 0,
  num_local: int = 1,
  pooling: Pooling | None = None,
  normalizer: Pooling | None = None,
  key_score_BSK: Float[Array, "B S K"] | None = None,
  num_by_query: int | None = None,
  window_keys_BWKD: Float[Array, "B W K D"] | None = None,
  implementation: SelectionImplementation | None = None,
) -> Int[Array, "B T K M"]:
  """Returns the `num_blocks` best blocks of every query and key head, -1 where fewer exist.

  Windows of keys are represented by their means. Each query head turns its scores with the
  windows that are complete at its position into a softmax; the probabilities are summed
  over the heads of a group. A block's score is that of its window, or the largest of its
  windows, or their weighted sum (see `Pooling`). Forced blocks are in: the first
  `num_initial` and the last `num_local`, the query's own among them. The best of the others
  fill the list. Equal scores are decided for the lower block. With whole blocks as windows
  this is the selection of SSA (arXiv:2511.20102, section 4.1 and released code), with
  `pooling.infllm_v2` that of InfLLM-V2 (arXiv:2509.24663), with `pooling.nsa_windows` and
  `window_keys` that of NSA (arXiv:2502.11089, equations 8 to 11).

  With a normaliser, exponentials are divided by their sum over other, coarser windows in place
  of their own: fewer products in the first of a kernel's two passes. InfLLM-V2 approximates
  its log-sum-exp so, with windows four times as long and as far apart. What the sum misses is
  nearly a constant factor of each head, which ranks no block. A query that sees no such window
  takes its own sum; the paper leaves that open.

  With scores of keys, queries choose `num_by_query` blocks so, forced ones among them. Then
  the rest is chosen by the blocks' mean scores of keys, pooled over the same windows: the
  selection of NOSA (arXiv:2510.13602), whose lists change little from query to query.

  With segments, a query sees only blocks and windows whose last key lies in its own
  document, and a mean covers only the keys of the document of its last key: what lies
  before is hidden from every query that can see it. Segments must be runs. The first
  blocks are then the first of the document.

  Lists are in no particular order and carry no gradient.

  Args:
    q_BTHD, k_BSKD: queries and keys, positions encoded.
    block_size: keys per block.
    num_blocks: M.
    query_offset: position of the first query, when queries come in chunks.
    segments_BS: document of each position; None is one document.
    scale: factor on the scores; None is D ** -0.5.
    rule: `exact`: the best of all blocks; `half_local`: the best M/2 blocks among the
      M-aligned run of blocks that the query's own is in, and the best M/2 before it. The
      latter is what SSA's released kernel computes where block_size = M.
    num_initial, num_local: forced blocks.
    pooling: windows; None is whole blocks.
    normalizer: windows that the softmax is normalised over (size and stride alone matter);
      None is those of `pooling`. `mosaic_gpu` takes None alone.
    key_score_BSK: of each key (NOSA's importance before the exponential).
    num_by_query: with scores of keys, how many blocks queries choose.
    window_keys_BWKD: what queries are compared with in place of the windows' means, such as
      NSA's compressed keys; one for each of the windows that S keys complete.
    implementation: `mosaic_gpu` runs on Hopper GPUs, for the dtypes and sizes in its file;
      `xla` runs anywhere; `reference` is the definition. None and `auto` take `mosaic_gpu`
      where it can run and `xla` elsewhere; `strict` is `mosaic_gpu` or an error. Arrays that
      are divided over a mesh of several devices reach it in `jax.shard_map` alone.

  Raises:
    ValueError: shapes or numbers that do not fit together, or an implementation that cannot
      take the problem or run on this device; the message names them.
    KeyError: no such rule or implementation.
  """
  problem = Problem(
    q_BTHD,
    k_BSKD,
    jnp.asarray(query_offset, jnp.int32),
    segments_BS,
    key_score_BSK,
    window_keys_BWKD,
  )
  rules = make_rules(
    block_size=block_size,
    num_blocks=num_blocks,
    num_by_query=num_by_query,
    num_initial=num_initial,
    num_local=num_local,
    pooling=pooling,
    rule=rule,
    scale=q_BTHD.shape[-1] ** -0.5 if scale is None else scale,
    normalizer=normalizer,
  )
  _check_arrays(problem, query_offset)
  _check_windows(problem, rules)
  check_rules(rules, num_by_query, has_key_scores=key_score_BSK is not None)
  problem = jax.lax.stop_gradient(problem)
  backend = _choose(problem, rules, implementation).backend
  if backend == "reference":
    return reference.select_blocks(problem, rules)
  choose = _IMPLEMENTATIONS[backend]
  bounds = plan.bounds(problem, rules)
  spans = plan.spans(bounds, rules)
  if any(span.slots for span in spans):
    chosen = choose(problem, rules, bounds, spans)
  else:  # nothing that queries could choose: their scores are not asked for
    b, t, _, _ = q_BTHD.shape
    chosen = [jnp.zeros((b, t, k_BSKD.shape[2], 0), jnp.int32) for _ in spans]
  lists_BTKQ = plan.assemble(chosen, bounds, rules)
  if key_score_BSK is None:
    return lists_BTKQ
  return by_key.fill(lists_BTKQ, problem, rules, bounds)


_IMPLEMENTATIONS: dict[str, Callable] = {"mosaic_gpu": mosaic_gpu.choose, "xla": xla.choose}


def choose_block_selection(
  q_BTHD: Float[Shaped, "B T H D"],
  k_BSKD: Float[Shaped, "B S K D"],
  *,
  block_size: int,
  num_blocks: int,
  rule: Rule = "exact",
  num_initial: int = 0,
  num_local: int = 1,
  pooling: Pooling | None = None,
  normalizer: Pooling | None = None,
  num_by_query: int | None = None,
  implementation: SelectionImplementation | None = None,
) -> dispatch.Choice:
  """What `select_blocks` runs for such arrays on the first device, and why.

  Takes the same arguments, but for those that do not matter here, and runs nothing, so that
  a `jax.ShapeDtypeStruct` will do for an array.

  Raises:
    ValueError: an implementation that cannot take the problem or run on this device.
    KeyError: no such implementation.
  """
  problem = Problem(q_BTHD, k_BSKD, jax.ShapeDtypeStruct((), jnp.int32), None, None)
  rules = make_rules(
    block_size=block_size,
    num_blocks=num_blocks,
    num_by_query=num_by_query,
    num_initial=num_initial,
    num_local=num_local,
    pooling=pooling,
    rule=rule,
    scale=1.0,
    normalizer=normalizer,
  )
  return _choose(problem, rules, implementation)


def _choose(problem: Problem, rules: Rules, implementation: str | None) -> dispatch.Choice:
  candidates = {
    "mosaic_gpu": lambda: (
      devices.why_not_hopper()
      or devices.why_not_divided(problem)
      or mosaic_gpu.why_not(problem, rules)
    ),
    "xla": dispatch.runs_anywhere,
    "reference": dispatch.runs_anywhere,
  }
  return dispatch.choose("block_selection", implementation, candidates, automatic=AUTOMATIC)


def _check_arrays(problem: Problem, query_offset) -> None:
  q_BTHD, k_BSKD, _, segments_BS, key_score_BSK, _ = problem
  (b, t, h, d), (_, s, k, _) = q_BTHD.shape, k_BSKD.shape
  if k_BSKD.shape != (b, s, k, d):
    raise ValueError(f"keys must be {(b, s, k, d)}, got {k_BSKD.shape}")
  if h % k:
    raise ValueError(f"{h} query heads do not group over {k} key heads")
  positions.check(t, s, query_offset)
  if segments_BS is not None and segments_BS.shape != (b, s):
    raise ValueError(f"segments must be {(b, s)}, got {segments_BS.shape}")
  if key_score_BSK is not None and key_score_BSK.shape != (b, s, k):
    raise ValueError(f"scores of keys must be {(b, s, k)}, got {key_score_BSK.shape}")


def _check_windows(problem: Problem, rules: Rules) -> None:
  (b, s, k, d), keys_BWKD = problem.k_BSKD.shape, problem.window_keys_BWKD
  pooling = rules.pooling
  wanted = b, pooling.num_windows(s), k, d
  if keys_BWKD is not None and keys_BWKD.shape != wanted:
    raise ValueError(f"keys of windows must be {wanted}, got {keys_BWKD.shape}")
  weights = pooling.weights
  if weights is not None and len(weights) != pooling.count:
    raise ValueError(f"{len(weights)} weights for {pooling.count} windows of a block")
  if problem.key_score_BSK is not None and (weights is not None or keys_BWKD is not None):
    raise ValueError("scores of keys go with the largest of mean windows alone")
  if keys_BWKD is not None and rules.normalizer is not None:
    raise ValueError("given keys of windows are normalised over these windows alone")
