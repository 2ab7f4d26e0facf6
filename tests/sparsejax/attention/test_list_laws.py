"""What holds for the lists of every method that selects blocks, whatever they score."""

import numpy as np
import pytest

from sparsejax import attention
from tests import small
from tests.sparsejax.attention import lists

FORCED = {  # initial, local
  "moba": (0, 1),
  "infllmv2": (1, 2),
  "dma": (1, 2),
  "ed_dma": (1, 2),
  "nosa": (1, 2),
}


def test_no_method_that_lists_blocks_is_left_out():
  others = {"nsa", "sliding_window"}  # whose lists need a layer, and which has none
  assert {*FORCED} | others == {*attention.SPARSE_METHODS}


@pytest.mark.parametrize("name", FORCED)
def test_lists_hold_what_they_must_and_nothing_else(name):
  """Forced blocks in; no future, no other document, no duplicate; as long as can be."""
  module, block = lists.make(name), lists.BLOCK
  q, k, v, tokens = lists.make_arrays(rows=2)
  segments = small.make_batch(rows=2, length=lists.T, num_documents=2, seed=2).segments
  params = lists.make_head() if module.has_key_scores else {}
  tokens = tokens.replace(segments_BT=segments)
  _, blocks = lists.run(module, (q, k, v, tokens), params=params)
  assert blocks.shape == (2, lists.T, lists.K, module.options.num_blocks)
  initial, local = FORCED[name]
  fullest = 0
  for row, t, head in np.ndindex(2, lists.T, lists.K):
    document = np.flatnonzero(segments[row] == segments[row, t])
    first, own = document[0] // block, t // block
    listed = [int(n) for n in blocks[row, t, head] if n >= 0]
    assert len(set(listed)) == len(listed) == min(own - first + 1, len(blocks[row, t, head]))
    assert first <= min(listed) <= max(listed) == own
    assert {n for n in range(first, own + 1) if n < first + initial or n > own - local} <= {
      *listed
    }
    fullest = max(fullest, own - first + 1)
  assert fullest > module.options.num_blocks  # there was something to choose
