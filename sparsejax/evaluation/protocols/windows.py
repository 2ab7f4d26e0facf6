"""Windows over a text in which every token counts once, and windows drawn from texts.

A text is `tokens[0], ..., tokens[n]`, of which the first is read alone and n are scored. A
window of W tokens reads W of them and predicts as many, each the one behind it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Span(NamedTuple):
  """A window: reads `tokens[start : stop - 1]`, and of what it predicts scores from `first` on.

  Targets are `tokens[start + 1 : stop]`; those that count are `tokens[first : stop]`.
  """

  start: int
  first: int
  stop: int


def sliding(num_targets: int, window: int, stride: int) -> Iterator[Span]:
  """Windows that begin `stride` tokens apart; the last `stride` targets of each count.

  Of the first, all count. The last ends with the text and begins where its turn is, so that
  all but the first window's targets follow `window - stride` tokens of context at least, and
  `window` at most. This is the strided evaluation of Press et al. (arXiv:2012.15832) as the
  documentation of Hugging Face's transformers has it ("Perplexity of fixed-length models").

  Args:
    num_targets: n.
    window: W.
    stride: from 1 to W.
  """
  for done, end in _steps(num_targets, window, stride):
    yield Span(max(0, done + stride - window) if done else 0, done + 1, end + 1)


def rolling(num_targets: int, window: int, stride: int) -> Iterator[Span]:
  """As `sliding`, but the last window begins so early that it is as long as the others.

  With a stride of W, those are the rolling windows of lm-evaluation-harness
  (`get_rolling_token_windows` with a context of 1).
  """
  for done, end in _steps(num_targets, window, stride):
    yield Span(end - window if done else 0, done + 1, end + 1)


def _steps(num_targets: int, window: int, stride: int) -> Iterator[tuple[int, int]]:
  """How many targets windows before have scored, and how many with this one."""
  done = 0
  while done < num_targets:
    end = min(done + stride if done else window, num_targets)
    yield done, end
    done = end


def drawn(
  sizes: Sequence[int],
  windows: Sequence[int],
  stride: int,
  *,
  num_samples: int,
  seed: int,
) -> dict[int, list[tuple[int, Span]]]:
  """Windows from random places of documents; their last `stride` targets count.

  Windows of the greatest length begin every `stride` tokens of a document, so long as they
  fit in it. Of all of these, `num_samples` are drawn without replacement; shorter windows end
  where those do. All lengths score the same tokens, with more or less context.

  Args:
    sizes: tokens of every document.
    windows: lengths of windows.
    stride: from 1 to the shortest of them.
    num_samples: how many; all if there are fewer.
    seed: of the draw, `numpy.random.default_rng`.

  Returns:
    For each length pairs of a document and a span of it, in the order of the text.
  """
  longest = max(windows)
  # A window of W tokens predicts one token more than it reads.
  places_M = np.maximum(0, (np.asarray(sizes) - 1 - longest) // stride + 1)
  ends_M = np.cumsum(places_M)
  total = int(ends_M[-1])
  chosen = np.arange(total)
  if num_samples < total:
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(total, num_samples, replace=False))
  found = {window: [] for window in windows}
  for number in chosen:
    document = int(np.searchsorted(ends_M, number, side="right"))
    place = int(number - (ends_M[document] - places_M[document]))
    stop = place * stride + longest + 1
    for window in windows:
      found[window].append((document, Span(stop - 1 - window, stop - stride, stop)))
  return found
