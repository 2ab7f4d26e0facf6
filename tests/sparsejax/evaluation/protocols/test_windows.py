"""Windows: every token once, each with the context that its definition gives."""

import numpy as np
import pytest

from sparsejax.evaluation.protocols import windows

CASES = [(n, w, s) for n in (1, 2, 7, 8, 9, 20, 33) for w in (1, 4, 8) for s in (1, 3, 4, 8)]
CASES = [(n, w, s) for n, w, s in CASES if s <= w]


def test_windows_by_hand():
  """Eleven tokens: the first is read alone, ten are scored."""
  assert list(windows.sliding(10, 4, 3)) == [(0, 1, 5), (3, 5, 8), (6, 8, 11)]
  assert list(windows.sliding(9, 4, 3)) == [(0, 1, 5), (3, 5, 8), (6, 8, 10)]
  assert list(windows.rolling(9, 4, 3)) == [(0, 1, 5), (3, 5, 8), (5, 8, 10)]
  assert list(windows.sliding(5, 4, 4)) == [(0, 1, 5), (4, 5, 6)]
  assert list(windows.rolling(5, 4, 4)) == [(0, 1, 5), (1, 5, 6)]
  assert list(windows.rolling(3, 4, 2)) == [(0, 1, 4)]
  assert list(windows.rolling(0, 4, 2)) == []


@pytest.mark.parametrize(("n", "window", "stride"), CASES)
@pytest.mark.parametrize("cut", [windows.sliding, windows.rolling])
def test_every_token_counts_once_and_none_reads_too_much(cut, n, window, stride):
  spans = list(cut(n, window, stride))
  scored = [place for span in spans for place in range(span.first, span.stop)]
  assert scored == list(range(1, n + 1))
  for span in spans:
    assert 0 <= span.start < span.first < span.stop <= span.start + window + 1
  for span in spans[1:]:
    assert span.first - span.start >= window - stride + 1
  if cut is windows.rolling and len(spans) > 1:
    assert {span.stop - span.start for span in spans} == {window + 1}


@pytest.mark.parametrize(("n", "window", "stride"), CASES)
def test_sliding_is_the_loop_of_the_documentation(n, window, stride):
  """`window + 1` tokens begin `stride` apart; labels before the new ones are masked."""
  expected, scored_until, size = [], 0, n + 1
  for begin in range(0, size, stride):
    end = min(begin + window + 1, size)
    # The first token of a window is no target of it.
    expected.append((begin, max(scored_until, begin + 1), end))
    scored_until = end
    if end == size:
      break
  assert list(windows.sliding(n, window, stride)) == expected


def test_rolling_is_that_of_the_harness():
  utils = pytest.importorskip("lm_eval.utils")
  for n, window, stride in CASES:
    whole = list(range(1000, 1000 + n + 1))
    theirs = [
      (list(read), list(scored))
      for read, scored in utils.get_rolling_token_windows(
        whole[1:], whole[0], window, window - stride + 1
      )
    ]
    ours = [
      (whole[span.start : span.stop - 1], whole[span.first : span.stop])
      for span in windows.rolling(n, window, stride)
    ]
    assert ours == theirs


def draw(sizes, lengths=(4, 8), stride=2, num_samples=10**6, seed=42):
  return windows.drawn(sizes, lengths, stride, num_samples=num_samples, seed=seed)


def test_windows_are_drawn_within_documents():
  """Of 13 tokens, windows of 8 and the token behind them begin at 0, 2 and 4."""
  found = draw([8, 13, 9])
  assert found[8] == [
    (1, (0, 7, 9)),
    (1, (2, 9, 11)),
    (1, (4, 11, 13)),
    (2, (0, 7, 9)),
  ]
  # The same targets, with less context.
  assert found[4] == [(m, (stop - 5, first, stop)) for m, (_, first, stop) in found[8]]
  assert draw([8, 3]) == {4: [], 8: []}


def test_a_draw_is_by_its_seed_and_without_repetition():
  sizes = [100, 7, 300]
  every = draw(sizes)[8]
  assert len(every) == (100 - 9) // 2 + 1 + (300 - 9) // 2 + 1
  some = draw(sizes, num_samples=60)[8]
  assert len({*some}) == 60
  assert some == sorted(some)
  assert {*some} < {*every}
  assert draw(sizes, num_samples=60)[8] == some
  assert draw(sizes, num_samples=60, seed=43)[8] != some
  # From all over the documents.
  assert {m for m, _ in some} == {0, 2}
  assert np.ptp([span.start for m, span in some if m == 2]) > 200
