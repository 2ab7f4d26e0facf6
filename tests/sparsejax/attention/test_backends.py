"""What a model's attention runs on, said or refused before anything runs."""

import dataclasses

import jax
import pytest

import pallas_kernels
from pallas_kernels.full_attention import cudnn
from sparsejax import attention, errors, sharding
from sparsejax.attention import backends
from sparsejax.decoding import cache as caches
from tests import small

SHAPE = dict(dtype="bfloat16", num_heads=4, num_kv_heads=2, head_dim=64, length=64)
CUDNN = "cudnn needs an NVIDIA GPU, this is cpu"
MOSAIC = "mosaic_gpu needs a Hopper GPU, this is cpu"
TRITON = "triton needs an NVIDIA GPU, this is cpu"

pytestmark = pytest.mark.skipif(
  jax.devices()[0].platform == "gpu", reason="what is said of a machine without a GPU"
)


def choose(**keys):
  changes = {f"attention__{key}": value for key, value in keys.items()}
  return backends.choose(small.make_model(**changes).options, **SHAPE)


@pytest.mark.parametrize("method", attention.METHODS)
def test_every_operation_of_both_streams_is_there_once(method):
  blocks = ["block_selection", "block_sparse_attention"]
  own = dict(
    nsa=["compressed_attention", *blocks, "sliding_window_attention"],
    sliding_window=["sliding_window_attention"],
    ssa=[*blocks, "dual_path_attention"],
  )
  ops = [choice.op for choice in choose(method=method)]
  assert ops == ["full_attention", *own.get(method, blocks)]


def test_a_cpu_takes_xla_and_says_why():
  full, selection, sparse, dual = map(str, choose(method="ssa"))
  assert full == f"full_attention: xla ({CUDNN})"
  assert selection == f"block_selection: xla ({MOSAIC})"
  assert sparse == f"block_sparse_attention: xla ({MOSAIC}; {TRITON})"
  assert dual == (
    "dual_path_attention: separate (full_attention by xla, block_sparse_attention by xla)"
  )


@pytest.mark.parametrize(
  ("changes", "selection", "sparse"),
  [
    ({}, "mosaic_gpu (the first choice)", "mosaic_gpu (the first choice)"),
    (
      dict(dtype="float32"),
      "xla (mosaic_gpu takes bfloat16, not float32 and float32)",
      f"xla (mosaic_gpu takes bfloat16, not float32; {TRITON})",
    ),
    (
      dict(head_dim=32),
      "xla (mosaic_gpu takes head sizes (64, 128), not 32)",
      f"xla (mosaic_gpu takes head sizes (64, 128), not 32; {TRITON})",
    ),
  ],
)
def test_a_hopper_takes_its_kernels_and_says_why_where_it_does_not(
  changes, selection, sparse, monkeypatch
):
  monkeypatch.setattr("pallas_kernels.devices.why_not_hopper", lambda: None)
  options = small.make_model(attention__method="ssa", attention__block_size=16).options
  _, *said, dual = map(str, backends.choose(options, **SHAPE | changes))
  assert said == [f"block_selection: {selection}", f"block_sparse_attention: {sparse}"]
  backend = sparse.partition(" (")[0]
  assert dual == (
    "dual_path_attention: separate (full_attention by xla, block_sparse_attention by "
    f"{backend})"
  )


def test_a_name_is_taken():
  named = choose(method="ssa", full_implementation="xla", sparse_implementation="reference")
  assert [str(choice) for choice in named] == [
    "full_attention: xla (asked for)",
    "block_selection: reference (asked for)",
    "block_sparse_attention: reference (asked for)",
    "dual_path_attention: separate (full_attention by xla, block_sparse_attention by "
    "reference)",
  ]


def test_strict_refuses_every_operation_without_a_kernel_at_once():
  with pytest.raises(errors.ConfigError) as caught:
    choose(kernels="strict")
  assert str(caught.value).splitlines() == [
    f"attention.kernels='strict': no GPU kernel can run full_attention ({CUDNN}). Set "
    "attention.kernels to 'auto' to run it in XLA.",
    f"attention.kernels='strict': no GPU kernel can run block_selection ({MOSAIC}). Set "
    "attention.kernels to 'auto' to run it in XLA.",
    "attention.kernels='strict': no GPU kernel can run block_sparse_attention "
    f"({MOSAIC}; {TRITON}). Set attention.kernels to 'auto' to run it in XLA.",
  ]


