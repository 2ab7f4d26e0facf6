"""lm-evaluation-harness: a model as it takes one, and its tasks; the only file that knows it.

subject = subjects.load("runs/smoke", base.get_config())
model = harness_model.of_subject(subject, mode="sparse", budget=64)
lm_eval.simple_evaluate(model=model, tasks=["piqa"])
"""

from collections.abc import Sequence
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import pathlib
import re

import jax
import lm_eval
from lm_eval import tasks as harness_tasks
from lm_eval.api import model as harness_api
import numpy as np

from sparsejax import errors, model
from sparsejax.attention import method
from sparsejax.configuration import build
from sparsejax.data import tokenizers
from sparsejax.decoding import prefill
from sparsejax.evaluation import continuations, generation_settings, plans, stop_strings
from sparsejax.evaluation import subject as subjects

# Metrics of whole texts, whose samples are pairs of a log-probability and what it is divided
# by: the loss behind each, with its unit, and its scale.
_ROLLING = {
  "word_perplexity": ("loss (nats/word)", 1.0),
  "byte_perplexity": ("loss (nats/byte)", 1.0),
  "bits_per_byte": ("bits/byte", 1 / math.log(2)),
}
# How tasks are defined, asked and judged is the harness's own.
VERSION = lm_eval.__version__
# Enough for two digits of a standard error.
_BOOTSTRAP_DRAWS = 1000


class Model(harness_api.TemplateLM):
  """A model under one stream; hand it to `lm_eval.simple_evaluate(model=...)`.

  Attributes:
    max_length: tokens that it reads at a time.
    seed: of drawn texts; another may be set between runs.
  """

  def __init__(
    self,
    transformer: model.Transformer,
    params: dict,
    tokenizer: tokenizers.Tokenizer,
    *,
    stream: method.Stream,
    mesh: jax.sharding.Mesh,
    max_length: int,
    chunk_length: int,
    rows: int = 8,
    prefill_stream: method.Stream | None = None,
    add_bos: bool | None = None,
    seed: int = 0,
    progress: bool = True,
  ):
    """Makes the adapter; nothing is compiled yet.

    Args:
      transformer, params: the model.
      tokenizer: its own.
      stream: `full` or `sparse`.
      mesh: where the parameters are.
      max_length: tokens the model reads at a time; contexts lose their beginning to fit.
      chunk_length: positions of each row whose logits exist at the same time.
      rows: of `max_length` tokens that are scored, or decoded, together.
      prefill_stream: by which contexts of texts to write are read; None is `stream`, by which
        probabilities of given continuations are found in any case.
      add_bos: whether contexts begin with the tokenizer's `bos`, as documents do in training;
        None: if it has one. Texts of rolling perplexity follow it once in any case, or `eos`
        where there is none.
      seed: of drawn texts.
      progress: whether bars show what is done.
    """
    super().__init__()
    self._transformer, self._params, self._tokens = transformer, params, tokenizer
    self._stream, self._mesh, self._rows = stream, mesh, rows
    self._prefill_stream = prefill_stream or stream
    prefill.check_stream(transformer.options, stream, self._prefill_stream)
    self.seed, self._progress = seed, progress
    self._add_bos = tokenizer.bos_id is not None if add_bos is None else add_bos
    if self._add_bos and tokenizer.bos_id is None:
      raise errors.ConfigError("add_bos=True, but the tokenizer has no bos; take False.")
    self.max_length = max_length
    self._score = continuations.Scorer(
      transformer,
      params,
      stream=stream,
      mesh=mesh,
      max_length=max_length,
      chunk_length=chunk_length,
      rows=rows,
    )

  @property
  def eot_token_id(self) -> int | None:
    return self._tokens.eos_id

  @property
  def prefix_token_id(self) -> int | None:
    """Id that stands for an empty context: `bos`, or `eos` where there is none."""
    bos, eos = self._tokens.bos_id, self._tokens.eos_id
    return eos if bos is None else bos

  @property
  def tokenizer_name(self) -> str:
    """What the harness tells cached requests apart by."""
    return self._tokens.fingerprint

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs
  ) -> list[int]:
    """Ids of a text, behind `bos` unless `add_special_tokens` is False."""
    del kwargs
    opens = self._add_bos and add_special_tokens is not False
    return [self._tokens.bos_id] * opens + self._tokens.encode(string)

  def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs):
    """Pairs of log-probability and greediness, for `((context, text), ids, ids)` each."""
    del kwargs
    pairs = [continuations.Pair(context, text) for _, context, text in requests]
    found = self._score(pairs, progress=self._progress and not disable_tqdm)
    for (strings, _, _), likelihood in zip(requests, found, strict=True):
      self.cache_hook.add_partial("loglikelihood", strings, tuple(likelihood))
    return [tuple(likelihood) for likelihood in found]

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """Log-probabilities of whole texts, each id once, in nats."""
    pieces, owners = [], []
    for number, request in enumerate(requests):
      ids = self.tok_encode(request.args[0], add_special_tokens=False)
      of_text = continuations.rolling_pairs(ids, self.prefix_token_id, self.max_length)
      pieces += of_text
      owners += [number] * len(of_text)
    totals = [0.0] * len(requests)
    found = self._score(pieces, progress=self._progress and not disable_tqdm)
    for number, likelihood in zip(owners, found, strict=True):
      totals[number] += likelihood.log_probability
    for request, total in zip(requests, totals, strict=True):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
    return totals

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """Texts that continue contexts; see `stop_strings.continue_until`.

    Raises:
      ConfigError: a setting of generation that there is not here.
    """
    del disable_tqdm
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
      groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
    texts = [""] * len(requests)
    for settings, numbers in groups.items():
      prompts = [self._prompt(requests[number].args[0]) for number in numbers]
      generated = self._generate(prompts, json.loads(settings))
      for number, text in zip(numbers, generated, strict=True):
        texts[number] = text
        self.cache_hook.add_partial("generate_until", requests[number].args, text)
    return texts

  def _prompt(self, context: str) -> list[int]:
    return self.tok_encode(context) or [self.prefix_token_id]

  def _generate(self, prompts: list[list[int]], given: dict) -> list[str]:
    settings = generation_settings.parse(given)
    return stop_strings.continue_until(
      self._transformer,
      self._params,
      prompts,
      tokenizer=self._tokens,
      stops=settings.stops,
      max_new_tokens=settings.max_new_tokens,
      max_length=self.max_length,
      stream=self._stream,
      mesh=self._mesh,
      draw=settings.draw,
      seed=self.seed,
      rows=self._rows,
      prefill_stream=self._prefill_stream,
    )


