"""Tasks of lm-evaluation-harness: what is asked how, what comes out, what is refused."""

import dataclasses
import json
import math
import statistics

import jax
import pytest

from configs import base
from sparsejax import errors
from sparsejax.data import tokenizers
from sparsejax.evaluation import harness, harness_presets, plans, table
from sparsejax.evaluation import request as requests
from sparsejax.evaluation import subject as subjects
from tests import small
from tests.sparsejax.evaluation import harness_files

pytestmark = pytest.mark.usefixtures("plain_report")


def need_harness():
  return pytest.importorskip("lm_eval", reason="needs lm_eval, of the extra eval")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs") / "tiny"
  config = small.make_config(data__sources=("recall",), data__recall_pairs=2)
  config.data.recall_queries = 2
  config.attention.method = "ssa"
  small.save_checkpoints(folder, config)
  return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return harness_files.write(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
  """What the harness keeps of data goes where nothing else reads it."""
  need_harness()
  import datasets

  patch = pytest.MonkeyPatch()
  patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
  patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
  yield
  patch.undo()


@pytest.mark.filterwarnings("ignore")
def test_real_tasks_are_asked_in_every_mode_and_budget(workdir, folder, offline, monkeypatch):
  """A choice among continuations, perplexity and generated answers; written like all tables."""
  from sparsejax.evaluation import harness_model

  request = requests.Request(
    path=workdir,
    tasks=("lm_eval",),
    budgets=(8, 32),
    lm_eval=harness.Options(
      tasks=("tiny_choice", "tiny_text", "tiny_answer"), folder=folder, num_fewshot=1, limit=5
    ),
  )
  text, out = table.run(request, base.get_config())
  assert (out / "lm_eval.md").read_text() in text
  content = json.loads((out / "lm_eval.json").read_text())
  cells = [harness.Cell(**cell) for cell in content["cells"]]
  assert {(cell.mode, cell.budget) for cell in cells} == {
    ("full", None),
    ("sparse", 8),
    ("sparse", 32),
  }
  of_full = {(cell.task, cell.metric): cell for cell in cells if cell.mode == "full"}
  assert set(of_full) == {
    ("tiny_choice", "acc"),
    ("tiny_choice", "acc_norm"),
    ("tiny_text", "word_perplexity"),
    ("tiny_text", "bits_per_byte"),
    ("tiny_answer", "exact_match"),
  }
  choice = of_full["tiny_choice", "acc"]
  assert choice.num_samples == 5
  assert choice.num_fewshot == 1
  assert 0 <= choice.value <= 1
  assert choice.stderr is not None
  assert choice.spread is None
  assert choice.seeds == []  # as JSON has it
  assert of_full["tiny_text", "word_perplexity"].num_samples == 4
  assert _by_sample(out, "full") == pytest.approx(
    {key: cell.value for key, cell in of_full.items()}
  )
  monkeypatch.setattr(harness_model, "evaluate", None)
  again, _ = table.run(request, base.get_config())
  assert "cells: 0 measured, 3 taken" in again
  assert again.partition("\ncells: ")[0] == text.partition("\ncells: ")[0]
  # Texts of about 50 bytes: 8 keys are not all of them, and 320 ids are hardly known.
  words = {cell.budget: cell.value for cell in cells if cell.metric == "word_perplexity"}
  assert words[8] != words[None]
  assert words[None] > 100


def _by_sample(out, mode):
  """Metrics by task and name, from what a ledger has of single samples."""
  entries = map(json.loads, (out / "cells.jsonl").read_text().splitlines())
  (value,) = (x["value"] for x in entries if x["key"]["unit"]["mode"] == mode)
  metrics = {}
  for samples in harness._samples(value, mode=mode, budget=None, seed=None):
    mean = sum(samples.sums) / sum(samples.weights)
    if samples.metric == "loss (nats/word)":
      metrics[samples.what, "word_perplexity"] = math.exp(mean)
    else:
      metrics[samples.what, samples.metric.replace("bits/byte", "bits_per_byte")] = mean
  return metrics


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_diverged_is_answered_for(workdir, folder, offline):
  """Its numbers are there, though none is finite."""
  subject = subjects.load(workdir, base.get_config())
  params = jax.tree.map(lambda x: math.nan * x, subject.params)
  diverged = dataclasses.replace(subject, params=params)
  options = harness.Options(tasks=("tiny_text",), folder=folder)
  planned = harness.plan(diverged, options, modes=("full",))
  values = plans.measure(planned.units, diverged)
  json.loads(json.dumps(values, allow_nan=False))
  cells = planned.tell(values).cells
  assert [cell.metric for cell in cells] == ["word_perplexity", "bits_per_byte"]
  assert all(math.isnan(cell.value) for cell in cells)
  (samples, *_) = planned.units[0].samples(values[0])
  assert all(math.isnan(x) for x in samples.sums)


def test_samples_that_are_not_finite_are_samples():
  from_harness = harness_model_sums("acc", [1.0, math.nan], math.nan)
  assert from_harness[0] == "acc"
  assert harness_model_sums("acc", [1.0, 0.0], math.nan) is None
  assert harness_model_sums("acc", [1.0, 0.0], 0.25) is None


def harness_model_sums(*arguments):
  need_harness()
  from sparsejax.evaluation import harness_model

  return harness_model._sums(*arguments)


@pytest.mark.filterwarnings("ignore")
def test_documents_and_settings_tell_tasks_apart(tmp_path, offline):
  from sparsejax.evaluation import harness_model

  folder = harness_files.write(tmp_path / "a")
  judge = folder / "judge.py"
  judge.write_text("RIGHT = 1.0\n\n\ndef judge(doc, results):\n  return {'acc': RIGHT}\n")
  group = (
    "group: tiny\ntask: [tiny_choice, tiny_answer]\naggregate_metric_list: [{metric: acc}]"
  )
  (folder / "tiny.yaml").write_text(group)

  def fingerprint(name="tiny_choice", limit=None, num_fewshot=None):
    harness_model._manager.cache_clear()
    manager = harness_model.find_manager([name], folder)
    tasks = harness_model.load(manager, [name], max_length=64)
    return harness_model.fingerprint(tasks, limit, num_fewshot)

  def change(file, old, new):
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))

  first = fingerprint()
  assert fingerprint() == first
  assert fingerprint(limit=5) != first
  # What examples are drawn from, where there are examples.
  with_shots = fingerprint(num_fewshot=2)
  change("shots.json", "A sea", "One sea")
  assert fingerprint() == first
  assert fingerprint(num_fewshot=2) != with_shots
  change("choice.json", "river", "lake")
  second = fingerprint()
  assert second != first
  change("tiny_choice.yaml", "{metric: acc_norm}", "{metric: f1}")
  third = fingerprint()
  assert third != second
  # A function that judges, and what it calls.
  change("tiny_choice.yaml", "test_split", "process_results: !function judge.judge\ntest_split")
  judged = fingerprint()
  assert judged != third
  assert fingerprint() == judged
  change("judge.py", "1.0", "0.5")
  assert fingerprint() != judged
  # How a group sums up.
  summed = fingerprint("tiny")
  assert fingerprint("tiny") == summed
  change("tiny.yaml", "{metric: acc}", "{metric: acc, weight_by_size: false}")
  assert fingerprint("tiny") != summed


