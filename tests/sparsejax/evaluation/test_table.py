"""From a checkpoint to a table: what is loaded, what is refused, what is written."""

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest

from configs import base
import pallas_kernels
from sparsejax import checkpoint, errors, scoring
from sparsejax.configuration import overrides, record
from sparsejax.evaluation import harness, markdown, perplexity, plans, table, tasks
from sparsejax.evaluation import request as requests
from sparsejax.evaluation import subject as subjects
from sparsejax.evaluation.protocols import settings as protocols
from tests import small

pytestmark = pytest.mark.usefixtures("plain_report")

CELLS = [
  perplexity.Cell("web", "unigram", None, 3.0, None, 20.0855, None, None, None, None),
  perplexity.Cell("web", "full", None, 2.0, 0.01, 7.38906, 0.0739, 0.98765, 0.4321, 12345),
  perplexity.Cell(
    "web", "sparse", 16, 2.5, math.nan, 12.1825, math.nan, 1.25, 0.4, 12345, 0.5, 0.0123
  ),
]

TABLE = markdown.align(perplexity.rows(CELLS))


def make_config():
  config = small.make_config(data__sources=("recall",), data__recall_pairs=2)
  config.data.recall_queries = 2
  return config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A workdir with checkpoints of steps 1 and 5, and the state of the latter."""
  workdir = tmp_path_factory.mktemp("runs") / "tiny"
  return workdir, small.save_checkpoints(workdir, make_config(), steps=(1, 5))


def test_a_checkpoint_is_restored_from_its_own_config(saved):
  workdir, state = saved
  subject = subjects.load(workdir, base.get_config())
  assert subject.step == 5
  assert subject.path == workdir / "checkpoints" / "5"
  assert overrides.flatten(subject.config) == overrides.flatten(make_config())
  jax.tree.map(np.testing.assert_array_equal, subject.params, state.params)
  assert subject.transformer.shape.hidden_size == 32
  assert [source.name for source in subject.corpus.sources] == ["recall"]
  assert dict(subject.mesh.shape) == dict(data=8, fsdp=1, tensor=1)


@pytest.mark.parametrize(
  ("asked", "message"),
  [
    (dict(kernels="fast"), "unknown --kernels 'fast'"),
    (dict(sequence_length=0), "--sequence_length=0 must be at least 1"),
    (dict(sequence_length="64"), "sequence_length='64' is not a whole number"),
  ],
)
def test_a_mistake_in_a_notebook_is_named(saved, asked, message):
  with pytest.raises(errors.ConfigError, match=message):
    subjects.load(saved[0], base.get_config(), **asked)


def test_a_step_is_that_of_workdirs(saved, tmp_path, monkeypatch):
  """A checkpoint beside them has its own; alone it is refused another."""
  monkeypatch.setattr(
    tasks.perplexity, "plan", lambda *args, **kwargs: plans.Plan((), lambda _: None)
  )
  one = saved[0] / "checkpoints" / "1"
  request = requests.Request(path=(saved[0], one), step=5, out=tmp_path)
  asked, _ = table._plan(request, base.get_config())
  assert [x.subject.step for x in asked] == [5, 1]
  with pytest.raises(errors.CheckpointError, match="is one checkpoint, and step=5 asks for"):
    table._plan(requests.Request(path=one, step=5), base.get_config())


def test_an_earlier_step_and_longer_rows_can_be_asked_for(saved):
  workdir, state = saved
  subject = subjects.load(workdir, base.get_config(), step=1, sequence_length=128)
  assert subject.step == 1
  newest, first = jax.tree.leaves(state.params)[0], jax.tree.leaves(subject.params)[0]
  np.testing.assert_allclose(first * 1.5, newest, rtol=1e-6)
  assert subject.corpus.sources[0].train[0].inputs.shape == (128,)


@pytest.mark.parametrize(
  ("trained", "problem"),
  [
    (dict(kernels="strict"), r"no GPU kernel can run full_attention"),
    (dict(sparse_implementation="mosaic_gpu"), r"sparse_implementation='mosaic_gpu' cannot"),
  ],
)
def test_a_checkpoint_from_a_gpu_needs_leave_to_run_elsewhere(
  saved, monkeypatch, trained, problem
):
  """And gets it with the flag that the refusal names."""
  if jax.devices()[0].platform == "gpu":
    pytest.skip("this machine has a GPU")
  workdir, state = saved
  about = checkpoint.read_record(workdir / "checkpoints" / "5")
  config = about.config | {f"attention.{key}": value for key, value in trained.items()}
  about = dataclasses.replace(about, config=config)
  monkeypatch.setattr(subjects.checkpoint, "read_record", lambda path: about)
  with pytest.raises(errors.ConfigError, match=f"{problem}[^$]*--kernels=auto"):
    subjects.load(workdir, base.get_config())
  subject = subjects.load(workdir, base.get_config(), kernels="auto")
  assert [choice.backend for choice in subject.backends][:3] == ["xla"] * 3
  assert overrides.flatten(subject.config) == overrides.flatten(make_config())
  jax.tree.map(np.testing.assert_array_equal, subject.params, state.params)


def test_kernels_can_be_asked_for_at_evaluation(saved):
  if jax.devices()[0].platform == "gpu":
    pytest.skip("this machine has a GPU")
  with pytest.raises(errors.ConfigError, match=r"attention\.kernels='strict': no GPU kernel"):
    subjects.load(saved[0], base.get_config(), kernels="strict")


@pytest.mark.parametrize(
  ("changes", "kind", "message"),
  [
    (
      dict(corpus="0ther"),
      errors.CheckpointError,
      r"have changed since training \(0ther, now .*\); name them with --sources",
    ),
    (
      dict(tokenizer="0ther"),
      errors.DataError,
      r"was trained with tokenizer 0ther, the data have byte.*; prepare the text with",
    ),
  ],
)
def test_data_that_are_not_the_checkpoints_own_are_refused(
  saved, monkeypatch, changes, kind, message
):
  workdir, _ = saved
  about = checkpoint.read_record(workdir / "checkpoints" / "5")
  about = dataclasses.replace(about, **changes)
  monkeypatch.setattr(subjects.checkpoint, "read_record", lambda path: about)
  with pytest.raises(kind, match=message):
    subjects.load(workdir, base.get_config())
  if "corpus" in changes:
    # By name, they are taken as they are.
    named = subjects.load(workdir, base.get_config(), sources=("recall",))
    assert named.config.data.weights == ()


def test_a_place_without_checkpoint_is_refused(tmp_path):
  with pytest.raises(errors.CheckpointError, match=r"checkpoint"):
    table.run(requests.Request(path=tmp_path), base.get_config())


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(tasks=("perplexty",)), r"unknown task 'perplexty'\. Did you mean 'perplexity'\?"),
    (
      dict(tasks=("perplexity", "z")),
      r"unknown task 'z'\. There are: perplexity, .*needle, lm_eval, sparsity\.",
    ),
    (dict(modes=("sparce",)), r"unknown mode 'sparce'\. Did you mean 'sparse'\?"),
    (dict(lengths=(64, 0)), "--lengths=0 must be at least 1"),
    (dict(num_steps=1), "--num_steps=1 must be at least 2"),
    (dict(sequence_length=0), "--sequence_length=0 must be at least 1"),
    (dict(max_rows=-1), "--max_rows=-1 must be at least 0"),
    (dict(batch_size=-8), "--batch_size=-8 must be at least 0"),
    (dict(tasks=()), "--tasks= names none; name one at least"),
    (dict(modes=()), "--modes= names none; name one at least"),
    (dict(modes=("full", "full")), "--modes=full,full names full twice; name each once"),
    (dict(budgets=(32, 16, 32)), "--budgets=32,16,32 names 32 twice"),
    (dict(lengths=(64, 64)), "--lengths=64,64 names 64 twice"),
    (dict(path=("a", "")), "--workdir has an empty path"),
    (dict(compare=""), "--compare has an empty path"),
    (dict(out=""), "--out has an empty path"),
    (
      dict(sources=("a",), about_perplexity=protocols.Settings(corpus=("b",))),
      "--corpus and --sources are two texts for perplexity",
    ),
    (
      dict(tasks=("lm_eval",), lm_eval=harness.Options(tasks=("piqa", "piqa"))),
      "--lm_eval_tasks=piqa,piqa names a task twice",
    ),
    (
      dict(tasks=("throughput",), modes=("full",), spare=(8, 16)),
      "--spare=8,16 is of lists under sparse inference; add sparse to --modes",
    ),
    (dict(kernels="strikt"), r"unknown --kernels 'strikt'\. Did you mean 'strict'\?"),
  ],
)
def test_an_unknown_question_is_refused_before_anything_is_read(tmp_path, changes, message):
  with pytest.raises(errors.ConfigError, match=message):
    table.run(requests.Request(**dict(path=tmp_path / "nowhere") | changes), base.get_config())


@pytest.fixture
def asked(monkeypatch):
  """A task that answers at once; returns the options it was asked with."""
  calls = []

  def plan(subject, **options):
    def measure(loaded):
      calls.append(options)

    unit = plans.Unit(key=dict(task="perplexity"), measure=measure)
    return plans.Plan((unit,), lambda values: plans.Told(CELLS, TABLE))

  monkeypatch.setattr(tasks.perplexity, "plan", plan)
  return calls


def test_the_answer_is_written_with_all_that_it_depends_on(saved, asked):
  workdir, _ = saved
  request = requests.Request(
    path=workdir, modes=("sparse",), budgets=(8, 16), max_rows=7, batch_size=3
  )
  text, out = table.run(request, base.get_config())
  (options,) = asked
  assert options == dict(
    settings=protocols.Settings(),
    lengths=(),
    modes=("sparse",),
    budgets=(8, 16),
    max_rows=7,
    batch_size=3,
  )
  assert out == workdir / "eval" / "5"
  assert (out / "perplexity.md").read_text() == TABLE
  *backends, printed = text.split("\n", maxsplit=4)
  said = f"cells: 1 measured, 0 taken from before ({out}/cells.jsonl)"
  assert printed == f"{TABLE}\n{said}"
  assert [line.partition(" (")[0] for line in backends] == [
    "backend of full_attention: xla",
    "backend of block_selection: xla",
    "backend of block_sparse_attention: xla",
    "backend of dual_path_attention: separate",
  ]
  content = json.loads((out / "perplexity.json").read_text())
  assert content["task"] == "perplexity"
  assert content["run"] == "tiny"
  assert content["step"] == 5
  assert content["method"] == "ssa"
  assert content["config"] == record.as_json(make_config())
  assert content["config_hash"] == record.digest(make_config())
  assert content["environment"]["num_devices"] == 8
  assert content["backends"] == dict(
    full_attention="xla",
    block_selection="xla",
    block_sparse_attention="xla",
    dual_path_attention="separate",
  )
  assert [perplexity.from_json(cell) for cell in content["cells"]][:2] == CELLS[:2]


def test_what_runs_is_said_of_every_budget(saved, asked, monkeypatch):
  def choose(config, transformer):
    num_blocks = transformer.options.num_blocks
    return [
      pallas_kernels.Choice("selection", "xla" if num_blocks > 2 else "fast", "why"),
      pallas_kernels.Choice("attention", "fast", "why"),
    ]

  monkeypatch.setattr(subjects.build, "choose_backends", choose)
  run = functools.partial(table.run, template=base.get_config())
  text, out = run(requests.Request(path=saved[0], budgets=(8, 16, 32)))
  assert text.startswith(
    "backend of selection: fast (why)\nbackend of attention: fast (why)\n"
    "backend of selection: xla (why)\n|"
  )
  content = json.loads((out / "perplexity.json").read_text())
  assert content["backends"] == dict(selection="fast, xla", attention="fast")
  # That of training: three blocks.
  assert run(requests.Request(path=saved[0]))[0].startswith(
    "backend of selection: xla (why)\nba"
  )


def test_the_answer_can_go_elsewhere(saved, asked, tmp_path):
  workdir, _ = saved
  _, out = table.run(
    requests.Request(path=workdir, out=tmp_path / "x" / "y"), base.get_config()
  )
  assert out == tmp_path / "x" / "y"
  assert (out / "perplexity.json").is_file()


def test_the_table_reads_well_in_a_terminal():
  assert TABLE == (
    "| data | inference | budget | perplexity    | bits/byte | loss            "
    "| above full      | accuracy | tokens |\n"
    "|------|-----------|--------|---------------|-----------|-----------------"
    "|-----------------|----------|--------|\n"
    "| web  | unigram   | -      | 20.085        | -         | 3.0000          "
    "| -               | -        | -      |\n"
    "| web  | full      | -      | 7.389 ± 0.074 | 0.9877    | 2.0000 ± 0.0100 "
    "| -               | 43.2%    | 12,345 |\n"
    "| web  | sparse    | 16     | 12.182        | 1.2500    | 2.5000          "
    "| 0.5000 ± 0.0123 | 40.0%    | 12,345 |\n"
  )


def test_losses_by_position_are_told_beside_the_table(saved, tmp_path, monkeypatch):
  """Of rows as long as those of training, and of shorter ones of the same data."""

  def make_score(transformer, stream, chunk_length):
    factor = 0.5 if stream == "full" else 0.25
    return lambda params, batch: (factor * batch.weights, batch.weights > 0)

  monkeypatch.setattr(scoring, "make_token_score", make_score)
  request = requests.Request(
    path=saved[0], budgets=(8,), lengths=(64, 32), max_rows=3, out=tmp_path
  )
  text, _ = table.run(request, base.get_config())
  content = json.loads((tmp_path / "perplexity.json").read_text())
  cells = [perplexity.from_json(cell) for cell in content["cells"]]
  assert [(c.mode, c.length, c.num_samples, c.num_tokens) for c in cells] == [
    ("unigram", None, None, None),
    ("full", 64, 3, 6),
    ("full", 32, 3, 6),
    ("sparse", 64, 3, 6),
    ("sparse", 32, 3, 6),
  ]
  # What is asked for is at the end of every row.
  assert [[p.last for p in cell.positions] for cell in cells[1:]] == [[64], [32]] * 2
  assert {p.gap for cell in cells[3:] for p in cell.positions} == {-0.25}
  assert (
    "loss by tokens read before\n\n"
    "| data   | inference | budget | length | to 32  | to 64  |\n"
    "|--------|-----------|--------|--------|--------|--------|\n"
    "| recall | full      | -      | 64     | -      | 0.5000 |\n"
    "| recall | full      | -      | 32     | 0.5000 | -      |\n"
  ) in text
  assert (tmp_path / "perplexity_by_position.png").read_bytes().startswith(b"\x89PNG")


def test_a_corpus_that_is_missing_is_refused_before_anything_is_read(tmp_path):
  request = requests.Request(
    path=tmp_path / "nowhere", about_perplexity=protocols.Settings(corpus=("no/such.txt",))
  )
  with pytest.raises(errors.DataError, match=r"input 'no/such\.txt' does not exist"):
    table.run(request, base.get_config())
