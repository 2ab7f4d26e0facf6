"""Budgets: models that read more or fewer blocks, and what is refused beforehand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from configs import base
from sparsejax import errors, generate
from sparsejax.configuration import build
from sparsejax.evaluation import perplexity
from sparsejax.evaluation import subject as subjects
from tests import small

HALVES = dict(attention__selection="half_local", attention__num_blocks=4)

# The query chooses one of NOSA's blocks, two of which are forced: three, or 24 keys.
NOSA = dict(infllmv2__num_local=2, nosa__num_query_aware=1)

MODELS = {
  "moba": dict(attention__method="moba"),
  "full": dict(attention__method="full"),
  "nsa": dict(attention__method="nsa"),
  "moba_in_halves": dict(attention__method="moba", **HALVES),
  "nsa_in_halves": dict(
    attention__method="nsa", nsa__num_initial=0, nsa__num_local=1, **HALVES
  ),
  "halves_in_turn": dict(
    attention__method="full", attention__layer_methods=("sliding_window", "ssa"), **HALVES
  ),
  # Of layers, `method` is none.
  "nosa_in_turn": dict(
    attention__method="moba", attention__layer_methods=("nosa", "moba"), **NOSA
  ),
  "no_nosa": dict(attention__method="nosa", attention__layer_methods=("moba",), **NOSA),
  "full_for_good": dict(
    attention__method="nosa",
    attention__sparse_method="nosa",
    attention__layer_methods=("moba", "full"),
    **NOSA,
  ),
}

# Least budget, and from one to the next.
BUDGETS = dict.fromkeys(MODELS, (8, 8)) | {
  "moba_in_halves": (16, 16),
  "nsa_in_halves": (16, 16),
  "halves_in_turn": (16, 16),
  "nosa_in_turn": (24, 8),
}


def runs(transformer, length=64):
  """Traces a sparse forward pass, which the kernels' own checks may refuse."""
  params = small.shapes_of_params(transformer)
  ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

  def apply(params, ids):
    return transformer.apply({"params": params}, ids, ids, ids, stream="sparse")

  jax.eval_shape(apply, params, ids)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_not_refused_runs(name):
  transformer, (least, step) = small.make_model(**MODELS[name]), BUDGETS[name]
  for budget in (least, least + step):
    wider = build.with_budget(transformer, budget)
    assert wider.options.budget == budget
    runs(wider)
  for budget in {*range(-8, least + 2 * step, 4)} - {*range(least, 100, step)}:
    # A budget that the model has is none to refuse.
    assert budget != transformer.options.budget
    with pytest.raises(errors.ConfigError, match=f"a budget of {budget} keys is "):
      build.with_budget(transformer, budget)


@pytest.mark.parametrize(
  ("name", "budget", "message"),
  [
    ("moba", 4, "is 0 blocks of 8, fewer than the 1 that .*; take at least 8.$"),
    ("moba", 37, "is not a whole number of blocks of 8 keys; take 32 or 40.$"),
    ("nosa_in_turn", 8, "is 1 blocks of 8, fewer than the 3 that .*; take at least 24.$"),
    ("nosa_in_turn", 37, "is not a whole number of blocks of 8 keys; take 32 or 40.$"),
    ("moba_in_halves", 8, "is 1 blocks of 8, fewer than the 2 that .*; take at least 16.$"),
    # What it names must do: neither 40 nor 24.
    ("moba_in_halves", 37, "is not a whole number of blocks of 8 keys; take 32 or 48.$"),
    (
      "nsa_in_halves",
      24,
      "is 3 blocks of 8, an odd number; attention.selection='half_local' takes half of the "
      "blocks near by and half from afar, so take 16 or 32.$",
    ),
  ],
)
def test_the_remedy_is_named(name, budget, message):
  with pytest.raises(errors.ConfigError, match=f"^a budget of {budget} keys {message}"):
    build.with_budget(small.make_model(**MODELS[name]), budget)


@pytest.mark.parametrize(
  ("layers", "reads"),
  [
    ((), "'sliding_window' reads the last attention.window=12 tokens"),
    (
      ("sliding_window", "full"),
      "'sliding_window' reads the last attention.window=12 tokens and 'full' reads every "
      "earlier token",
    ),
    (("full",), "'full' reads every earlier token"),
  ],
)
@pytest.mark.parametrize("method", ["sliding_window", "full"])
def test_without_lists_of_blocks_a_budget_is_refused(method, layers, reads):
  transformer = small.make_model(
    attention__method=method,
    attention__sparse_method="sliding_window",
    attention__layer_methods=layers,
  )
  with pytest.raises(
    errors.ConfigError,
    match=f"^a budget of 8 keys is for methods that choose blocks; {reads} whatever the "
    "budget, so leave it out.$",
  ):
    build.with_budget(transformer, 8)
  # What evaluations ask for by themselves.
  assert build.with_budget(transformer, 24) == transformer


@pytest.mark.parametrize("name", MODELS)
def test_a_budget_changes_the_blocks_and_nothing_else(name):
  transformer = small.make_model(**MODELS[name])
  wider = build.with_budget(transformer, 64)
  num_blocks = transformer.options.num_blocks
  assert wider.options.num_blocks == 8 != num_blocks
  assert dataclasses.replace(wider.options, num_blocks=num_blocks) == transformer.options
  assert wider.shape == transformer.shape


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
  """Of models that were not trained."""
  home = tmp_path_factory.mktemp("runs")
  for name, changes in {
    "halves": MODELS["moba_in_halves"],
    "in_turn": MODELS["nosa_in_turn"],
    "window": dict(attention__method="sliding_window"),
  }.items():
    config = small.make_config(data__sources=("recall",), data__recall_pairs=2, **changes)
    config.data.recall_queries = 2
    small.save_checkpoints(home / name, config)
  return home


@pytest.mark.parametrize(
  ("name", "budget", "message"),
  [
    ("halves", 24, "take 16 or 32"),
    ("halves", 37, "take 32 or 48"),
    ("in_turn", 8, "take at least 24"),
    ("window", 8, "whatever the budget"),
  ],
)
def test_programs_refuse_before_parameters_are_read(
  workdirs, monkeypatch, capsys, name, budget, message
):
  monkeypatch.setattr(subjects.checkpoint, "load_params", None)
  workdir = workdirs / name
  assert generate.main([f"--workdir={workdir}", f"--budget={budget}", "--prompt=a"]) == 2
  said = capsys.readouterr().err
  assert said.startswith(f"error: a budget of {budget} keys is ")
  assert message in said
  assert said.count("\n") == 1
  with pytest.raises(errors.ConfigError, match=message):
    subjects.describe(workdir, base.get_config(), budgets=(budget,))


def test_a_model_without_lists_is_evaluated_without_budgets(workdirs):
  subject = subjects.load(workdirs / "window", base.get_config())
  found = perplexity.run(subject, modes=("sparse",), max_rows=8)
  assert [cell.mode for cell in found] == ["unigram", "sparse"]
