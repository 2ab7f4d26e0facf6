"""What a person watching sees: a bar on a terminal, plain lines elsewhere."""

import datetime
import resource
import sys

import jax
import tqdm


class Progress:
  """Prints lines, above a progress bar where there is a terminal."""

  def __init__(self, *, first_step: int, num_steps: int, is_quiet: bool = False):
    """Starts the bar.

    Args:
      first_step: steps taken before this start.
      num_steps: of the whole run.
      is_quiet: print nothing at all (every process but the first).
    """
    self._is_quiet = is_quiet
    self._bar = tqdm.tqdm(
      total=num_steps,
      initial=first_step,
      unit="step",
      dynamic_ncols=True,
      disable=is_quiet or not sys.stderr.isatty(),
    )

  def line(self, text: str) -> None:
    if not self._is_quiet:
      self._bar.write(text, file=sys.stdout)
      sys.stdout.flush()

  def advance(self) -> None:
    self._bar.update()

  def close(self) -> None:
    self._bar.close()


def step_line(step: int, num_steps: int, values: dict[str, float]) -> str:
  """The line of a logged step, in the order people know."""
  parts = [
    f"step {step}/{num_steps}",
    f"loss {values['train/loss']:.4f}",
    f"ce {values['train/ce']:.4f}",
  ]
  if values.get("train/align"):
    parts.append(f"align {values['train/align']:.2e}")
  parts += [
    f"grad {values['opt/grad_norm']:.2f}",
    f"lr {values['opt/learning_rate']:.1e}",
    f"| {_count(values['perf/tokens_per_second'])} tok/s",
  ]
  if "perf/mfu" in values:
    dense = values["perf/mfu_dense_equivalent"]
    parts.append(f"{values['perf/mfu']:.1%} MFU ({dense:.1%} dense-equivalent)")
  parts += [
    f"{values['perf/step_seconds']:.3g} s/step",
    f"data {values['perf/data_wait_share']:.1%}",
    f"| mem {memory_text(values)}",
    f"| ETA {_duration((num_steps - step) * values['perf/step_seconds'])}",
  ]
  if values["train/num_skipped"]:
    parts.append(f"| {values['train/num_skipped']:.0f} steps skipped (not finite)")
  return " ".join(parts)


def memory() -> dict[str, float]:
  """Memory of the first device in GiB, or of this process where devices do not say."""
  stats = jax.local_devices()[0].memory_stats()
  if not stats:
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"perf/memory_gib": peak_kib / 2**20}
  values = {"perf/memory_gib": stats.get("peak_bytes_in_use", stats["bytes_in_use"]) / 2**30}
  if "bytes_limit" in stats:
    values["perf/memory_limit_gib"] = stats["bytes_limit"] / 2**30
  return values


def memory_text(values: dict[str, float]) -> str:
  limit = values.get("perf/memory_limit_gib")
  return f"{values['perf/memory_gib']:.1f}" + (f"/{limit:.1f} GiB" if limit else " GiB")


def _count(number: float) -> str:
  for unit, size in (("M", 1e6), ("k", 1e3)):
    if number >= size:
      return f"{number / size:.3g}{unit}"
  return f"{number:.3g}"


def _duration(seconds: float) -> str:
  return str(datetime.timedelta(seconds=round(seconds)))
