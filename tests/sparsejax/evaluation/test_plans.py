"""Values as JSON, in files and back."""

import json
import math

import pytest

from sparsejax import errors
from sparsejax.evaluation import diagnostics, plans


def test_lists_of_numbers_are_lines_and_strings_are_as_they_were():
  value = dict(
    numbers=[1, 2.5, math.nan, -3e-05],
    lists=[[1, 2], [], [None, True]],
    texts=["[\n 1,\n 2\n]", "[ 1, 2 ]"],
    mixed=[1, "a"],
    records=[dict(x=[1])],
  )
  text = plans.text(value, indent=1)
  assert json.loads(text) == plans.as_json(value)
  assert ' "numbers": [1, 2.5, null, -3e-05],\n' in text
  assert ' "lists": [\n  [1, 2],\n  [],\n  [null, true]\n ],\n' in text
  assert '   "x": [1]\n' in text
  # What has no such list is as json has it.
  plain = dict(a="x", b=dict(c=1.5))
  assert plans.text(plain, indent=2) == json.dumps(plain, indent=2) + "\n"


@pytest.mark.parametrize("change", [dict(value=None), dict(error=0.1)], ids=["fewer", "more"])
def test_what_another_version_measured_is_refused(change):
  record = dict(name="gap", value=1.0, layers=[1.0]) | change
  record = {name: x for name, x in record.items() if x is not None}
  with pytest.raises(errors.DataError, match=rf"\({next(iter(change))}\).*give --fresh"):
    plans.restore(diagnostics.Cell, record)
