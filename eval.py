r"""Evaluates checkpoints.

  python eval.py --workdir=runs/smoke
  python eval.py --workdir=runs/smoke --modes=full,sparse --budgets=32,64,128
  python eval.py --workdir=runs/a --tasks=needle --lengths=1024,2048,4096 --budgets=256,512
  python eval.py --workdir=runs/a,runs/b --compare=runs/full --tasks=perplexity,needle \
    --budgets=64,128,256,512 --out=results/mine

Prints tables and saves them, with everything they depend on and report.html, in --out or
WORKDIR/eval/STEP. A command that was interrupted goes on where it was when it is given again.
"""

import math
import sys

from absl import app, flags

from configs import base
from sparsejax import command_line, errors
from sparsejax.data import documents
from sparsejax.evaluation import extrapolation, harness, table, tasks
from sparsejax.evaluation import request as requests
from sparsejax.evaluation.needles import haystacks
from sparsejax.evaluation.needles import task as needles
from sparsejax.evaluation.protocols import settings as protocols

WORKDIR = flags.DEFINE_list(
  "workdir", [], "What train.py wrote, or one checkpoint of it; or several of these."
)
STEP = flags.DEFINE_integer("step", None, "Checkpoint to take; the newest if not given.")
TASKS = flags.DEFINE_list(
  "tasks",
  ["perplexity"],
  "What to ask: perplexity; block_lists, which the model chooses; diagnostics; locality, what "
  "of its lists stays from one token to the next; throughput of decoding; needle, what it "
  "finds in long contexts; lm_eval, tasks of lm-evaluation-harness; sparsity, where heads' "
  "attention lies and what is lost by reading some of it.",
)
MODES = flags.DEFINE_list(
  "modes",
  ["full", "sparse"],
  "Modes of inference, of all tasks but block_lists, diagnostics and locality.",
)
BUDGETS = flags.DEFINE_list(
  "budgets", [], "Keys a query reads when sparse; as trained if none."
)
SOURCES = flags.DEFINE_list("sources", [], "Prepared data; the training data's if none.")
LENGTH = flags.DEFINE_integer("sequence_length", None, "Tokens per row; as trained if none.")
ROWS = flags.DEFINE_integer("max_rows", 0, "Rows of each source; 0 takes all.")
BATCH = flags.DEFINE_integer("batch_size", 0, "Rows at once; 0 is as trained.")
KERNELS = flags.DEFINE_string(
  "kernels", None, "auto: what this machine has; strict: GPU kernels alone; else as trained."
)
LENGTHS = flags.DEFINE_list(
  "lengths",
  [],
  "Contexts of locality and throughput, in tokens (half of a row if none); windows of "
  "perplexity, rows of sparsity and questions of needle (a row if none), and texts that RULER "
  "makes.",
)
PROTOCOL = flags.DEFINE_string(
  "protocol",
  "rows",
  "How perplexity reads: rows, packed as in training; sliding windows over all text; "
  "documents, each by itself; or as papers have it: pg19, wikitext (perplexity per word).",
)
CORPUS = flags.DEFINE_list(
  "corpus",
  [],
  "Text that perplexity is of: files and folders, as data.prepare reads them, or what it made.",
)
STRIDE = flags.DEFINE_integer(
  "stride", None, "Tokens between windows of perplexity; the protocol's own if none."
)
DECODE = flags.DEFINE_bool(
  "decode", False, "Whether perplexity is of decoding with a cache, not of a forward pass."
)
TEXT_KEY = flags.DEFINE_string(
  "text_key", "text", "Field of a JSON line, or column of a table, with the text of --corpus."
)
SEPARATOR = flags.DEFINE_string(
  "separator", "", "String between the documents of one text file of --corpus."
)
BAD_UTF8 = flags.DEFINE_string(
  "on_bad_utf8", "fail", "What becomes of a document of --corpus: fail, skip or replace."
)
STEPS = flags.DEFINE_integer("num_steps", 128, "Tokens after a context.")
SPARE = flags.DEFINE_list(
  "spare",
  [],
  "Slots beyond those of a list: of locality, 0, 16, 32 and 64 if none; of throughput with "
  "pages in the host's memory, after the device alone.",
)
KV_GIB = flags.DEFINE_list(
  "kv_gib",
  [],
  "Caches on the device: throughput decodes as many rows as fit, not --batch_size.",
)
KINDS = flags.DEFINE_list("needle_kinds", [*needles.KINDS], "Kinds of questions of needle.")
HAYSTACK = flags.DEFINE_string(
  "haystack", "noise", f"What needles are hidden in: {', '.join(haystacks.NAMES)}."
)
DEPTHS = flags.DEFINE_list(
  "depths", ["0", "25", "50", "75", "100"], "Where needles are, percent of the haystack."
)
QUESTIONS = flags.DEFINE_integer("questions", 20, "Of each kind, length and depth.")
SEED = flags.DEFINE_integer("seed", 0, "Of the questions of needle.")
HARNESS_TASKS = flags.DEFINE_list(
  "lm_eval_tasks",
  [],
  "Of lm_eval: tasks of lm-evaluation-harness, or ssa, ssa_needle, longbench_en, ruler.",
)
HARNESS_PATH = flags.DEFINE_string("lm_eval_path", None, "Folder of more such tasks, YAML.")
SHOTS = flags.DEFINE_integer(
  "num_fewshot", None, "Examples before each question of lm_eval; as its tasks say if none."
)
PREFILL = flags.DEFINE_enum(
  "prefill_mode",
  None,
  ["full", "sparse"],
  "How lm_eval reads prompts of texts that the model writes, if not by the mode; NOSA's tables "
  "have full.",
)
LIMIT = flags.DEFINE_integer("limit", None, "Samples of each task of lm_eval; all if none.")
OUT = flags.DEFINE_string("out", None, "Where results go; WORKDIR/eval/STEP if not given.")
COMPARE = flags.DEFINE_string(
  "compare", None, "Workdir or checkpoint to compare the others with, on the same samples."
)
ROPE = flags.DEFINE_list(
  "rope_scaling",
  [],
  "In place of a checkpoint's: default, or llama3,factor=4 and more of model.rope_scaling.",
)
FRESH = flags.DEFINE_bool("fresh", False, "Measure again what was measured before.")


