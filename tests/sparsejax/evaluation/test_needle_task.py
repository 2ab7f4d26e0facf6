"""The needle task: oracles' scores, a model's answers, what is written and what is refused."""

import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from sparsejax import errors, model, sharding
from sparsejax.data import tokenizers
from sparsejax.evaluation import request as requests
from sparsejax.evaluation import subject as subjects
from sparsejax.evaluation import table
from sparsejax.evaluation.needles import answers, haystacks, questions, task
from tests import small

BYTES = tokenizers.ByteTokenizer()
LENGTH = 256


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A model that was not trained, of rows as long as the shortest questions."""
  config = small.make_config(data__sources=("recall",), data__sequence_length=LENGTH)
  config.data.update(recall_pairs=2, recall_queries=2)
  workdir = tmp_path_factory.mktemp("runs") / "tiny"
  small.save_checkpoints(workdir, config)
  return workdir


@pytest.fixture(scope="module")
def subject(workdir):
  return subjects.load(workdir, base.get_config())


def read_answers(text):
  """All answers, by nothing but what the text says."""
  asked = text.rpartition("\n")[2]
  if "variables" in asked:
    set_to = dict(re.findall(r"VAR ([A-Z]{3}) = (\w+)\.", text))
    reached, grew = {re.search(r"\d+", asked)[0]}, True
    while grew:
      new = {name for name, value in set_to.items() if value in reached} - reached
      reached, grew = reached | new, bool(new)
    return [name for name in set_to if name in reached]
  codes = re.findall(r"(?:The|One) code of (\w+) is (\d+)\.", text)
  return [value for key, value in codes if re.search(rf"\b{key}\b", asked)]


def oracle(choose, calls=None):
  """In place of a model: answers with some of the right answers of the prompt's text."""

  def generate(transformer, params, prompts, *, max_new_tokens, **options):
    if calls is not None:
      calls.append(options)
    texts = []
    for prompt in prompts:
      if options["num_ids"] is None:  # pairs of ids
        (places,) = np.nonzero(np.array(prompt[:-1]) == prompt[-1])
        texts.append([*choose([prompt[places[0] + 1]])])
      else:
        texts.append(BYTES.encode(f" {', '.join(choose(read_answers(BYTES.decode(prompt))))}."))
    return [text[:max_new_tokens] for text in texts]

  return generate


def wrong(right):
  return [x + 1 if isinstance(x, int) else x[::-1] + "9X" for x in right]


@pytest.fixture
def unforced(monkeypatch):
  """No model behind the oracles."""

  def forced(asked, *args, **options):
    ones = np.ones(len(asked))
    return types.SimpleNamespace(nll=2 * ones, hits=ones, num_tokens=4 * ones)

  monkeypatch.setattr(answers, "forced", forced)


def ask(subject, choose, calls=None, **changes):
  settings = dict(depths=(0, 60), num_questions=4) | changes
  return task.run(subject, task.Settings(**settings), generate=oracle(choose, calls))


@pytest.mark.parametrize("haystack", ["noise", "repeated"])
def test_an_oracle_is_right_and_its_opposite_wrong(subject, unforced, haystack):
  for cell in ask(subject, lambda right: right, haystack=haystack):
    assert (cell.accuracy, cell.accuracy_se) == (1.0, 0.0)
  for cell in ask(subject, wrong, haystack=haystack):
    assert (cell.accuracy, cell.accuracy_se) == (0.0, 0.0)


def test_half_of_the_answers_are_half_a_score(subject, unforced):
  several = ("multi_value", "multi_query", "variable_tracking")
  found = ask(subject, lambda right: right[:2], kinds=several)
  assert [cell.accuracy for cell in found] == [0.5] * 12
  # One of four that is given four times is one.
  found = ask(subject, lambda right: right[1:2] * 4, kinds=several)
  assert [cell.accuracy for cell in found] == [0.25] * 12


