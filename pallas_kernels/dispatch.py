"""Which implementation of an operation runs, and why. It looks at no device itself."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

# An array, or what one would look like: choosing reads shapes and dtypes alone.
Shaped = jax.Array | jax.ShapeDtypeStruct

# Names of GPU kernels, wherever they occur; any other implementation is not one.
KERNELS = ("cudnn", "mosaic_gpu", "triton")

# None if an implementation can run, else a fragment: "takes bfloat16, not float32".
type WhyNot = Callable[[], str | None]


class Choice(NamedTuple):
  """What runs.

  Attributes:
    op: the operation.
    backend: its implementation.
    reason: why this one, in words.
  """

  op: str
  backend: str
  reason: str

  def __str__(self) -> str:
    return f"{self.op}: {self.backend} ({self.reason})"


class CannotRunError(ValueError):
  """Nothing that was asked for can run.

  Attributes:
    op: the operation.
    asked: `auto`, `strict` or a name.
    reasons: for everything that was asked for, why not.
  """

  def __init__(self, op: str, asked: str, reasons: str, fallback: str):
    super().__init__(
      f"{op}: implementation={asked!r} cannot run: {reasons}; {fallback!r} runs anywhere"
    )
    self.op = op
    self.asked = asked
    self.reasons = reasons


def runs_anywhere() -> None:
  """The `WhyNot` of an implementation without limits."""


def choose(
  op: str,
  implementation: str | None,
  candidates: Mapping[str, WhyNot],
  *,
  automatic: tuple[str, ...],
) -> Choice:
  """The first implementation that is allowed and can run.

  Args:
    op: what to call the operation.
    implementation: None or `auto` allows those of `automatic`; `strict` allows GPU kernels
      alone; a name allows that one.
    candidates: every implementation there is, the preferred first, with what tells whether
      it can run. Only those that bear on the choice or its reason are asked.
    automatic: names in the order to try; the last one must run anywhere.

  Raises:
    CannotRunError: nothing that is allowed can run; a kind of ValueError.
    KeyError: no such implementation.
  """
  asked = implementation or "auto"
  allowed = {
    "auto": automatic,
    "strict": tuple(name for name in candidates if name in KERNELS),
    **{name: (name,) for name in candidates},
  }
  if asked not in allowed:
    raise KeyError(f"no implementation {asked!r} of {op}: {', '.join(allowed)}")
  refused = {}
  for name in allowed[asked]:
    why = candidates[name]()
    if why is None:
      return Choice(op, name, _reason(name, asked, candidates, refused))
    refused[name] = why
  reasons = "; ".join(_sentences(refused)) or "it has no GPU kernel"
  raise CannotRunError(op, asked, reasons, automatic[-1])


def _reason(chosen: str, asked: str, candidates, refused: dict[str, str]) -> str:
  if asked == chosen:
    return "asked for"
  if asked == "strict":
    return "; ".join(["strict", *_sentences(refused)])
  kernels = [name for name in candidates if name in KERNELS]
  if not kernels:
    return "it has no GPU kernel"
  preferred = list(candidates)[: list(candidates).index(chosen)]
  passed_over = refused | {
    name: candidates[name]() or "runs by name or with strict"
    for name in kernels
    if name in preferred and name not in refused
  }
  return "; ".join(_sentences(passed_over)) or "the first choice"


def _sentences(fragments: Mapping[str, str]) -> list[str]:
  return [f"{name} {fragment}" for name, fragment in fragments.items()]
