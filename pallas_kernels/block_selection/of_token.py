"""The list of one token per row, from what a cache knows of the windows of earlier keys.

While a model decodes, rows stand at positions of their own, and means of windows have been
taken when the windows were complete. The rules are those of `api.select_blocks`.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import devices, dispatch
from pallas_kernels.block_selection import mosaic_gpu_token, plan, xla, xla_token
from pallas_kernels.block_selection.pooling import Pooling
from pallas_kernels.block_selection.problem import Rules, check_rules, make_rules
from pallas_kernels.dispatch import Shaped

type OfTokenImplementation = Literal["auto", "strict", "mosaic_gpu", "xla"]

# What `auto` tries, in this order.
AUTOMATIC = ("mosaic_gpu", "xla")


def select_blocks_of_token(
  q_BHD: Float[Array, "B H D"],
  window_keys_BWKD: Float[Array, "B W K D"],
  position_B: Int[Array, "B"],
  *,
  num_keys: int,
  block_size: int,
  num_blocks: int,
  rule: str = "exact",
  num_initial: int = 0,
  num_local: int = 1,
  pooling: Pooling | None = None,
  normalizer: Pooling | None = None,
  coarse_keys_BWKD: Float[Array, "B V K D"] | None = None,
  window_score_BWK: Float[Array, "B W K"] | None = None,
  num_by_query: int | None = None,
  implementation: OfTokenImplementation | None = None,
) -> Int[Array, "B K M"]:
  """Returns what `select_blocks` lists for a query at `position_B` of a single document.

  Products of queries with windows, and their softmax, run in XLA: one query reads every window
  once, whatever multiplies.

  Args:
    q_BHD: queries, positions encoded.
    window_keys_BWKD: what they are compared with, one for each window that `num_keys` keys
      complete, or more; of those that are not complete at a query's position, anything.
    position_B: of each query; what lies there and before is its document.
    num_keys: that a row has room for.
    block_size, num_blocks, rule, num_initial, num_local, pooling, normalizer, num_by_query:
      see `select_blocks`.
    coarse_keys_BWKD: means over the windows of the normaliser.
    window_score_BWK: with `num_by_query`, means of the scores of keys over the windows.
    implementation: of what makes lists from probabilities of windows and from scores. `xla`
      runs anywhere. `mosaic_gpu` is one kernel on Hopper GPUs; over a mesh, in
      `jax.shard_map(..., check_vma=False)` alone. None and `auto` take the kernel where it can
      run, else `xla`; `strict` is the kernel or an error. Lists of forced blocks alone are
      arithmetic with positions, in XLA.

  Raises:
    ValueError: numbers that do not fit together, fewer windows than `num_keys` keys complete,
      or an implementation that cannot run here; the message names them.
    KeyError: no such rule or implementation.
  """
  rules = make_rules(
    block_size=block_size,
    num_blocks=num_blocks,
    num_by_query=num_by_query,
    num_initial=num_initial,
    num_local=num_local,
    pooling=pooling,
    rule=rule,
    scale=q_BHD.shape[-1] ** -0.5,
    normalizer=normalizer,
  )
  check_rules(rules, num_by_query, has_key_scores=window_score_BWK is not None)
  _check_windows("keys", rules.pooling, window_keys_BWKD, num_keys)
  if window_score_BWK is not None:
    _check_windows("scores", rules.pooling, window_score_BWK, num_keys)
  if normalizer is not None:
    _check_windows("coarse keys", normalizer, coarse_keys_BWKD, num_keys)
  choice = choose_select_blocks_of_token(
    q_BHD,
    window_keys_BWKD,
    num_keys=num_keys,
    block_size=block_size,
    implementation=implementation,
  )
  window_BKGW = window_score_BKW = None
  if rules.ranks_by_query:
    coarse_BWKD = None if normalizer is None else coarse_keys_BWKD
    window_BKGW = _probabilities(q_BHD, window_keys_BWKD, position_B, rules, coarse_BWKD)
  if window_score_BWK is not None:
    window_score_BKW = window_score_BWK.transpose(0, 2, 1)
  make_lists = _IMPLEMENTATIONS[choice.backend]
  if window_BKGW is None and window_score_BKW is None:
    # Of forced blocks alone.
    make_lists = xla_token.lists
  num_row_blocks, num_heads = -(-num_keys // block_size), window_keys_BWKD.shape[2]
  return make_lists(window_BKGW, window_score_BKW, position_B, rules, num_row_blocks, num_heads)


def choose_select_blocks_of_token(
  q_BHD: Float[Shaped, "B H D"],
  window_keys_BWKD: Float[Shaped, "B W K D"],
  *,
  num_keys: int,
  block_size: int,
  implementation: OfTokenImplementation | None = None,
) -> dispatch.Choice:
  """What `select_blocks_of_token` runs for such arrays on the first device, and why.

  Takes a `jax.ShapeDtypeStruct` for an array, raises the same errors about implementations,
  and runs nothing.
  """
  (b, h, _), (_, w, k, _) = q_BHD.shape, window_keys_BWKD.shape
  candidates = {
    "mosaic_gpu": lambda: (
      devices.why_not_hopper()
      or devices.why_not_divided((q_BHD, window_keys_BWKD))
      or mosaic_gpu_token.why_not((b, k, h // k, w), -(-num_keys // block_size))
    ),
    "xla": dispatch.runs_anywhere,
  }
  return dispatch.choose(
    "select_blocks_of_token", implementation, candidates, automatic=AUTOMATIC
  )


def _probabilities(q_BHD, window_keys_BWKD, position_B, rules: Rules, coarse_keys_BWKD):
  """Of windows [B, K, G, W]."""
  (b, h, _), (_, w, k, _) = q_BHD.shape, window_keys_BWKD.shape
  if w == 0:
    return jnp.zeros((b, k, h // k, 0), jnp.float32)
  q_B1HD, position_B1 = q_BHD[:, None], position_B[:, None]
  first_B1, lse = jnp.zeros_like(position_B1), None
  if coarse_keys_BWKD is not None and coarse_keys_BWKD.shape[1]:
    coarse = dataclasses.replace(rules, pooling=rules.normalizer)
    seen = plan.bounds_at(position_B1, first_B1, coarse)
    lse = xla.log_normalizer(q_B1HD, coarse_keys_BWKD, seen, rules.scale)
  bounds = plan.bounds_at(position_B1, first_B1, rules)
  return xla.probabilities(q_B1HD, window_keys_BWKD, bounds, rules, lse)[:, 0]


def _check_windows(what: str, pooling: Pooling, x_BW: jax.Array | None, num_keys: int) -> None:
  wanted, found = pooling.num_windows(num_keys), 0 if x_BW is None else x_BW.shape[1]
  if found < wanted:
    raise ValueError(
      f"{num_keys} keys complete {wanted} windows {pooling}, got {what} of {found}"
    )


_IMPLEMENTATIONS = {"mosaic_gpu": mosaic_gpu_token.lists, "xla": xla_token.lists}