def of_subject(
  subject: subjects.Subject,
  *,
  mode: method.Stream,
  budget: int | None = None,
  batch_size: int = 0,
  **options,
) -> Model:
  """A checkpoint as the harness takes it.

  Args:
    subject: see `subject.load`; its rows are as long as the model reads at a time.
    mode: `full` or `sparse`.
    budget: keys that a query reads when sparse; None is that of training.
    batch_size: rows at once; 0 is that of a training pass.
    options: others of `Model`.
  """
  config, transformer = subject.config, subject.transformer
  if budget is not None:
    transformer = build.with_budget(transformer, budget)
  return Model(
    transformer,
    subject.params,
    subject.corpus.tokenizer,
    stream=mode,
    mesh=subject.mesh,
    max_length=config.data.sequence_length,
    chunk_length=config.loss.chunk_length,
    rows=batch_size or config.data.batch_size // config.train.accumulate_steps,
    **options,
  )


@functools.cache
def _manager(folder: str | None, is_local: bool, metadata: str) -> harness_tasks.TaskManager:
  # The index of the harness's own tasks takes seconds; who asks for local ones needs none.
  return harness_tasks.TaskManager(
    include_path=folder, include_defaults=not is_local, metadata=json.loads(metadata)
  )


def find_manager(
  names: Sequence[str], folder: str | pathlib.Path | None, metadata: dict | None = None
) -> harness_tasks.TaskManager:
  """Returns what knows all of these tasks, groups and tags.

  Args:
    names: of tasks.
    folder: of more tasks, YAML files in the harness's format.
    metadata: that tasks read, as RULER's do.
  """
  where, text = None if folder is None else str(folder), json.dumps(metadata or {})
  if where is not None:
    local = _manager(where, True, text)
    if set(names) <= set(local.all_tasks):
      return local
  return _manager(where, False, text)


def load(manager: harness_tasks.TaskManager, names: Sequence[str], *, max_length: int) -> list:
  """Tasks and groups with their data, to be asked of models that read `max_length` tokens.

  Raises:
    UserError: a task's library is not installed, its data cannot be had, or it wants texts
      generated as models cannot do here.
  """
  found = []
  for name in names:
    try:
      loaded = manager.load([name])
    except ModuleNotFoundError as error:
      raise errors.UserError(
        f"task {name!r} of lm_eval needs {error.name}, which is not installed; see the extras "
        "of lm_eval, as in pip install 'lm_eval[ruler,longbench]'."
      ) from error
    except (OSError, ValueError) as error:  # a hub out of reach, files that are not there
      cause = " ".join(str(error).split())
      raise errors.DataError(f"the data of task {name!r} cannot be loaded: {cause}") from error
    for task in loaded["tasks"].values():
      if task.get_config("output_type") == "generate_until":
        settings = generation_settings.parse(task.get_config("generation_kwargs") or {})
        stop_strings.room_for_prompts(settings.max_new_tokens, max_length)
    groups = loaded.get("groups", {})
    found += [groups[name]] if name in groups else loaded["tasks"].values()
  return found