def test_the_key_that_asked_is_the_one_that_is_named():
  """Triton has no kernel of selection, so that it is `strict` which selection cannot keep."""
  with pytest.raises(errors.ConfigError) as caught:
    choose(kernels="strict", sparse_implementation="triton")
  full, selection, sparse = str(caught.value).splitlines()
  assert full.startswith("attention.kernels='strict': no GPU kernel can run full_attention")
  assert selection.startswith("attention.kernels='strict': no GPU kernel can run block_selec")
  assert sparse.startswith("attention.sparse_implementation='triton' cannot run: triton needs")


@pytest.mark.parametrize("length", [16, 8])
def test_a_hopper_runs_all_of_nsa_on_kernels(length, monkeypatch):
  """Whether windows are the blocks or overlap them."""
  monkeypatch.setattr("pallas_kernels.devices.why_not_hopper", lambda: None)
  monkeypatch.setattr(cudnn, "why_not", lambda *_, **__: None)
  options = small.make_model(
    attention__method="nsa",
    attention__block_size=16,
    attention__kernels="strict",
    nsa__compress_length=length,
    nsa__compress_stride=length,
  ).options
  assert [(choice.op, choice.backend) for choice in backends.choose(options, **SHAPE)] == [
    ("full_attention", "cudnn"),
    ("compressed_attention", "cudnn"),
    ("block_selection", "mosaic_gpu"),
    ("block_sparse_attention", "mosaic_gpu"),
    ("sliding_window_attention", "cudnn"),
  ]


@pytest.mark.parametrize(
  ("key", "name", "why"),
  [
    ("full_implementation", "cudnn", CUDNN),
    ("sparse_implementation", "mosaic_gpu", MOSAIC),
    ("sparse_implementation", "triton", TRITON),
  ],
)
def test_a_name_that_cannot_run_is_refused_by_its_key(key, name, why):
  with pytest.raises(errors.ConfigError) as caught:
    choose(**{key: name})
  lines = str(caught.value).splitlines()
  # Selection and attention run on the same kernels, but Triton has none for selection.
  assert len(lines) == (2 if name == "mosaic_gpu" else 1)
  for line in lines:
    assert line == f"attention.{key}={name!r} cannot run: {why}. Set it to 'auto'."


def test_operations_are_asked_about_as_the_methods_call_them(monkeypatch):
  """Shapes, dtypes, documents and names reach the operations."""
  asked = {}

  def record(name):
    def ask(*arrays, **options):
      asked[name] = [x.shape for x in arrays], arrays[0].dtype.name, options
      return pallas_kernels.Choice(name, "fast", "why")

    return ask

  for op in (
    "full_attention",
    "block_selection",
    "block_sparse_attention",
    "dual_path_attention",
  ):
    monkeypatch.setattr(pallas_kernels, f"choose_{op}", record(op))
  choose(
    method="ssa",
    kernels="strict",
    document_mask="full",
    num_blocks=6,
    selection="half_local",
  )
  qkv = [(1, 64, 4, 64), (1, 64, 2, 64), (1, 64, 2, 64)]
  with_lists = [*qkv, (1, 64, 2, 6)]
  shapes, dtype, options = asked["full_attention"]
  assert (shapes, dtype) == (qkv, "bfloat16")
  assert options.pop("segments_BT").shape == (1, 64)
  assert options == dict(max_documents=4, implementation="strict")
  shapes, dtype, options = asked["block_selection"]
  assert (shapes, dtype) == (qkv[:2], "bfloat16")
  assert options == dict(block_size=8, num_blocks=6, rule="half_local", implementation="strict")
  shapes, dtype, options = asked["block_sparse_attention"]
  assert (shapes, dtype) == (with_lists, "bfloat16")
  assert options == dict(block_size=8, segments_BS=None, implementation="strict")
  shapes, dtype, options = asked["dual_path_attention"]
  assert (shapes, dtype) == (with_lists, "bfloat16")
  assert options.pop("full_segments_BT").shape == (1, 64)
  assert options == dict(
    block_size=8,
    sparse_segments_BT=None,
    max_documents=4,
    full_implementation="strict",
    sparse_implementation="strict",
  )


def test_a_row_that_is_read_whole_has_no_halves(monkeypatch):
  """64 tokens have 8 blocks, whatever the budget."""
  asked = {}

  def ask(*arrays, **options):
    asked.update(options)
    return pallas_kernels.Choice("block_selection", "fast", "why")

  monkeypatch.setattr(pallas_kernels, "choose_block_selection", ask)
  choose(method="moba", num_blocks=99, selection="half_local")
  assert asked == dict(block_size=8, num_blocks=8, rule="exact", implementation="auto")