def test_cells_are_in_order_and_have_errors_and_counts(subject, unforced):
  calls, turns = [], iter(range(10**6))

  def every_other(right):
    return right if next(turns) % 2 else wrong(right)

  found = task.run(
    subject,
    task.Settings(kinds=("single", "mqar"), depths=(100, 0), num_questions=4),
    budgets=(16, 32),
    num_rows=3,
    generate=oracle(every_other, calls),
  )
  assert [(c.kind, c.mode, c.budget, c.depth) for c in found] == [
    (kind, mode, budget, depth)
    for kind in ("single", "mqar")
    for mode, budget in (("full", None), ("sparse", 16), ("sparse", 32))
    for depth in (100, 0)
  ]
  for cell in found:
    assert (cell.length, cell.haystack, cell.num_questions) == (LENGTH, "noise", 4)
    assert cell.accuracy == 0.5
    assert cell.accuracy_se == pytest.approx(np.std([0, 1, 0, 1], ddof=1) / 2)
    assert (cell.loss, cell.top1) == (0.5, 0.25)
  # Text ends where the tokenizer's texts do, and has its ids alone; pairs have all.
  assert [c["stream"] for c in calls] == ["full"] * 2 + ["sparse"] * 4
  assert [(c["num_ids"], c["stop_ids"]) for c in calls] == [(258, (257,)), (None, ())] * 3
  assert {c["rows"] for c in calls} == {3}
  assert {c["sampling"].temperature for c in calls} == {0}
  alone = ask(subject, wrong, kinds=("single",), num_questions=1)
  assert alone[0].accuracy_se is None


def test_a_number_that_goes_on_is_not_cut_to_be_right(subject, unforced):
  """The full stop is part of what may be written, so that a sixth digit would be seen."""
  found = ask(subject, lambda right: [f"{x}7" for x in right], kinds=("single",))
  assert [cell.accuracy for cell in found] == [0.0] * 4


def test_what_is_asked_beside_a_question_gives_it_no_more_room(subject, unforced):
  """Its answer comes after 8 other bytes: too late for one of 7, whatever others may write."""

  def generate(transformer, params, prompts, **options):
    right = oracle(lambda right: right)(transformer, params, prompts, **options)
    return [[*b" It is: ", *text][: options["max_new_tokens"]] for text in right]

  settings = task.Settings(kinds=("single", "multi_value"), depths=(0,), num_questions=2)
  found = task.run(subject, settings, modes=("full",), generate=generate)
  assert [cell.accuracy for cell in found] == [0.0, 1.0]


def test_forced_scores_are_of_the_continuation_alone(subject):
  maker = questions.Maker(BYTES, haystacks.noise(BYTES))
  asked = [
    maker.make("single", length=LENGTH, depth=50, seed=0, number=number) for number in (0, 1, 2)
  ]
  scores = answers.forced(
    asked,
    subject.transformer,
    subject.params,
    stream="sparse",
    mesh=subject.mesh,
    chunk_length=64,
    num_rows=2,
  )
  assert scores.num_tokens.tolist() == [len(" 12345.")] * 3

  @jax.jit
  def logits(params, ids_BT):
    places_BT = jnp.broadcast_to(jnp.arange(LENGTH), ids_BT.shape)
    output = subject.transformer.apply(
      {"params": params}, ids_BT, places_BT, jnp.ones_like(ids_BT), stream="sparse"
    )
    return model.logits(params, output.hidden_BTE)

  ids_BT = np.stack([np.concatenate([q.prompt, q.continuation]) for q in asked])
  with sharding.use(subject.mesh):
    same_BT = jax.device_put(np.resize(ids_BT, (8, LENGTH)), sharding.replicated(subject.mesh))
    logits_BTV = np.asarray(logits(subject.params, same_BT), np.float64)[:3]
  log_p_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
  for row, question in enumerate(asked):
    first = len(question.prompt)
    expected = -sum(log_p_BTV[row, t - 1, ids_BT[row, t]] for t in range(first, LENGTH))
    assert scores.nll[row] == pytest.approx(expected, rel=1e-4)