def fingerprint(tasks: Sequence, limit: int | None, num_fewshot: int | None) -> str:
  """Of what tasks from `load` ask, and how they judge answers.

  That is their settings, with the files of the functions that these name, and their documents:
  up to `limit` of each, and all that examples are drawn from, if there are examples; and how
  groups sum up their tasks.

  Args:
    tasks: of `load`.
    limit: samples of each; None takes all.
    num_fewshot: examples before each question; None is what each task says.
  """
  described = []
  for task in tasks:
    is_group = hasattr(task, "get_all_tasks")
    for group in [task, *task.get_all_groups()] if is_group else []:
      described.append((group.name, group.child_names, _as_text(group.aggregate_metric_list)))
    for own in task.get_all_tasks() if is_group else [task]:
      documents = itertools.islice(iter(own.eval_docs), limit)
      shots = own.get_config("num_fewshot") if num_fewshot is None else num_fewshot
      examples = own.fewshot_docs() if shots else None
      described.append(
        (
          own.task_name,
          _as_text(own.config.to_dict(keep_callable=True)),
          [str(document) for document in documents],
          None if examples is None else [str(document) for document in examples],
        )
      )
  return plans.digest(described)


def _as_text(settings) -> str:
  return json.dumps(settings, default=_described, sort_keys=True)


def _described(value):
  """Of what settings hold beside JSON, all that it does: of a function, its whole file."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return dataclasses.asdict(value)
  if isinstance(value, functools.partial):
    return [_described(value.func), value.args, value.keywords]
  # What has no source is written as an object at some address.
  text = re.sub(r" at 0x[0-9a-f]+", "", str(value))
  try:
    return [text, pathlib.Path(inspect.getsourcefile(value)).read_text()]
  except (OSError, TypeError):
    return text


def in_short(result: dict) -> dict:
  """Of what `evaluate` returns, what tables and comparisons need, as JSON.

  Its entry `samples` has for each task `asked`, of its documents and prompts, and for each of
  its metrics, by name, sums and weights of all samples (see `plans.Samples`). Left out are
  metrics that are no mean over samples. Of perplexities it is the loss behind them.
  """
  samples = {}
  for task, logged in result["samples"].items():
    asked = [(x["doc_id"], x["doc_hash"], x["prompt_hash"], x["filter"]) for x in logged]
    own = samples[task] = dict(asked=plans.digest(asked), metrics={})
    for kind in dict.fromkeys(x["filter"] for x in logged):
      of_filter = [x for x in logged if x["filter"] == kind]
      for name in of_filter[0]["metrics"]:
        values = [x[name] for x in of_filter]
        label = name if kind == "none" else f"{name},{kind}"
        whole = result["results"][task].get(f"{name},{kind}")
        if (pair := _sums(label, values, whole)) is not None:
          own["metrics"][pair[0]] = pair[1:]
  names = "results", "groups", "n-samples", "n-shot"
  return {name: result[name] for name in names if name in result} | dict(samples=samples)


def _sums(label: str, values: list, whole) -> tuple[str, list[float], list[float]] | None:
  """Name, sums and weights of a metric's samples; None if it is no mean over them."""
  if label in _ROLLING:
    unit, scale = _ROLLING[label]
    return unit, [-scale * x for x, _ in values], [float(weight) for _, weight in values]
  if not all(isinstance(x, int | float | np.number) for x in values):
    return None
  sums = [float(x) for x in values]
  mean = math.fsum(sums) / len(sums)
  if not isinstance(whole, int | float):
    return None
  if not math.isclose(mean, whole, abs_tol=1e-9) and not (
    math.isnan(mean) and math.isnan(whole)
  ):
    return None
  return label, sums, [1.0] * len(sums)


def evaluate(
  adapter: Model,
  tasks: Sequence,
  *,
  num_fewshot: int | None,
  limit: int | None,
  seed: int | None,
) -> dict:
  """What `lm_eval.simple_evaluate` says of a model.

  Args:
    adapter: the model.
    tasks: from `load`.
    num_fewshot: examples before each question; None is what the task says.
    limit: samples of each task; None takes all.
    seed: of examples and draws; None is the harness's own.
  """
  seeds = {}
  if seed is not None:
    names = "random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"
    seeds = dict.fromkeys(names, seed)
  # Else the harness forks this process, whose threads would not survive that.
  os.environ.setdefault("DISABLE_MULTIPROC", "1")
  adapter.seed = seed or 0
  return lm_eval.simple_evaluate(
    model=adapter,
    tasks=list(tasks),
    num_fewshot=num_fewshot,
    limit=limit,
    # Its index of all its tasks takes seconds, and these have been found.
    task_manager=harness_tasks.TaskManager(include_defaults=False),
    bootstrap_iters=_BOOTSTRAP_DRAWS,
    **seeds,
  )
