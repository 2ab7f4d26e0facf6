"""How a task of lm-evaluation-harness wants texts generated: its `generation_kwargs`."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from sparsejax import errors
from sparsejax.decoding import sampling

# What the harness's own models generate where a task says nothing.
USUAL_NEW_TOKENS = 256

# One meaning, several names; the first that is there counts.
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

# Settings of other libraries, and the values that change nothing.
_NEUTRAL = dict(
  num_beams=1,
  num_return_sequences=1,
  repetition_penalty=1.0,
  length_penalty=1.0,
  no_repeat_ngram_size=0,
  min_p=0.0,
  early_stopping=False,
  use_cache=True,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What `stop_strings.continue_until` takes.

  Attributes:
    stops: strings that end a text.
    max_new_tokens: after which it ends at the latest.
    draw: how ids are drawn.
  """

  stops: tuple[str, ...]
  max_new_tokens: int
  draw: sampling.Sampling


def parse(given: Mapping[str, Any]) -> Settings:
  """Settings of a task.

  Without `do_sample` a temperature above 0 draws; the most likely ids are taken where there is
  none, or `do_sample` is false, as the harness's own models do.

  Raises:
    ConfigError: a setting that there is not here, or a value that makes no sense.
  """
  left = dict(given)
  until = left.pop("until", None) or ()
  stops = (until,) if isinstance(until, str) else tuple(until)
  counts = [left.pop(name, None) for name in _NEW_TOKENS]
  max_new_tokens = int(next((n for n in counts if n is not None), USUAL_NEW_TOKENS))
  temperature = float(left.pop("temperature", None) or 0.0)
  is_drawn = left.pop("do_sample", None) is not False and temperature > 0
  ranks = {name: left.pop(name) for name in ("top_k", "top_p") if name in left}
  for name, value in left.items():
    if _NEUTRAL.get(name, ...) != value:
      raise errors.ConfigError(
        f"generation_kwargs of a task ask for {name}={value!r}, which sparsejax does not "
        "have; leave it out of the task's file."
      )
  # Of ids that are not drawn, no rank is asked for.
  draw = sampling.Sampling(temperature=temperature, **ranks) if is_drawn else _GREEDY
  return Settings(stops=stops, max_new_tokens=max_new_tokens, draw=draw)


_GREEDY = sampling.Sampling(temperature=0)