@pytest.mark.filterwarnings("ignore")
def test_what_another_version_of_the_harness_measured_is_measured_again(
  workdir, folder, offline, monkeypatch, tmp_path
):
  from sparsejax.evaluation import harness_model

  request = requests.Request(
    path=workdir,
    tasks=("lm_eval",),
    modes=("full",),
    lm_eval=harness.Options(tasks=("tiny_text",), folder=folder),
    out=tmp_path,
  )
  for version, said in (
    ("0.4.13", "1 measured, 0 taken"),
    ("0.4.13", "0 measured, 1 taken"),
    ("0.4.14", "1 measured, 0 taken"),
  ):
    monkeypatch.setattr(harness_model, "VERSION", version)
    assert f"cells: {said}" in table.run(request, base.get_config())[0]


@pytest.mark.filterwarnings("ignore")
def test_runs_with_several_seeds_are_made_one(workdir, folder, offline, monkeypatch):
  part = harness_presets.Part(
    tasks=("tiny_choice",), num_fewshot=2, seeds=(1, 12, 123), mean_of="acc_norm"
  )
  monkeypatch.setitem(harness_presets.PRESETS, "ssa", (part,))
  subject = subjects.load(workdir, base.get_config())
  options = harness.Options(tasks=("ssa", "tiny_text"), folder=folder)
  cells = harness.run(subject, options, modes=("full",))
  norm, mean = cells[1], cells[-1]
  assert (norm.metric, norm.seeds, norm.num_fewshot) == ("acc_norm", (1, 12, 123), 2)
  assert norm.spread is not None
  assert (mean.task, mean.metric, mean.value) == ("ssa mean", "acc_norm", norm.value)
  text = next(cell for cell in cells if cell.task == "tiny_text")
  assert text.seeds == ()
  assert text.spread is None


