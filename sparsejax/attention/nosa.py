"""NOSA (arXiv:2510.13602): some blocks by the query, the rest by the keys alone.

Of k blocks in a list, k_q are chosen by the query, as in InfLLM-V2, and k_e = k - k_q by an
eviction head's scores of keys, which are the same for all queries; forced blocks are among the
k_e. The scores are added, as they are, to the scaled scores of attention in both streams,
which is the one way by which the head learns: selection carries no gradient.

Locality, the paper's theorem, for queries t - 1 and t of a document:

  |list(t) minus list(t - 1)| <= k_q,  and one more where t is the first query of a block

so that lists which are full share k_e / k of their blocks with the one before, less 1 / k at
the first query of a block, which nothing can have listed before. It holds because the k_e
best blocks by a score that no query enters are in every list, chosen by the query or not: a
new candidate (the block that leaves the local window was read already) replaces at most one.
With `local_window="released"` queries choose one block less, and the bound is better by one.
"""

from typing import ClassVar

from sparsejax.attention import eviction, infllmv2, method


class Nosa(infllmv2.InfllmV2):
  """Forced blocks, `num_query_aware` by the query, and the best others by their keys."""

  has_key_scores: ClassVar[bool] = True

  def setup(self):
    self.head = eviction.EvictionHead(self.options.nosa.eviction_head)

  def key_scores(self, v_BTKD):
    return self.head(v_BTKD)

  @classmethod
  def num_by_query(cls, options: method.Options) -> int:
    # Released: 1 + 16 + 16 blocks, 18 of which are forced there; 17 in the paper.
    forced = options.infllmv2
    chosen = forced.num_initial + forced.num_local + options.nosa.num_query_aware
    return max(chosen, forced.num_forced)
