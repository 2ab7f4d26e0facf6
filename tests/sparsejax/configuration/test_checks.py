"""Configurations that contradict themselves are refused, with the remedy."""

import pathlib
import re

import pytest

from sparsejax import errors
from sparsejax.configuration import checks, overrides

SMOKE = str(pathlib.Path(__file__).parents[3] / "configs" / "smoke.py")


# The numbers that the messages below quote, whatever the preset's own are.
NUMBERS = (
  "train.num_steps=240",
  "optimizer.warmup_steps=20",
  "data.batch_size=16",
  "data.sequence_length=256",
)


def load(*assignments):
  return overrides.load(SMOKE, [f"--config.{text}" for text in (*NUMBERS, *assignments)])


def problem(*assignments):
  """The one problem of the smoke preset with these changes."""
  with pytest.raises(errors.ConfigError) as caught:
    checks.check(load(*assignments))
  message = str(caught.value)
  assert "\n" not in message, message
  return message


@pytest.mark.parametrize("key", checks.CHOICES)
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(key):
  allowed = checks.CHOICES[key]
  typo = allowed[0][:-1] + "_"
  with pytest.raises(errors.ConfigError) as caught:
    checks.check(load(f"{key}={typo}"))
  expected = f"unknown {key} {typo!r}. Did you mean"
  line = next(line for line in str(caught.value).splitlines() if line.startswith(expected))
  assert line.endswith(f"There are: {', '.join(allowed)}.")
  assert repr(allowed[0]) in line


@pytest.mark.parametrize(
  ("key", "value"),
  [(key, value) for key, values in checks.CHOICES.items() for value in values],
)
def test_every_choice_on_offer_is_accepted(key, value):
  checks.check(load(f"{key}={value}", "optimizer.decay_steps=10"))


@pytest.mark.parametrize("key", checks.AT_LEAST_ONE)
def test_sizes_begin_at_one(key):
  for value in (0, -1):
    with pytest.raises(errors.ConfigError, match=rf"(?m)^{key}={value} must be at least 1\.$"):
      checks.check(load(f"{key}={value}"))


@pytest.mark.parametrize("key", checks.AT_LEAST_ZERO)
def test_numbers_that_may_be_none_begin_at_zero(key):
  with pytest.raises(errors.ConfigError, match=rf"(?m)^{key}=-1 must be at least 0\.$"):
    checks.check(load(f"{key}=-1"))


