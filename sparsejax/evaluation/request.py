"""What is asked of a checkpoint."""

import dataclasses
import pathlib

from sparsejax.evaluation import extrapolation, harness, perplexity
from sparsejax.evaluation.needles import task as needles
from sparsejax.evaluation.protocols import settings as protocols


@dataclasses.dataclass(frozen=True)
class Request:
  """What to evaluate, and how.

  Attributes:
    path: a workdir or a checkpoint, or several.
    step: of a workdir; None is the newest.
    tasks: names of `tasks.TASKS`.
    modes: of inference.
    budgets: keys a query reads under sparse inference; () is that of training.
    sources: data instead of the checkpoint's own.
    sequence_length: tokens per row; None is that of training.
    max_rows: rows of each source; 0 takes all.
    batch_size: rows at once; 0 is that of training.
    kernels: `auto` or `strict`; None is as trained.
    lengths: contexts, in tokens, after which is decoded; () is half of `sequence_length`. Of
      questions about needles, of windows of perplexity and of rows for sparsity, theirs; () is
      `sequence_length`.
    num_steps: that are decoded after a context.
    spare: slots for blocks beyond those of a list; () is 0, 16, 32 and 64 for locality, and
      all pages on the device for throughput.
    kv_gib: sizes of caches on the device, of which throughput takes its rows.
    about_perplexity: what text it is of.
    about_needles: what is asked about needles.
    lm_eval: what the task of that name asks.
    out: directory for the results; None is `eval/STEP` in the workdir, if there is one.
    compare: a workdir or a checkpoint that the others are compared with, sample by sample.
    rope_scaling: in place of the checkpoints' own.
    fresh: measure again what was measured before.
  """

  path: str | pathlib.Path | tuple[str | pathlib.Path, ...]
  step: int | None = None
  tasks: tuple[str, ...] = ("perplexity",)
  modes: tuple[str, ...] = perplexity.MODES
  budgets: tuple[int, ...] = ()
  sources: tuple[str, ...] = ()
  sequence_length: int | None = None
  max_rows: int = 0
  batch_size: int = 0
  kernels: str | None = None
  lengths: tuple[int, ...] = ()
  num_steps: int = 128
  spare: tuple[int, ...] = ()
  kv_gib: tuple[float, ...] = ()
  about_perplexity: protocols.Settings = dataclasses.field(default_factory=protocols.Settings)
  about_needles: needles.Settings = dataclasses.field(default_factory=needles.Settings)
  lm_eval: harness.Options = dataclasses.field(default_factory=harness.Options)
  out: str | pathlib.Path | None = None
  compare: str | pathlib.Path | None = None
  rope_scaling: extrapolation.RopeScaling | None = None
  fresh: bool = False

  @property
  def paths(self) -> tuple[str | pathlib.Path, ...]:
    """Workdirs and checkpoints, also of a single one."""
    return self.path if isinstance(self.path, tuple) else (self.path,)