@pytest.mark.filterwarnings("ignore")
def test_prompts_are_read_as_asked_and_the_table_says_so(workdir, folder, offline, monkeypatch):
  """What is read by the mode itself is the same cell as if nothing was asked."""
  from sparsejax.evaluation import harness_model

  made = []

  class Adapter(harness_model.Model):
    def __init__(self, *args, **options):
      super().__init__(*args, **options)
      made.append((options["stream"], options["prefill_stream"]))

  monkeypatch.setattr(harness_model, "Model", Adapter)
  monkeypatch.setattr(harness_model, "evaluate", lambda *args, **kwargs: None)
  found = dict(results={"tiny_answer": {"exact_match,none": 0.5}}, samples={})
  monkeypatch.setattr(harness_model, "in_short", lambda result: found)
  subject = subjects.load(workdir, base.get_config())
  how = dict(tasks=("tiny_answer",), folder=folder, limit=1)
  as_read = harness.plan(subject, harness.Options(**how))
  planned = harness.plan(subject, harness.Options(prefill_mode="full", **how))
  before, after = ([dict(unit.key) for unit in x.units] for x in (as_read, planned))
  assert after[0] == before[0]
  assert after[1] == before[1] | dict(prefill_mode="full")
  told = planned.tell(plans.measure(planned.units, subject))
  assert made == [("full", None), ("sparse", "full")]
  assert [(x.mode, x.prefill_mode) for x in told.cells] == [("full", None), ("sparse", "full")]
  assert "| full " in told.text
  assert "| sparse, prompts full " in told.text
  with pytest.raises(errors.ConfigError, match="read sparse are continued sparse, not full"):
    harness.plan(subject, harness.Options(prefill_mode="sparse", **how))


def test_cells_are_means_and_spreads_over_runs():
  def result(value):
    return {
      "results": {
        "a": {"alias": "a", "acc,none": value, "acc_stderr,none": 0.1, "sample_len": 7},
        "b": {"f1,strict": 2.0, "f1_stderr,strict": "N/A", "4096,none": -1, "8192,none": 0.5},
      },
      "groups": {"g": {"acc,none": 0.25, "acc_stderr,none": 0.2}},
      "n-samples": {"a": dict(original=9, effective=7)},
      "n-shot": {"a": 3},
    }

  one, f1, length, group = harness._cells([result(0.5), result(0.25)], "sparse", 64, (1, 2))
  spread = statistics.stdev([0.5, 0.25])
  assert one == harness.Cell("a", "acc", 0.375, 0.1, spread, "sparse", 64, 7, 3, (1, 2))
  assert (f1.metric, f1.stderr, f1.num_samples) == ("f1,strict", None, None)
  # RULER says -1 of lengths nobody asked for.
  assert (length.metric, length.value) == ("8192", 0.5)
  assert (group.task, group.value) == ("g", 0.25)
  rows = harness.rows([one, f1])
  assert rows[1] == ("a", "3", "sparse", "64", "acc", f"0.3750 ± {spread:.4f}", "7")
  assert rows[2][-2:] == ("2.0000 ± 0.0000", "-")