@pytest.mark.parametrize(
  ("assignments", "message"),
  [
    (["ssa.full_ratio=1.5"], "ssa.full_ratio=1.5 is a probability: from 0 to 1."),
    (["ssa.full_ratio=-0.1"], "ssa.full_ratio=-0.1 is a probability: from 0 to 1."),
    (
      ["model.num_attention_heads=6", "model.num_key_value_heads=4"],
      "model.num_attention_heads=6 does not divide into model.num_key_value_heads=4 groups; "
      "take 1 or 2 or 3 or 6 key/value heads.",
    ),
    (
      ["model.rope_scaling.rope_type=llama3", "model.rope_scaling.factor=0.5"],
      "model.rope_scaling.factor=0.5 must be a finite number from 1 up: contexts become "
      "longer.",
    ),
    (
      ["model.rope_scaling.rope_type=llama3", "model.rope_scaling.low_freq_factor=8"],
      "model.rope_scaling.low_freq_factor=8.0 must be above 0 and below "
      "high_freq_factor=4.0, a finite number.",
    ),
    (
      ["model.head_dim=33"],
      "model.head_dim=33 is odd; rotary embeddings turn pairs of channels, so take an even "
      "number.",
    ),
    (
      ["data.sequence_length=250"],
      "data.sequence_length=250 is not a multiple of attention.block_size=16; take 240 or 256.",
    ),
    (
      ["data.sequence_length=8"],
      "data.sequence_length=8 is not a multiple of attention.block_size=16; take 16.",
    ),
    (
      ["attention.num_blocks=17"],
      "attention.num_blocks=17 blocks of 16 keys are more than the 16 of "
      "data.sequence_length=256; take at most 16.",
    ),
    (
      ["attention.selection=half_local", "attention.num_blocks=3"],
      "attention.num_blocks=3 is odd; selection='half_local' takes half of the blocks near by "
      "and half from afar, so take an even number.",
    ),
    (
      ["attention.layer_methods=moba,ful"],
      "unknown method in attention.layer_methods 'ful'. Did you mean 'full'? There are: full, "
      "moba, infllmv2, dma, ed_dma, nosa, nsa, sliding_window, ssa.",
    ),
    (
      ["attention.layer_methods=moba,moba,full"],
      "attention.layer_methods names 3 layers, which do not repeat to the "
      "model.num_hidden_layers=4; name 1 or 2 or 4.",
    ),
    (
      ["attention.layer_methods=nsa,full", "nsa.num_initial=-1"],
      "nsa.num_initial=-1 must be at least 0.",
    ),
    (
      ["attention.layer_methods=ssa,full", "attention.sparse_method=nsa", "nsa.num_initial=-1"],
      "nsa.num_initial=-1 must be at least 0.",
    ),
    (
      ["attention.method=full", "attention.sparse_method=nsa"],
      "attention.sparse_method='nsa' has weights that attention.method='full' does not train; "
      "take 'moba', or attention.method='nsa'.",
    ),
    (
      ["attention.method=nsa", "nsa.compress_length=24"],
      "nsa.compress_length=24 is not a multiple of nsa.compress_stride=16; take one.",
    ),
    (
      ["attention.sparse_method=nsa", "nsa.compress_stride=32"],
      "attention.block_size=16 is not a multiple of nsa.compress_stride=32; take one.",
    ),
    (
      ["attention.method=nsa", "nsa.num_initial=-1"],
      "nsa.num_initial=-1 must be at least 0.",
    ),
    (
      ["attention.method=nsa", "nsa.num_local=4"],
      "nsa.num_initial=1 and nsa.num_local=4 force 5 blocks, more than attention.num_blocks=4; "
      "take at least 5 blocks, or force fewer.",
    ),
    (
      ["attention.method=nsa", "attention.selection=half_local", "nsa.num_local=1"],
      "attention.selection='half_local' forces the query's own block alone; with NSA take "
      "nsa.num_initial=0 and nsa.num_local=1, not 1 and 1.",
    ),
    *(
      (
        ["attention.kernels=strict", f"{key}={name}"],
        f"attention.kernels='strict' forbids {key}={name!r}, which is no GPU kernel; set "
        f"{key} to 'auto', or attention.kernels.",
      )
      for key, name in (
        ("attention.full_implementation", "xla"),
        ("attention.sparse_implementation", "xla"),
        ("attention.sparse_implementation", "reference"),
      )
    ),
    (
      ["attention.method=infllmv2", "infllmv2.num_local=4", "infllmv2.num_initial=1"],
      "attention.num_blocks=4 has no room for the 1 initial + 4 local blocks of "
      "attention.method='infllmv2'; take at least 5, or lower infllmv2.num_local.",
    ),
    (
      ["attention.sparse_method=dma", "infllmv2.num_local=4", "infllmv2.local_window=released"],
      "attention.num_blocks=4 has no room for the 0 initial + 5 local blocks of "
      "attention.sparse_method='dma'; take at least 5, or lower infllmv2.num_local.",
    ),
    (
      ["attention.method=nosa", "nosa.num_query_aware=5"],
      "attention.num_blocks=4 has no room for the 0 initial + 2 local + 5 query-aware blocks "
      "of attention.method='nosa'; take at least 7, or lower infllmv2.num_local or "
      "nosa.num_query_aware.",
    ),
    (
      ["attention.method=nosa", "nosa.num_query_aware=3", "infllmv2.local_window=released"],
      "attention.num_blocks=4 has no room for the 0 initial + 3 local + 2 query-aware blocks "
      "of attention.method='nosa'; take at least 5, or lower infllmv2.num_local or "
      "nosa.num_query_aware.",
    ),
    (
      ["attention.method=infllmv2", "infllmv2.window_stride=5"],
      "infllmv2.window_stride=5 does not divide attention.block_size=16; take 1 or 2 or 4 or 8 "
      "or 16.",
    ),
    (
      ["attention.method=ed_dma", "infllmv2.num_local=1"],
      "infllmv2.num_local=1 is too few for attention.method='ed_dma': the windows of a block "
      "reach 24 keys from its beginning, beyond what a query sees of it; take at least 2, or "
      "fewer or shorter windows.",
    ),
    (
      ["attention.method=nosa", "infllmv2.num_windows=14", "infllmv2.local_window=released"],
      "infllmv2.num_local=2 is too few for attention.method='nosa': the windows of a block "
      "reach 60 keys from its beginning, beyond what a query sees of it; take at least 3, or "
      "fewer or shorter windows.",
    ),
    (
      ["attention.method=nosa", "attention.selection=half_local"],
      "attention.selection='half_local' is a rule of moba's; attention.method='nosa' selects "
      "by 'exact' alone, so set that.",
    ),
    (
      ["train.accumulate_steps=3"],
      "data.batch_size=16 does not divide into train.accumulate_steps=3 parts; take a batch of "
      "15 or 18.",
    ),
    (
      ["train.accumulate_steps=32"],
      "data.batch_size=16 does not divide into train.accumulate_steps=32 parts; take a batch "
      "of 32.",
    ),
    (
      ["optimizer.warmup_steps=241"],
      "optimizer.warmup_steps=241 plus optimizer.decay_steps=0 exceed train.num_steps=240; "
      "shorten them.",
    ),
    (
      ["optimizer.warmup_steps=200", "optimizer.decay_steps=41"],
      "optimizer.warmup_steps=200 plus optimizer.decay_steps=41 exceed train.num_steps=240; "
      "shorten them.",
    ),
    (
      ["optimizer.schedule=wsd"],
      "optimizer.schedule='wsd' needs optimizer.decay_steps, the length of its final decay; a "
      "tenth of the run is common: 24.",
    ),
    (
      ["data.sources=()"],
      "data.sources is empty; name prepared directories, or stdlib or recall.",
    ),
    (
      ["data.weights=1,2"],
      "data.weights has 2 numbers for 1 data.sources; give one each, or () to weigh them by "
      "size.",
    ),
    (["data.weights=0"], "data.weights=(0,) must all be positive numbers."),
    (["data.weights=a"], "data.weights=('a',) must all be positive numbers."),
    *(
      (
        [f"data.length_buckets={bounds}"],
        f"data.length_buckets={shown} must be ascending whole numbers, two or more, such as "
        "(0, 4096, 12288).",
      )
      for bounds, shown in (
        ("64", "(64,)"),
        ("64,0", "(64, 0)"),
        ("0,64,64", "(0, 64, 64)"),
        ("-1,64", "(-1, 64)"),
        ("0,6.5", "(0, 6.5)"),
        ("a,b", "('a', 'b')"),
      )
    ),
    (
      ["data.length_buckets=0,64,128", "data.length_weights=1"],
      "data.length_weights has 1 numbers for the 2 buckets of data.length_buckets; give one "
      "each, or () for equal shares.",
    ),
    (
      ["data.length_weights=1"],
      "data.length_weights has 1 numbers for the 0 buckets of data.length_buckets; give one "
      "each, or () for equal shares.",
    ),
    (
      ["data.length_buckets=0,64,128", "data.length_weights=1,0"],
      "data.length_weights=(1, 0) must all be positive numbers.",
    ),
    (
      ["mesh.fsdp=-1"],
      "mesh axes data and fsdp are both -1; only one can take what remains.",
    ),
    (["mesh.tensor=0"], "mesh.tensor=0 must be at least 1, or -1 for all remaining devices."),
    (["mesh.data=-2"], "mesh.data=-2 must be at least 1, or -1 for all remaining devices."),
    (
      ["mesh.tensor=4"],
      "mesh.tensor=4 cannot split model.num_key_value_heads=2; use fsdp or data for those "
      "devices instead.",
    ),
  ],
)
def test_a_contradiction_names_values_limits_and_remedy(assignments, message):
  assert problem(*assignments) == message


