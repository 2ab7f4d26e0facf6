"""DMA and ED-DMA: keys are read or not by a score of their own, whoever asks.

The head is that of Dynamic Mask Attention (arXiv:2508.02124), `eviction.EvictionHead`; its
score is added to the scores of each key as a bias, in both streams, and selection takes what
it takes from the score alone, without a gradient. `dma` exponentiates the score, as the paper
does; `ed_dma` does not (arXiv:2510.13602), so that exponentials are taken in the softmax only.

DMA itself keeps single keys, the w best ones that a query may see. Here blocks are kept, so
that the kernels can read them: a block scores as in NOSA, by the largest of the mean scores
of its windows, and the forced blocks of InfLLM-V2 are kept whatever they score. That is NOSA
in which queries choose nothing.
"""

from typing import ClassVar

from sparsejax.attention import eviction, infllmv2, method


class Dma(infllmv2.InfllmV2):
  """Forced blocks, and the best others by their exponentiated scores."""

  has_key_scores: ClassVar[bool] = True
  kind: ClassVar[eviction.Kind] = "dma"

  def setup(self):
    self.head = eviction.EvictionHead(self.kind)

  def key_scores(self, v_BTKD):
    return self.head(v_BTKD)

  @classmethod
  def num_by_query(cls, options: method.Options) -> int:
    return options.infllmv2.num_forced


class EdDma(Dma):
  """The same by the scores before their exponential."""

  kind: ClassVar[eviction.Kind] = "ed_dma"
