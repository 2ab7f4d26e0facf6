"""What a task will do, said before it is done: units of work, and what is made of them.

A unit is what an interrupted evaluation does not do again. Its value is JSON: it has all that
its task's answer needs of it, and, where units of two checkpoints can be compared, what was
found for every sample.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

from sparsejax import errors
from sparsejax.evaluation import subject as subjects


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
  """What was found of each of many independent samples: a sum, and what it is divided by.

  Attributes:
    what: of which data, kind or task the samples are.
    mode: `full` or `sparse`.
    budget: keys a query reads; None under full inference.
    metric: what is measured, with its unit: `loss (nats/token)`.
    sums: of each sample; the metric is their total, divided by that of
    weights: of each sample, as numbers of tokens, or ones.
    asked: of what was asked; equal if the samples are the same.
    needs_tokenizer: whether the weights, or what was asked, are tokens.
  """

  what: str
  mode: str
  budget: int | None
  metric: str
  sums: tuple[float, ...]
  weights: tuple[float, ...]
  asked: str = ""
  needs_tokenizer: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
  """A piece of work.

  Attributes:
    key: all that the value depends on beside the checkpoint, its config and the program; JSON
      with the entry `task`, and `mode`, `budget` and `length` if there are any.
    measure: does it; what it returns is JSON, with None for what is not finite (`as_json`).
    samples: what the value says of single samples; None of what is not compared.
    files: below the directory of results, which `measure` leaves.
    text: of the text that samples are pieces of, where these are the same whatever the
      tokenizer; else None. Its key has `data`, which depends on the tokenizer.
  """

  key: Mapping[str, Any]
  measure: Callable[[subjects.Subject], Any]
  samples: Callable[[Any], list[Samples]] | None = None
  files: tuple[str, ...] = ()
  text: str | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
  """A task, ready to be done.

  Attributes:
    units: of it.
    tell: makes an answer of their values.
  """

  units: tuple[Unit, ...]
  tell: Callable[[Sequence[Any]], "Told"]


class Told(NamedTuple):
  """An answer.

  Attributes:
    cells: dataclasses, one for each line.
    text: tables of them as markdown.
    pictures: files that were drawn.
  """

  cells: Sequence[Any]
  text: str
  pictures: tuple[pathlib.Path, ...] = ()


def measure(units: Sequence[Unit], subject: subjects.Subject) -> list[Any]:
  """Values of all units, none taken from before."""
  return [as_json(unit.measure(subject)) for unit in units]


def as_json(value: Any) -> Any:
  """A value as it comes back from a file: tuples are lists, numbers are Python's.

  Numbers that are not finite, for which JSON has no word, are None.
  """
  return json.loads(json.dumps(value, default=_plain), parse_constant=lambda name: None)


def text(value: Any, *, indent: int) -> str:
  """JSON for a file, by `as_json`; lists of numbers are in one line each."""
  written = json.dumps(as_json(value), indent=indent, allow_nan=False)
  # Strings have no line breaks of their own, and within a match there is no string.
  return re.sub(r'\[\n[^\[\]{}"]*\]', _in_one_line, written) + "\n"


def _in_one_line(match: re.Match) -> str:
  return re.sub(r"\s+", " ", match[0]).replace("[ ", "[").replace(" ]", "]")


def _has_no_default(field: dataclasses.Field) -> bool:
  missing = dataclasses.MISSING
  return field.default is missing and field.default_factory is missing


def restore(kind: type, record: Mapping[str, Any]) -> Any:
  """A dataclass from its record as JSON: lists are tuples, None in place of a float is NaN.

  Raises:
    DataError: the record is of another version of the program, with other fields.
  """
  fields = {field.name: field for field in dataclasses.fields(kind)}
  needed = {name for name, x in fields.items() if _has_no_default(x)}
  others = sorted((needed - record.keys()) | (record.keys() - fields.keys()))
  if others:
    raise errors.DataError(
      f"what was measured before has other numbers ({', '.join(others)}) than this version of "
      "the program measures; give --fresh to measure everything again."
    )
  return kind(
    **{
      name: math.nan if value is None and fields[name].type is float else tuples(value)
      for name, value in record.items()
    }
  )


def floats(values: Sequence[float | None]) -> tuple[float, ...]:
  """Numbers from JSON, NaN where they were not finite."""
  return tuple(math.nan if x is None else float(x) for x in values)


def tuples(value: Any) -> Any:
  """The same with all lists as tuples, as dataclasses have them."""
  if isinstance(value, list):
    return tuple(tuples(x) for x in value)
  return value


def digest(value: Any) -> str:
  """A short hash of what JSON can hold."""
  text = json.dumps(value, sort_keys=True, default=_plain)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
  """What numpy and dataclasses have in place of JSON's own."""
  if dataclasses.is_dataclass(value):
    return dataclasses.asdict(value)
  return value.tolist()