@pytest.mark.parametrize(
  "assignments",
  [
    ["ssa.full_ratio=0"],
    ["ssa.full_ratio=1"],
    ["model.rope_scaling.rope_type=llama3", "model.rope_scaling.factor=1"],
    ["model.rope_scaling.factor=0"],  # which type `default` does not read
    ["model.num_key_value_heads=4"],
    ["data.sequence_length=240"],
    ["attention.num_blocks=16"],
    ["attention.num_blocks=1"],
    ["attention.method=infllmv2", "infllmv2.num_local=4"],
    ["attention.method=infllmv2", "infllmv2.num_local=1"],
    ["attention.method=nosa", "nosa.num_query_aware=2"],
    ["attention.method=nosa", "nosa.num_query_aware=2", "infllmv2.local_window=released"],
    ["attention.method=nosa", "infllmv2.local_window=released", "infllmv2.num_local=1"],
    ["attention.method=dma", "infllmv2.num_windows=7"],
    # Sections that the method does not read.
    ["attention.method=ssa", "infllmv2.num_local=99", "infllmv2.window_stride=5"],
    ["attention.method=moba", "attention.sparse_method=nosa", "nosa.num_query_aware=99"],
    ["attention.selection=exact", "attention.num_blocks=3"],
    ["attention.layer_methods=full"],
    ["attention.layer_methods=moba,full"],
    ["attention.layer_methods=moba,full,ssa,sliding_window"],
    ["attention.layer_methods=full,moba", "attention.sparse_method=nsa", "nsa.num_initial=-1"],
    ["attention.layer_methods=full", "attention.method=full", "attention.sparse_method=nsa"],
    ["attention.method=nsa"],
    ["attention.method=nsa", "nsa.num_local=3"],
    ["attention.method=nsa", "nsa.compress_length=16"],
    [
      "attention.method=nsa",
      "attention.selection=half_local",
      "nsa.num_initial=0",
      "nsa.num_local=1",
    ],
    ["attention.sparse_method=nsa"],
    ["attention.method=moba", "nsa.num_local=9"],
    ["attention.kernels=strict", "attention.full_implementation=cudnn"],
    ["attention.kernels=strict", "attention.sparse_implementation=triton"],
    ["attention.kernels=strict", "attention.sparse_implementation=mosaic_gpu"],
    ["attention.kernels=auto", "attention.sparse_implementation=xla"],
    ["train.accumulate_steps=16"],
    ["optimizer.warmup_steps=240"],
    ["optimizer.schedule=wsd", "optimizer.decay_steps=220"],
    ["data.sources=a,b", "data.weights=1,0.5"],
    ["data.length_buckets=0,64"],
    ["data.length_buckets=0,64,128", "data.length_weights=1,0.5"],
    ["mesh.data=1", "mesh.fsdp=-1"],
    ["mesh.tensor=2"],
  ],
)
def test_the_limits_themselves_are_allowed(assignments):
  checks.check(load(*assignments))