# What only some tasks read.
OF_TASKS = {
  ("locality", "throughput"): (STEPS, SPARE),
  ("throughput",): (KV_GIB,),
  ("perplexity",): (PROTOCOL, CORPUS, STRIDE, DECODE, TEXT_KEY, SEPARATOR, BAD_UTF8),
  ("needle",): (KINDS, HAYSTACK, DEPTHS, QUESTIONS, SEED),
  ("lm_eval",): (HARNESS_TASKS, HARNESS_PATH, SHOTS, LIMIT, PREFILL),
}


def main(arguments: list[str]) -> int:
  if len(arguments) > 1:
    raise errors.ConfigError(
      f"{arguments[1]} sets a config; a checkpoint is evaluated with its own."
    )
  if not WORKDIR.value:
    raise errors.ConfigError("name the --workdir that train.py wrote to.")
  _refuse_idle()
  request = requests.Request(
    path=tuple(WORKDIR.value),
    step=STEP.value,
    tasks=tuple(TASKS.value),
    modes=tuple(MODES.value),
    budgets=_numbers(BUDGETS),
    sources=tuple(SOURCES.value),
    sequence_length=LENGTH.value,
    max_rows=ROWS.value,
    batch_size=BATCH.value,
    kernels=KERNELS.value,
    lengths=_numbers(LENGTHS),
    num_steps=STEPS.value,
    spare=_numbers(SPARE),
    kv_gib=_sizes(KV_GIB),
    about_perplexity=protocols.Settings(
      protocol=PROTOCOL.value,
      corpus=tuple(CORPUS.value),
      reading=documents.Options(
        text_key=TEXT_KEY.value, separator=SEPARATOR.value, on_bad_utf8=BAD_UTF8.value
      ),
      stride=STRIDE.value,
      decode=DECODE.value,
    ),
    about_needles=needles.Settings(
      kinds=tuple(KINDS.value),
      haystack=HAYSTACK.value,
      depths=_numbers(DEPTHS),
      num_questions=QUESTIONS.value,
      seed=SEED.value,
    ),
    lm_eval=harness.Options(
      tasks=tuple(HARNESS_TASKS.value),
      folder=HARNESS_PATH.value,
      num_fewshot=SHOTS.value,
      limit=LIMIT.value,
      prefill_mode=PREFILL.value,
    ),
    out=OUT.value,
    compare=COMPARE.value,
    rope_scaling=extrapolation.parse(ROPE.value),
    fresh=FRESH.value,
  )
  try:
    text, out = table.run(request, base.get_config())
  except KeyboardInterrupt:
    sys.stderr.write("interrupted; the same command without --fresh goes on from there.\n")
    return 130
  print(f"{text}\nsaved in {out}")
  return 0


def _refuse_idle() -> None:
  """Raises for flags that were given and that no task would read."""
  if not set(TASKS.value) <= tasks.TASKS.keys():
    return  # a name that is wrong is the greater mistake, and refused with those that there are
  for readers, own in OF_TASKS.items():
    given = [flag.name for flag in own if flags.FLAGS[flag.name].present]
    if given and not set(readers) & set(TASKS.value):
      raise errors.ConfigError(
        f"--{given[0]} is of {' and '.join(readers)}, and --tasks={','.join(TASKS.value)} asks "
        f"nothing of that; add {' or '.join(readers)} there, or leave it out."
      )


def _numbers(flag: flags.FlagHolder) -> tuple[int, ...]:
  wrong = [text for text in flag.value if not text.isdigit()]
  if wrong:
    raise errors.ConfigError(
      f"--{flag.name} takes whole numbers from 0 up; {wrong[0]!r} is none."
    )
  return tuple(map(int, flag.value))


def _sizes(flag: flags.FlagHolder) -> tuple[float, ...]:
  try:
    sizes = tuple(map(float, flag.value))
  except ValueError:
    sizes = (-1.0,)
  if not all(0 < size < math.inf for size in sizes):
    raise errors.ConfigError(f"--{flag.name}={','.join(flag.value)} takes sizes above 0.")
  return sizes


if __name__ == "__main__":
  sys.exit(app.run(command_line.friendly(main), flags_parser=command_line.parse_flags))