@pytest.mark.parametrize(
  ("method", "sparse_method", "biased"),
  [
    ("nosa", "moba", ["full_attention", "block_sparse_attention"]),
    ("ssa", "dma", ["full_attention", "block_sparse_attention", "dual_path_attention"]),
    # Training runs full attention, without the head that only selection has.
    ("full", "nosa", ["block_sparse_attention"]),
    ("infllmv2", "nosa", []),
  ],
)
def test_operations_are_asked_about_the_biases_that_they_get(
  method, sparse_method, biased, monkeypatch
):
  asked = {}
  for op in ("full_attention", "block_sparse_attention", "dual_path_attention"):

    def ask(*arrays, op=op, **options):
      asked[op] = [x.shape for key, x in options.items() if key.startswith("key_bias")]
      return pallas_kernels.Choice(op, "fast", "why")

    monkeypatch.setattr(pallas_kernels, f"choose_{op}", ask)
  choose(method=method, sparse_method=sparse_method)
  assert {op: shapes for op, shapes in asked.items() if shapes} == {
    op: [(1, 64, 2)] for op in biased
  }


@pytest.mark.parametrize(
  ("normalizer", "selection"),
  [
    ("windows", "mosaic_gpu (the first choice)"),
    (
      "coarse",
      "xla (mosaic_gpu normalises over the windows it scores, not over those of 16 keys every "
      "8)",
    ),
  ],
)
@pytest.mark.parametrize("method", ["infllmv2", "nosa"])
def test_selection_is_asked_about_its_windows(method, normalizer, selection, monkeypatch):
  monkeypatch.setattr("pallas_kernels.devices.why_not_hopper", lambda: None)
  options = small.make_model(
    attention__method=method, infllmv2__normalizer=normalizer, infllmv2__num_windows=4
  ).options
  (said,) = (
    str(choice)
    for choice in backends.choose(options, **SHAPE)
    if choice.op == "block_selection"
  )
  assert said == f"block_selection: {selection}"


@pytest.mark.parametrize(
  ("kernels", "named", "attention_runs", "selection_runs"),
  [
    ("auto", "auto", "auto", "auto"),
    ("strict", "auto", "strict", "strict"),
    ("auto", "mosaic_gpu", "mosaic_gpu", "mosaic_gpu"),
    ("strict", "mosaic_gpu", "mosaic_gpu", "mosaic_gpu"),
    ("auto", "reference", "reference", "reference"),
    ("auto", "triton", "triton", "auto"),
    ("strict", "triton", "triton", "strict"),
  ],
)
def test_a_name_comes_before_kernels(kernels, named, attention_runs, selection_runs):
  options = small.make_model(
    attention__kernels=kernels, attention__sparse_implementation=named
  ).options
  assert options.sparse_backend == attention_runs
  assert options.selection_backend == selection_runs
  assert options.full_backend == kernels


@pytest.mark.parametrize("stream", ["train", "full", "sparse"])
def test_what_is_asked_for_reaches_the_operations_themselves(stream):
  """Whoever does not ask before gets the operation's own error, not another backend."""
  transformer = small.make_model(attention__kernels="strict")
  batch = small.make_batch()
  params = small.make_params(small.make_model())
  with pytest.raises(pallas_kernels.CannotRunError, match="implementation='strict' cannot run"):
    transformer.apply(
      {"params": params}, batch.inputs, batch.positions, batch.segments, stream=stream
    )


CUDNN_NAMED, MOSAIC_NAMED = dict(implementation="cudnn"), dict(implementation="mosaic_gpu")


@pytest.mark.parametrize(
  ("stream", "expected"),
  [
    ("full", dict(full_attention=CUDNN_NAMED)),
    ("sparse", dict(select_blocks=MOSAIC_NAMED, block_sparse_attention=MOSAIC_NAMED)),
    (
      "train",
      dict(
        select_blocks=MOSAIC_NAMED,
        dual_path_attention=dict(
          full_implementation="cudnn", sparse_implementation="mosaic_gpu"
        ),
      ),
    ),
  ],
)
def test_each_operation_is_told_its_own_name(stream, expected, monkeypatch):
  told = {}

  def spy(name):
    run = getattr(pallas_kernels, name)

    def call(*arrays, **options):
      told[name] = {k: x for k, x in options.items() if k.endswith("implementation")}
      return run(*arrays, **{k: x for k, x in options.items() if k not in told[name]})

    return call

  for op in (
    "full_attention",
    "select_blocks",
    "block_sparse_attention",
    "dual_path_attention",
  ):
    monkeypatch.setattr(pallas_kernels, op, spy(op))
  names = dict(full_implementation="cudnn", sparse_implementation="mosaic_gpu")
  transformer = small.make_model(**{f"attention__{key}": name for key, name in names.items()})
  batch = small.make_batch()
  params = small.make_params(small.make_model())
  # Those of making the parameters do not count.
  told.clear()
  transformer.apply(
    {"params": params}, batch.inputs, batch.positions, batch.segments, stream=stream
  )
  assert told == expected