@pytest.mark.parametrize(
  ("assignment", "remedy"),
  [
    ("data.sequence_length=250", "data.sequence_length=240"),
    ("attention.num_blocks=17", "attention.num_blocks=16"),
    ("attention.sparse_method=nosa nosa.num_query_aware=5", "attention.num_blocks=7"),
    ("attention.method=dma infllmv2.num_local=1", "infllmv2.num_local=2"),
    ("attention.method=infllmv2 infllmv2.window_stride=5", "infllmv2.window_stride=4"),
    ("train.accumulate_steps=3", "data.batch_size=15"),
    ("optimizer.schedule=wsd", "optimizer.decay_steps=24"),
  ],
)
def test_the_remedy_works(assignment, remedy):
  value = remedy.partition("=")[2]
  assignments = assignment.split()
  assert re.search(rf"\b{value}\b", problem(*assignments))
  checks.check(load(*assignments, remedy))


def test_every_problem_is_named_at_once():
  with pytest.raises(errors.ConfigError) as caught:
    checks.check(load("model.head_dim=33", "data.sources=()", "attention.method=ssaa"))
  lines = str(caught.value).splitlines()
  assert [line.split()[0] for line in lines] == ["unknown", "model.head_dim=33", "data.sources"]
  assert "'ssa'" in lines[0]
