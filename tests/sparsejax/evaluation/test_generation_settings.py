"""What tasks of lm-evaluation-harness say of generation, and where a text ends."""

import pytest

from sparsejax import errors
from sparsejax.decoding import sampling
from sparsejax.evaluation import generation_settings, stop_strings


@pytest.mark.parametrize(
  ("given", "stops", "max_new_tokens", "draw"),
  [
    ({}, (), 256, dict(temperature=0)),
    (dict(until="\n", max_gen_toks=5), ("\n",), 5, dict(temperature=0)),
    (dict(until=["a", "b"], max_tokens=7), ("a", "b"), 7, dict(temperature=0)),
    (dict(max_new_tokens=3, max_gen_toks=9), (), 9, dict(temperature=0)),
    (dict(until=None, do_sample=False, temperature=1), (), 256, dict(temperature=0)),
    (dict(do_sample=True, temperature=0.0), (), 256, dict(temperature=0)),
    (dict(temperature=0.5, top_p=0.9), (), 256, dict(temperature=0.5, top_p=0.9)),
    (dict(do_sample=True, temperature=2, top_k=4), (), 256, dict(temperature=2.0, top_k=4)),
    # Ranks of ids that are not drawn, and what changes nothing.
    (dict(do_sample=False, top_p=0, num_beams=1), (), 256, dict(temperature=0)),
  ],
)
def test_settings(given, stops, max_new_tokens, draw):
  before = dict(given)
  assert generation_settings.parse(given) == generation_settings.Settings(
    stops=stops, max_new_tokens=max_new_tokens, draw=sampling.Sampling(**draw)
  )
  assert given == before


@pytest.mark.parametrize(
  "more", [dict(num_beams=4), dict(repetition_penalty=1.2), dict(x=None)]
)
def test_what_would_change_texts_is_refused(more):
  with pytest.raises(errors.ConfigError, match=f"ask for {next(iter(more))}="):
    generation_settings.parse(dict(until="a", **more))


@pytest.mark.parametrize(
  ("stops", "text"),
  [((), "one two three"), (("two", "ne"), "o"), (("", "three"), "one two "), (("x",), None)],
)
def test_a_text_is_cut_at_the_first_of_its_stops(stops, text):
  whole = "one two three"
  assert stop_strings.cut(whole, stops) == (whole if text is None else text)