def test_presets_are_the_papers():
  parts = dict.fromkeys((*p.tasks, p.num_fewshot) for _, p in harness_presets.expand(["ssa"]))
  assert list(parts) == [
    ("piqa", 3),
    ("hellaswag", 10),
    ("arc_easy", 25),
    ("arc_challenge", 5),
    ("wikitext", 0),
  ]
  seeds = {part.seeds for _, part in harness_presets.expand(["ssa"])}
  assert seeds == {(1, 12, 123, 1234, 12345), ()}
  ((_, long),) = harness_presets.expand(["longbench_en"])
  assert len(set(long.tasks)) == 16


@pytest.mark.parametrize("name", harness_presets.PRESETS)
def test_the_harness_knows_what_presets_ask(name, folder):
  need_harness()
  from sparsejax.evaluation import harness_model

  tasks = [task for _, part in harness_presets.expand([name]) for task in part.tasks]
  # With the folder that others name, too: the index of all of them takes seconds.
  assert set(tasks) <= set(harness_model.find_manager(tasks, folder).all_tasks)


def test_names_that_are_no_presets_are_asked_as_they_are():
  parts = harness_presets.expand(["mmlu", "niah_single_1", "ssa_needle", "piqa", "mmlu"])
  assert [(preset, part.tasks) for preset, part in parts] == [
    ("ssa_needle", ("niah_single_2",)),
    (None, ("niah_single_1",)),
    (None, ("mmlu", "piqa")),
  ]
  assert [part.is_synthetic for _, part in parts] == [True, True, False]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(), "name --lm_eval_tasks.*presets: ssa, ssa_needle, longbench_en, ruler"),
    (dict(tasks=("piqa",), num_fewshot=-1), "--num_fewshot=-1 must be at least 0"),
    (dict(tasks=("piqa",), limit=0), "--limit=0 must be at least 1"),
    (dict(tasks=("piqa",), folder="no/where"), "--lm_eval_path=no/where is no folder"),
  ],
)
def test_a_mistake_is_refused_before_anything_is_read(tmp_path, options, message):
  request = requests.Request(
    path=tmp_path / "nowhere", tasks=("lm_eval",), lm_eval=harness.Options(**options)
  )
  with pytest.raises(errors.ConfigError, match=message):
    table.run(request, base.get_config())


def test_what_a_preset_needs_is_named(monkeypatch):
  need_harness()
  monkeypatch.setattr(
    harness.importlib.util, "find_spec", lambda name: "found" if name == "lm_eval" else None
  )
  message = r"longbench_en of lm_eval needs jieba and .* pip install 'lm_eval\[longbench\]'"
  with pytest.raises(errors.UserError, match=message):
    harness.check(harness.Options(tasks=("longbench_en",)))


def test_without_the_harness_its_installation_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(errors.UserError, match=r"lm_eval.* pip install -e '\.\[eval\]' in"):
    harness.check(harness.Options(tasks=("piqa",)))


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("tiny_chioce", "unknown task 'tiny_chioce' of lm_eval. Did you mean 'tiny_choice'"),
    ("sssa", "unknown task 'sssa'.* Did you mean 'ssa'.*Presets: ssa, "),
    ("qqqqqqqqqqqqqq", "unknown task 'qqqqqqqqqqqqqq' of lm_eval. Presets"),
  ],
)
def test_an_unknown_task_is_refused(folder, name, message):
  need_harness()
  with pytest.raises(errors.ConfigError, match=message):
    harness.check(harness.Options(tasks=("tiny_text", name), folder=folder))


