"""Which implementation is taken, and what is said about it; with invented candidates."""

import pytest

from pallas_kernels import dispatch

OLD = "needs a Hopper GPU, this is cpu"
NARROW = "takes head sizes (64, 128), not 96"
BY_NAME = "runs by name or with strict"
LONG = ("mosaic_gpu", "triton", "xla")


def choose(implementation, *, mosaic_gpu=None, triton=None, automatic=LONG):
  candidates = {
    "mosaic_gpu": lambda: mosaic_gpu,
    "triton": lambda: triton,
    "xla": dispatch.runs_anywhere,
    "reference": dispatch.runs_anywhere,
  }
  return dispatch.choose("op", implementation, candidates, automatic=automatic)


@pytest.mark.parametrize("implementation", [None, "auto"])
@pytest.mark.parametrize(
  ("limits", "automatic", "said"),
  [
    ({}, LONG, "op: mosaic_gpu (the first choice)"),
    (dict(mosaic_gpu=OLD), LONG, f"op: triton (mosaic_gpu {OLD})"),
    (dict(triton=NARROW), LONG, "op: mosaic_gpu (the first choice)"),
    (
      dict(mosaic_gpu=OLD, triton=NARROW),
      LONG,
      f"op: xla (mosaic_gpu {OLD}; triton {NARROW})",
    ),
    # Kernels that are not tried: what would run is said to, what would not is not.
    ({}, ("xla",), f"op: xla (mosaic_gpu {BY_NAME}; triton {BY_NAME})"),
    (dict(mosaic_gpu=OLD), ("xla",), f"op: xla (mosaic_gpu {OLD}; triton {BY_NAME})"),
    (
      dict(mosaic_gpu=OLD),
      ("mosaic_gpu", "xla"),
      f"op: xla (mosaic_gpu {OLD}; triton {BY_NAME})",
    ),
    (dict(triton=OLD), ("triton", "mosaic_gpu", "xla"), f"op: mosaic_gpu (triton {OLD})"),
  ],
)
def test_auto_takes_the_first_that_can_run_and_says_what_it_passed_over(
  implementation, limits, automatic, said
):
  assert str(choose(implementation, **limits, automatic=automatic)) == said


@pytest.mark.parametrize(
  ("limits", "said"),
  [
    ({}, "op: mosaic_gpu (strict)"),
    (dict(mosaic_gpu=OLD), f"op: triton (strict; mosaic_gpu {OLD})"),
  ],
)
@pytest.mark.parametrize("automatic", [LONG, ("xla",)])
def test_strict_takes_kernels_whether_or_not_auto_does(automatic, limits, said):
  assert str(choose("strict", **limits, automatic=automatic)) == said


def test_strict_never_falls_back():
  with pytest.raises(ValueError) as caught:
    choose("strict", mosaic_gpu=OLD, triton=NARROW)
  assert str(caught.value) == (
    f"op: implementation='strict' cannot run: mosaic_gpu {OLD}; triton {NARROW}; 'xla' runs "
    "anywhere"
  )
  assert isinstance(caught.value, dispatch.CannotRunError)
  assert (caught.value.op, caught.value.asked) == ("op", "strict")
  assert caught.value.reasons == f"mosaic_gpu {OLD}; triton {NARROW}"


def test_a_name_is_taken_or_refused_and_nothing_else_is_asked():
  def never():
    raise AssertionError("asked for nothing")

  candidates = {"mosaic_gpu": never, "triton": lambda: None, "xla": never}
  choice = dispatch.choose("op", "triton", candidates, automatic=("xla",))
  assert choice == ("op", "triton", "asked for")
  candidates["triton"] = lambda: NARROW
  with pytest.raises(ValueError, match=r"='triton' cannot run: triton takes .*; 'xla' runs"):
    dispatch.choose("op", "triton", candidates, automatic=("xla",))


def test_what_auto_does_not_come_to_is_not_asked():
  def never():
    raise AssertionError("asked for nothing")

  candidates = {"mosaic_gpu": lambda: None, "triton": never, "xla": never}
  assert dispatch.choose("op", None, candidates, automatic=LONG).backend == "mosaic_gpu"
  assert dispatch.choose("op", "strict", candidates, automatic=LONG).backend == "mosaic_gpu"


def test_an_unknown_name_is_refused_with_those_there_are():
  with pytest.raises(KeyError) as caught:
    choose("cuda")
  assert caught.value.args == (
    "no implementation 'cuda' of op: auto, strict, mosaic_gpu, triton, xla, reference",
  )


def test_an_operation_without_kernels_says_so():
  candidates = {"xla": dispatch.runs_anywhere, "reference": dispatch.runs_anywhere}
  choice = dispatch.choose("op", None, candidates, automatic=("xla",))
  assert choice == ("op", "xla", "it has no GPU kernel")
  with pytest.raises(ValueError, match=r"op: .*='strict' cannot run: it has no GPU kernel"):
    dispatch.choose("op", "strict", candidates, automatic=("xla",))