def decoding_choices(transformer, stream, room, num_devices=1):
  devices = jax.devices()[:num_devices]
  mesh = jax.make_mesh((num_devices, 1, 1), sharding.AXES, devices=devices)
  return backends.choose_decoding(transformer.options, stream, room, num_heads=4, mesh=mesh)


@pytest.mark.parametrize("stream", ["full", "sparse"])
def test_decoding_says_what_it_runs_on(stream):
  transformer = small.make_model(attention__method="nosa", attention__num_blocks=4)
  room = caches.room(transformer, batch=2, length=64, num_slots=8)
  said = decoding_choices(transformer, stream, room)
  chosen = [("select_blocks_of_token", "xla")] if stream == "sparse" else []
  assert [(choice.op, choice.backend) for choice in said] == [
    ("decode_attention", "xla"),
    *chosen,
    ("plan_slots", "xla"),
    ("fetch_pages", "dma"),
    ("write_pages", "dma"),
  ]
  room = dataclasses.replace(room, num_slots=None)
  said = decoding_choices(transformer, stream, room)
  assert [(choice.op, choice.backend) for choice in said] == [
    ("decode_attention", "xla"),
    *chosen,
  ]


@pytest.mark.parametrize("method", ["nsa", "nosa"])
def test_where_all_pages_are_read_none_are_chosen(method):
  transformer = small.make_model(attention__method=method, attention__num_blocks=4)
  for length, is_choosing in ((32, False), (40, True)):
    room = caches.room(transformer, batch=2, length=length)
    ops = [choice.op for choice in decoding_choices(transformer, "sparse", room)]
    assert ("select_blocks_of_token" in ops) == is_choosing


def test_decoding_on_kernels_alone_is_refused_without_a_gpu():
  options = dict(attention__kernels="strict", model__dtype="bfloat16", model__head_dim=64)
  transformer = small.make_model(**options)
  room = caches.room(transformer, batch=2, length=64, num_slots=8)
  with pytest.raises(errors.ConfigError) as caught:
    decoding_choices(transformer, "sparse", room)
  lines = str(caught.value).splitlines()
  for op, line in zip(("decode_attention", "fetch_pages", "write_pages"), lines, strict=True):
    assert line.startswith(f"attention.kernels='strict': no GPU kernel can run {op} (")
    assert MOSAIC in line


def test_a_hopper_decodes_on_kernels_where_it_must(monkeypatch):
  monkeypatch.setattr("pallas_kernels.devices.why_not_hopper", lambda: None)
  options = dict(
    attention__kernels="strict",
    attention__block_size=16,
    model__dtype="bfloat16",
    model__head_dim=64,
  )
  transformer = small.make_model(attention__method="nosa", **options)
  room = caches.room(transformer, batch=2, length=64, num_slots=8)
  said = decoding_choices(transformer, "sparse", room)
  assert [choice.backend for choice in said] == ["mosaic_gpu"] * 5
  # Rows that are divided over a mesh, whose pages are all on the devices.
  options["attention__kernels"] = "auto"
  transformer = small.make_model(attention__method="nosa", **options)
  room = caches.room(transformer, batch=2, length=256)
  said = decoding_choices(transformer, "sparse", room, num_devices=2)
  assert [choice.op for choice in said] == ["decode_attention", "select_blocks_of_token"]
  for choice in said:
    assert choice.backend == "xla"
    assert "needs jax.shard_map for arrays of a mesh of 2 devices" in choice.reason


def test_decoding_says_once_what_layers_of_as_many_windows_run_on(monkeypatch):
  monkeypatch.setattr("pallas_kernels.devices.why_not_hopper", lambda: None)
  limit = "pallas_kernels.block_selection.mosaic_gpu_token._MOST_WINDOWS"
  monkeypatch.setattr(limit, 20)

  def choices(*methods):
    transformer = small.make_model(attention__layer_methods=methods)
    room = caches.room(transformer, batch=2, length=128)
    return [x.backend for x in decoding_choices(transformer, "sparse", room)[1:]]

  assert choices("moba", "moba") == ["mosaic_gpu"]
  # 32 windows of nsa, 16 of moba.
  assert choices("nsa", "moba") == ["xla", "mosaic_gpu"]