@pytest.mark.filterwarnings("ignore")
def test_data_that_are_not_there_are_named(workdir, tmp_path, offline):
  folder = harness_files.write(tmp_path / "tasks")
  (folder / "text.json").unlink()
  subject = subjects.load(workdir, base.get_config())
  with pytest.raises(errors.DataError, match=r"data of task 'tiny_text' .*text\.json"):
    harness.run(subject, harness.Options(tasks=("tiny_text",), folder=folder))


@pytest.mark.filterwarnings("ignore")
def test_texts_that_cannot_be_generated_are_refused_before_anything_is_scored(
  workdir, tmp_path, offline, monkeypatch
):
  """Whatever stands before them."""
  from sparsejax.evaluation import harness_model

  monkeypatch.setattr(harness_model, "evaluate", None)
  folder = harness_files.write(tmp_path / "tasks")
  task, subject = folder / "tiny_answer.yaml", subjects.load(workdir, base.get_config())
  options = harness.Options(tasks=("tiny_text", "tiny_answer"), folder=folder)
  task.write_text(task.read_text().replace("max_gen_toks: 6", "max_gen_toks: 64"))
  with pytest.raises(errors.ConfigError, match=r"64 tokens leave no room .* rows of 64"):
    harness.run(subject, options)
  task.write_text(task.read_text().replace("max_gen_toks: 64", "num_beams: 4"))
  harness_model._manager.cache_clear()
  with pytest.raises(errors.ConfigError, match=r"ask for num_beams=4"):
    harness.run(subject, options)


@pytest.mark.filterwarnings("ignore")
def test_ruler_makes_its_texts_by_the_models_tokenizer(tmp_path, offline, monkeypatch):
  """Its needle in repeated sentences, the one task of it that needs no data from elsewhere."""
  transformers, _ = (
    pytest.importorskip(name, reason="RULER needs 'lm_eval[ruler]' and transformers")
    for name in ("transformers", "wonderwords")
  )
  import nltk

  monkeypatch.setattr(nltk, "download", lambda name: None)
  from sparsejax.evaluation import harness_model

  tokenizer = tokenizers.train_bpe(["One of the special magic numbers for it is: 7."], 280)
  measures = harness._measures(tokenizer, str(tmp_path), (1024, 2048), 2048)
  manager = harness_model.find_manager(["niah_single_1"], None, measures)
  (task,) = harness_model.load(manager, ["niah_single_1"], max_length=2048)
  samples = list(task.test_docs())
  assert len(samples) == 1000
  for length in (1024, 2048):
    texts = [sample["input"] for sample in samples if sample["max_length"] == length]
    sizes = [len(tokenizer.encode(text)) for text in texts]
    # Room is left for the answer, and sentences come by the dozen.
    assert 0.5 * length < max(sizes) <= length
  read = transformers.AutoTokenizer.from_pretrained(tmp_path)
  text = samples[0]["input"]
  assert read.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_texts_made_to_measure_need_a_tokenizer_and_lengths(tmp_path):
  measure, byte = harness._measures, tokenizers.ByteTokenizer()
  with pytest.raises(errors.ConfigError, match=r"--lengths=512 exceeds rows of 256"):
    measure(byte, str(tmp_path), (128, 512), 256)
  with pytest.raises(errors.ConfigError, match=r"rows of 256 tokens are shorter than the 4096"):
    measure(byte, str(tmp_path), (), 256)
  with pytest.raises(errors.ConfigError, match=r"tokenizer 'byte' has not"):
    measure(byte, str(tmp_path), (), 8192)
  trained = tokenizers.train_bpe(["some text"], 260)
  found = measure(trained, str(tmp_path), (), 8192)
  assert found == dict(tokenizer=str(tmp_path), max_seq_lengths=[4096, 8192])
  about = json.loads((tmp_path / "tokenizer_config.json").read_text())
  assert about["eos_token"] == "<|end_of_text|>"