def test_ids_are_of_the_question_where_pairs_are_drawn_from_them(subject):
  """Models of one tokenizer may have room for different numbers of ids."""
  plan = lambda *kinds: task.plan(subject, task.Settings(kinds=kinds, depths=(0,)))  # noqa: E731
  assert {unit.key["vocab_size"] for unit in plan("single")} == {None}
  size = subject.transformer.shape.vocab_size
  assert {unit.key["vocab_size"] for unit in plan("single", "mqar")} == {size}


@pytest.fixture(scope="module")
def written(workdir):
  """The whole task on the model, in both modes."""
  request = requests.Request(
    path=workdir,
    tasks=("needle",),
    budgets=(16,),
    batch_size=8,
    about_needles=task.Settings(
      kinds=("single", "mqar"), depths=(0, 100), num_questions=3, seed=5
    ),
  )
  text, out = table.run(request, base.get_config())
  # A second time, nothing is measured.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(answers, "greedy", None)
    again, _ = table.run(request, base.get_config())
  assert again.partition("\ncells: ")[0] == text.partition("\ncells: ")[0]
  return text, out


def test_the_task_end_to_end(written):
  text, out = written
  content = json.loads((out / "needle.json").read_text())
  assert content["task"] == "needle"
  found = [task.Cell(**cell) for cell in content["cells"]]
  assert [(c.kind, c.mode, c.budget) for c in found[::2]] == [
    ("single", "full", None),
    ("single", "sparse", 16),
    ("mqar", "full", None),
    ("mqar", "sparse", 16),
  ]
  for cell in found:
    assert cell.num_questions == 3
    assert 0 <= cell.accuracy <= 1
    assert cell.accuracy_se is not None
    # Of a model that was not trained, about that of 320 ids.
    assert 3 < cell.loss < 12
  # Streams are not the same.
  assert found[0].loss != found[2].loss
  markdown = (out / "needle.md").read_text()
  assert markdown in text
  assert "| kind   | haystack | inference | budget | length | depth 0% " in markdown
  names = ("single_full", "single_sparse_16", "mqar_full", "mqar_sparse_16")
  assert {path.name for path in (out / "needle").iterdir()} == {f"{n}.png" for n in names}
  for path in (out / "needle").iterdir():
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(kinds=("singel",)), r"unknown --needle_kinds 'singel'\. Did you mean 'single'\?"),
    (dict(kinds=()), r"--needle_kinds= must name one at least, and none twice"),
    (dict(kinds=("mqar", "mqar")), r"--needle_kinds=mqar,mqar must name one at least"),
    (
      dict(haystack="essay"),
      r"unknown --haystack 'essay'\. There are: noise, repeated, corpus",
    ),
    (dict(depths=(0, 101)), r"--depths=101 is not a percentage; take numbers from 0"),
    (dict(depths=(50, 50)), r"--depths=50,50 must name one at least, and none twice"),
    (dict(num_questions=0), r"--questions=0 must be at least 1"),
    (dict(seed=-1), r"--seed=-1 must be at least 0"),
  ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
  with pytest.raises(errors.ConfigError, match=message):
    task.Settings(**changes)


def test_short_questions_are_refused_before_anything_is_read(tmp_path):
  request = requests.Request(path=tmp_path / "nowhere", tasks=("needle",), lengths=(256, 255))
  with pytest.raises(errors.ConfigError, match=r"--lengths=255 is too short.*at least 256"):
    table.run(request, base.get_config())


@pytest.mark.parametrize(
  ("changes", "kind", "message"),
  [
    (
      dict(lengths=(512,)),
      errors.ConfigError,
      r"--lengths=512 exceeds the model's rows of 256 tokens; .*--sequence_length=512",
    ),
    (dict(budgets=(12,)), errors.ConfigError, r"--budgets=12 is not a whole number of blocks"),
    (dict(modes=("spars",)), errors.ConfigError, r"unknown mode 'spars'"),
    (dict(haystack="corpus"), errors.DataError, r"--haystack=corpus needs held-out text"),
  ],
)
def test_what_does_not_fit_the_checkpoint_is_refused(subject, changes, kind, message):
  settings = task.Settings(haystack=changes.pop("haystack", "noise"))
  with pytest.raises(kind, match=message):
    task.run(subject, settings, generate=None, **changes)
