"""Tasks of lm-evaluation-harness, under full and under sparse inference."""

from collections.abc import Iterator, Sequence
import dataclasses
import difflib
import functools
import importlib.util
import json
import pathlib
import statistics
import tempfile

from sparsejax import errors
from sparsejax.data import tokenizers
from sparsejax.decoding import prefill
from sparsejax.evaluation import harness_presets, markdown, perplexity, plans
from sparsejax.evaluation import subject as subjects

# Contexts of SSA's needles; those that fit in the model's rows are asked for.
_USUAL_LENGTHS = (4096, 8192, 16384, 32768)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What to ask.

  Attributes:
    tasks: names of tasks, groups and tags as the harness knows them, or of presets.
    folder: of more tasks, YAML files in the harness's format. Data files that they name are
      looked for in the working directory, as the harness does.
    num_fewshot: examples before each question; None is what the preset or the task says.
    limit: samples of each task; None takes all.
    prefill_mode: `full` where contexts of texts that the model writes are read so, and written
      on by each mode; None is by that mode. Continuations that are given are read by the mode
      whatever this is.
  """

  tasks: tuple[str, ...] = ()
  folder: str | pathlib.Path | None = None
  num_fewshot: int | None = None
  limit: int | None = None
  prefill_mode: str | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
  """One line of the table.

  Attributes:
    task: name; `PRESET mean` is that over a preset's tasks.
    metric: of the task, with the harness's filter if it has one.
    value: mean over runs.
    stderr: the harness's standard error over samples, of one run; None where it has none.
    spread: sample standard deviation over runs; None for one run.
    mode: `full` or `sparse`.
    budget: keys a query reads; None where that does not apply.
    num_samples: of the task; None for means and groups.
    num_fewshot: examples before each question; None for means and groups.
    seeds: of the runs; () is one run with the harness's own.
    prefill_mode: by which contexts of texts that the model wrote were read; None is `mode`.
  """

  task: str
  metric: str
  value: float
  stderr: float | None
  spread: float | None
  mode: str
  budget: int | None
  num_samples: int | None
  num_fewshot: int | None
  seeds: tuple[int, ...] = ()
  prefill_mode: str | None = None


def check(options: Options) -> None:
  """Checks what is asked for before anything is loaded.

  Raises:
    ConfigError: no or unknown tasks, no such folder, or numbers that make no sense.
    UserError: the harness is not installed, or what a preset needs of it.
  """
  if not options.tasks:
    raise errors.ConfigError(
      "--tasks=lm_eval asks nothing by itself; name --lm_eval_tasks, tasks of "
      f"lm-evaluation-harness or presets: {', '.join(harness_presets.PRESETS)}."
    )
  if len(set(options.tasks)) < len(options.tasks):
    raise errors.ConfigError(f"--lm_eval_tasks={','.join(options.tasks)} names a task twice.")
  if options.num_fewshot is not None and options.num_fewshot < 0:
    raise errors.ConfigError(f"--num_fewshot={options.num_fewshot} must be at least 0.")
  if options.limit is not None and options.limit < 1:
    raise errors.ConfigError(f"--limit={options.limit} must be at least 1.")
  if options.folder is not None and not pathlib.Path(options.folder).is_dir():
    raise errors.ConfigError(
      f"--lm_eval_path={options.folder} is no folder; name one with YAML files of tasks."
    )
  _need(("lm_eval",), "--tasks=lm_eval", errors.install("eval"))
  parts = harness_presets.expand(options.tasks)
  for preset, part in parts:
    _need(part.modules, f"{preset or part.tasks[0]} of lm_eval", f"pip install {part.package}")
  names = [name for _, part in parts for name in part.tasks]
  from sparsejax.evaluation import harness_model  # imports what may not be installed

  known = harness_model.find_manager(names, options.folder).all_tasks
  for name in names:
    if name not in known:
      _refuse(name, known)


def run(
  subject: subjects.Subject,
  options: Options,
  *,
  modes: Sequence[str] = perplexity.MODES,
  budgets: Sequence[int] = (),
  lengths: Sequence[int] = (),
  batch_size: int = 0,
) -> list[Cell]:
  """Asks tasks of a checkpoint in every mode and budget; see `plan`."""
  planned = plan(
    subject, options, modes=modes, budgets=budgets, lengths=lengths, batch_size=batch_size
  )
  return planned.tell(plans.measure(planned.units, subject)).cells


def plan(
  subject: subjects.Subject,
  options: Options,
  *,
  modes: Sequence[str] = perplexity.MODES,
  budgets: Sequence[int] = (),
  lengths: Sequence[int] = (),
  batch_size: int = 0,
) -> plans.Plan:
  """Units of a call of the harness each: a mode and budget, tasks of as many shots, a seed.

  Args:
    subject: the checkpoint; contexts longer than its rows lose their beginning.
    options: what to ask.
    modes: of inference.
    budgets: keys a query reads under sparse inference; () is that of training.
    lengths: of texts that are made to measure, in tokens; () is 4k, 8k, 16k and 32k, as far
      as they fit in a row.
    batch_size: rows at once; 0 is that of a training pass.

  Raises:
    UserError: see `check`; or modes, budgets, lengths and data that are not to be had.
  """
  check(options)
  trained, length = subject.transformer.options, subject.config.data.sequence_length
  perplexity.check_modes(modes, budgets, trained.block_size, length)
  prefills = {mode: _prefill_mode(options, mode) for mode in modes}
  for mode, prefill_mode in prefills.items():
    prefill.check_stream(trained, mode, prefill_mode or mode)
  from sparsejax.evaluation import harness_model

  with tempfile.TemporaryDirectory() as folder:
    calls = []
    for preset, part in harness_presets.expand(options.tasks):
      metadata = None
      if part.is_synthetic:
        metadata = _measures(subject.corpus.tokenizer, folder, lengths, length)
      manager = harness_model.find_manager(part.tasks, options.folder, metadata)
      tasks = harness_model.load(manager, part.tasks, max_length=length)
      shots = part.num_fewshot if options.num_fewshot is None else options.num_fewshot
      about = dict(
        lm_eval=harness_model.VERSION,
        tasks=part.tasks,
        num_fewshot=shots,
        limit=options.limit,
        # Texts are the harness's; what a sample is depends on no tokenizer but in RULER.
        data=harness_model.fingerprint(tasks, options.limit, shots),
      )
      calls.append((preset, part, tasks, about))

  adapters = {}  # one at a time, whose compiled programs serve all calls of a mode and budget

  def measure(found, *, mode, budget, tasks, about, seed):
    if (mode, budget) not in adapters:
      adapters.clear()
      adapters[mode, budget] = harness_model.of_subject(
        found,
        mode=mode,
        budget=budget,
        batch_size=batch_size,
        prefill_stream=prefills[mode],
      )
    result = harness_model.evaluate(
      adapters[mode, budget],
      tasks,
      num_fewshot=about["num_fewshot"],
      limit=options.limit,
      seed=seed,
    )
    return harness_model.in_short(result)

  models = [
    (mode, budget)
    for mode in modes
    for budget in ((budgets or [trained.budget]) if mode == "sparse" else [None])
  ]
  units = tuple(
    plans.Unit(
      key=dict(task="lm_eval", mode=mode, budget=budget, seed=seed, **about)
      | ({} if prefills[mode] is None else dict(prefill_mode=prefills[mode])),
      measure=functools.partial(
        measure, mode=mode, budget=budget, tasks=tasks, about=about, seed=seed
      ),
      samples=functools.partial(_samples, mode=mode, budget=budget, seed=seed),
    )
    for mode, budget in models
    for _, part, tasks, about in calls
    for seed in part.seeds or (None,)
  )

  def tell(values):
    found, left = [], iter(values)
    for mode, budget in models:
      asked = []
      for preset, part, _, _ in calls:
        results = [next(left) for _ in part.seeds or (None,)]
        asked.append((preset, part, list(_cells(results, mode, budget, part.seeds))))
      cells = [cell for _, _, own in asked for cell in own] + [*_means(asked, mode, budget)]
      found += [dataclasses.replace(cell, prefill_mode=prefills[mode]) for cell in cells]
    return plans.Told(found, markdown.align(rows(found)))

  return plans.Plan(units, tell)


def _samples(value, *, mode: str, budget: int | None, seed: int | None) -> list[plans.Samples]:
  """Of every task and metric what each of its samples got."""
  return [
    plans.Samples(
      what=task if seed is None else f"{task}, seed {seed}",
      mode=mode,
      budget=budget,
      metric=metric,
      sums=plans.floats(sums),
      weights=tuple(weights),
      asked=about["asked"],
      needs_tokenizer=False,
    )
    for task, about in value["samples"].items()
    for metric, (sums, weights) in about["metrics"].items()
  ]


def rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
  """The cells as rows of a table, the first being the header."""
  header = "task", "shots", "inference", "budget", "metric", "value", "samples"
  return [header] + [
    (
      cell.task,
      _number(cell.num_fewshot),
      cell.mode + (f", prompts {cell.prefill_mode}" if cell.prefill_mode else ""),
      _number(cell.budget),
      cell.metric,
      _value(cell),
      _number(cell.num_samples),
    )
    for cell in cells
  ]


def _prefill_mode(options: Options, mode: str) -> str | None:
  """None where prompts are read as the rest is."""
  return None if options.prefill_mode == mode else options.prefill_mode


def _need(modules: Sequence[str], what: str, remedy: str) -> None:
  missing = [name for name in modules if importlib.util.find_spec(name) is None]
  if missing:
    raise errors.UserError(
      f"{what} needs {' and '.join(missing)}, which is not installed; {remedy}."
    )


def _refuse(name: str, known: Sequence[str]) -> None:
  near = difflib.get_close_matches(name, [*harness_presets.PRESETS, *known], n=3, cutoff=0.6)
  hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
  raise errors.ConfigError(
    f"unknown task {name!r} of lm_eval.{hint} Presets: {', '.join(harness_presets.PRESETS)}; "
    "all tasks: lm-eval ls tasks; your own: --lm_eval_path=FOLDER."
  )


def _measures(
  tokenizer: tokenizers.Tokenizer, folder: str, lengths: Sequence[int], row: int
) -> dict:
  """What RULER makes its texts by: a tokenizer in the Hugging Face format, and lengths."""
  too_long = [length for length in lengths if length > row]
  if too_long:
    raise errors.ConfigError(
      f"--lengths={too_long[0]} exceeds rows of {row} tokens; take at most that, or longer "
      "rows with --sequence_length."
    )
  lengths = list(lengths) or [length for length in _USUAL_LENGTHS if length <= row]
  if not lengths:
    raise errors.ConfigError(
      f"rows of {row} tokens are shorter than the {_USUAL_LENGTHS[0]} of this task; name "
      "--lengths, or take longer rows with --sequence_length."
    )
  path = pathlib.Path(folder)
  tokenizer.save(path)
  if not (path / "tokenizer.json").is_file():
    raise errors.ConfigError(
      "RULER measures texts by a tokenizer.json, which the tokenizer 'byte' has not; it takes "
      "a model trained with another."
    )
  described = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=tokenizer.eos)
  if tokenizer.bos is not None:
    described["bos_token"] = tokenizer.bos
  (path / "tokenizer_config.json").write_text(json.dumps(described))
  return dict(tokenizer=folder, max_seq_lengths=lengths)


def _cells(results: Sequence[dict], mode: str, budget: int | None, seeds) -> Iterator[Cell]:
  """One for each task, or group, and each of its metrics; `results` are the runs."""
  first = results[0]
  all_runs = [result["results"] | result.get("groups", {}) for result in results]
  for task, metrics in all_runs[0].items():
    for key, value in metrics.items():
      name, _, kind = key.partition(",")
      # A number that is not finite is None.
      if not kind or name.endswith("_stderr") or not isinstance(value, int | float | None):
        continue
      if name.isdigit() and value == -1:  # RULER's word for a length nobody asked for
        continue
      runs = plans.floats([run[task][key] for run in all_runs])
      error = metrics.get(f"{name}_stderr,{kind}")
      yield Cell(
        task=task,
        metric=name if kind == "none" else key,
        value=statistics.fmean(runs),
        stderr=float(error) if isinstance(error, int | float) else None,
        spread=statistics.stdev(runs) if len(runs) > 1 else None,
        mode=mode,
        budget=budget,
        num_samples=first.get("n-samples", {}).get(task, {}).get("effective"),
        num_fewshot=first.get("n-shot", {}).get(task),
        seeds=tuple(seeds),
      )


def _means(asked, mode: str, budget: int | None) -> Iterator[Cell]:
  """Of each preset that reports one, the mean over its tasks."""
  values: dict[tuple[str, str], list[float]] = {}
  for preset, part, found in asked:
    if preset is not None and part.mean_of is not None:
      of_part = [cell.value for cell in found if cell.metric == part.mean_of]
      values.setdefault((preset, part.mean_of), []).extend(of_part)
  for (preset, metric), of_tasks in values.items():
    if of_tasks:
      mean = statistics.fmean(of_tasks)
      yield Cell(f"{preset} mean", metric, mean, None, None, mode, budget, None, None)


def _number(value: int | None) -> str:
  return "-" if value is None else f"{value:,d}"


def _value(cell: Cell) -> str:
  error = cell.stderr if cell.spread is None else cell.spread
  return f"{cell.value:.4f}" + ("" if error is None else f" ± {error:.4f}")
