"""The adapter to lm-evaluation-harness, against the harness's own Hugging Face backend."""

import functools
import math
import os
import warnings

import jax
import numpy as np
import pytest
import tokenizers as hf

from sparsejax import errors, sharding
from sparsejax.data import tokenizers
from tests import small
from tests.sparsejax.evaluation import harness_files

pytest.importorskip("lm_eval", reason="needs lm_eval, of the extra eval")

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from lm_eval.api import instance

from sparsejax.evaluation import harness_model

TEXT = (
  "The river runs to the sea. A bird sings in the old tree, and the wind moves its leaves. "
  "Who reads the book finds a map; who follows the map finds the hill behind the town.\n"
)
LENGTH = 48


def import_peer():
  """torch, transformers and the harness's backend of them."""
  names = "torch", "transformers", "accelerate", "lm_eval.models.huggingface"
  reason = "the peer needs torch: pip install 'lm_eval[hf]' torch"
  # Their imports warn of each other's versions.
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch, transformers, _, huggingface = (
      pytest.importorskip(name, reason=reason, exc_type=ImportError) for name in names
    )
  return torch, transformers, huggingface


@functools.cache
def make_tokenizer():
  return tokenizers.train_bpe([TEXT] * 4, 300)


def make_model(params=None, **changes):
  changes = dict(model__vocab_size=304, attention__gate=False) | changes
  transformer = small.make_model(attention__method="full", **changes)
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  if params is None:
    params = small.make_params(transformer, scale=4.0)
  params = jax.device_put(params, sharding.replicated(mesh))
  return transformer, params, mesh


def make_adapter(params=None, stream="full", **options):
  transformer, params, mesh = make_model(params)
  options = dict(max_length=LENGTH, chunk_length=24, progress=False) | options
  return harness_model.Model(
    transformer, params, make_tokenizer(), stream=stream, mesh=mesh, **options
  )


def requests(kind, *arguments):
  return [instance.Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def llama_params(state, shape):
  """Weights of a Hugging Face Llama as parameters of ours: transposed and stacked."""

  def stacked(name):
    weights = [
      state[f"model.layers.{i}.{name}.weight"].numpy() for i in range(shape.num_hidden_layers)
    ]
    return np.stack([w if w.ndim == 1 else w.T for w in weights])

  e, d = shape.hidden_size, shape.head_dim
  attention = {}
  for name, heads in (
    ("q_proj", shape.num_attention_heads),
    ("k_proj", shape.num_key_value_heads),
    ("v_proj", shape.num_key_value_heads),
  ):
    attention[name] = dict(kernel=stacked(f"self_attn.{name}").reshape(-1, e, heads, d))
  out = stacked("self_attn.o_proj").reshape(-1, shape.num_attention_heads, d, e)
  attention["o_proj"] = dict(kernel=out)
  norms = ("input_layernorm", "post_attention_layernorm")
  mlp = ("gate_proj", "up_proj", "down_proj")
  return dict(
    embed_tokens=dict(embedding=state["model.embed_tokens.weight"].numpy()),
    norm=dict(scale=state["model.norm.weight"].numpy()),
    layers=dict(
      self_attn=attention,
      mlp={name: dict(kernel=stacked(f"mlp.{name}")) for name in mlp},
      **{name: dict(scale=stacked(name)) for name in norms},
    ),
  )


@functools.cache
def make_llama():
  """A small random Llama of transformers, and our parameters of it."""
  torch, transformers, _ = import_peer()
  shape = make_model()[0].shape
  torch.manual_seed(0)
  llama = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=shape.vocab_size,
      hidden_size=shape.hidden_size,
      intermediate_size=shape.intermediate_size,
      num_hidden_layers=shape.num_hidden_layers,
      num_attention_heads=shape.num_attention_heads,
      num_key_value_heads=shape.num_key_value_heads,
      head_dim=shape.head_dim,
      rms_norm_eps=shape.rms_norm_eps,
      rope_parameters=dict(rope_type="default", rope_theta=shape.rope_theta),
      tie_word_embeddings=shape.tie_word_embeddings,
      max_position_embeddings=LENGTH,
      # Sharp attention, so that a wrong turn of a rotation shows.
      initializer_range=0.3,
      bos_token_id=make_tokenizer().bos_id,
      eos_token_id=make_tokenizer().eos_id,
    )
  ).eval()
  return llama, llama_params(llama.state_dict(), shape)


@pytest.fixture(params=[False, True], ids=["plain", "bos"])
def both(request, tmp_path):
  """Ours and the harness's own, of the same weights."""
  _, transformers, huggingface = import_peer()
  llama, params = make_llama()
  ours = make_tokenizer()
  ours.save(tmp_path)
  theirs = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  theirs.post_processor = hf.processors.TemplateProcessing(
    single=f"{ours.bos} $A", special_tokens=[(ours.bos, ours.bos_id)]
  )
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=theirs, bos_token=ours.bos, eos_token=ours.eos, pad_token=ours.eos
  )
  peer = huggingface.HFLM(
    pretrained=llama,
    tokenizer=tokenizer,
    max_length=LENGTH,
    batch_size=3,
    add_bos_token=request.param,
    softmax_dtype="float32",
  )
  return make_adapter(params, add_bos=request.param), peer


@pytest.mark.filterwarnings("ignore")
def test_log_likelihoods_are_those_of_the_peer(both):
  """Borders inside of tokens and behind spaces, empty contexts, and contexts that are cut."""
  adapter, peer = both
  asked = requests(
    "loglikelihood",
    ("The river", " runs to the sea"),
    ("The riv", "er runs"),
    ("A bird sings in the ", "old tree"),
    ("", "The wind"),
    (TEXT * 2, "The hill"),
    ("who", "?"),
  )
  ids = make_tokenizer().encode(asked[1].args[0])
  assert make_tokenizer().encode("The river runs")[: len(ids)] != ids
  ours, theirs = adapter.loglikelihood(asked), peer.loglikelihood(asked, disable_tqdm=True)
  np.testing.assert_allclose([x for x, _ in ours], [x for x, _ in theirs], rtol=1e-4)
  assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


@pytest.mark.filterwarnings("ignore")
def test_what_is_greedy_is_so_for_the_peer(both):
  torch, _, _ = import_peer()
  adapter, peer = both
  context = [1, 50, 60]
  made = make_llama()[0].generate(torch.tensor([context]), max_new_tokens=4, do_sample=False)
  greedy = made[0, 3:].tolist()
  asked = [(("", ""), context, greedy), (("", ""), context, [*greedy[:-1], 77])]
  ours, theirs = (
    model._loglikelihood_tokens(asked, disable_tqdm=True) for model in (adapter, peer)
  )
  np.testing.assert_allclose([x for x, _ in ours], [x for x, _ in theirs], rtol=1e-4)
  assert [x for _, x in ours] == [x for _, x in theirs] == [True, False]


@pytest.mark.filterwarnings("ignore")
def test_rolling_log_likelihoods_are_those_of_the_peer(both):
  """Which, with `bos` before every text, scores a second one; ours does not."""
  adapter, peer = both
  texts = [TEXT * 2, "The sea.", TEXT[:90]]
  asked = requests("loglikelihood_rolling", *((text,) for text in texts))
  peer.add_bos_token = False
  assert len(make_tokenizer().encode(texts[0])) > 2 * LENGTH
  np.testing.assert_allclose(
    adapter.loglikelihood_rolling(asked),
    peer.loglikelihood_rolling(asked, disable_tqdm=True),
    rtol=1e-4,
  )


@pytest.mark.filterwarnings("ignore")
def test_generated_texts_are_those_of_the_peer(both):
  """Short and cut contexts, with and without strings that end a text."""
  adapter, peer = both
  contexts = ["The river", TEXT, "A bird sings in the", TEXT * 2, "who"]
  long = [(context, dict(max_gen_toks=20)) for context in contexts]
  texts = adapter.generate_until(requests("generate_until", *long))
  assert all(texts)
  theirs = peer.generate_until(requests("generate_until", *long), disable_tqdm=True)
  assert texts == theirs
  stop = texts[0][len(texts[0]) // 2 :][:2]
  short = [(context, dict(until=[stop, "\n\n"], max_new_tokens=20)) for context in contexts]
  ours = adapter.generate_until(requests("generate_until", *short))
  assert ours[0] == texts[0].partition(stop)[0]
  assert ours == peer.generate_until(requests("generate_until", *short), disable_tqdm=True)


@pytest.mark.filterwarnings("ignore")
def test_a_task_gives_the_numbers_of_the_peer(both, tmp_path, monkeypatch):
  """Choices among continuations, perplexity and generated answers, asked by the harness."""
  import datasets

  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
  adapter, peer = both
  peer.add_bos_token = adapter._add_bos = False  # of rolling texts the peer scores a second one
  folder = harness_files.write(tmp_path / "tasks")
  manager = harness_model.find_manager(list(harness_files.TASKS), folder)
  tasks = harness_model.load(manager, list(harness_files.TASKS), max_length=LENGTH)
  ours, theirs = (
    harness_model.evaluate(model, tasks, num_fewshot=2, limit=None, seed=3)["results"]
    for model in (adapter, peer)
  )
  assert ours.keys() == theirs.keys() == harness_files.TASKS.keys()
  for task, metrics in theirs.items():
    for key, value in metrics.items():
      if isinstance(value, str):
        assert ours[task][key] == value
      else:
        assert ours[task][key] == pytest.approx(value, rel=1e-4), (task, key)


def test_sparse_numbers_are_not_those_of_full_attention():
  asked = requests("loglikelihood", (TEXT, "The hill"), ("who", "?"))
  full, sparse = (
    [x for x, _ in make_adapter(stream=stream).loglikelihood(asked)]
    for stream in ("full", "sparse")
  )
  assert abs(full[0] - sparse[0]) > 1e-3
  # A short context is within the budget.
  assert full[1] == pytest.approx(sparse[1], rel=1e-5)


def test_texts_are_generated_under_the_stream_that_is_asked_for():
  asked = requests("generate_until", (TEXT, dict(max_gen_toks=16)), ("who", dict(until="?")))
  full, sparse = (
    make_adapter(stream=stream, max_length=272).generate_until(asked)
    for stream in ("full", "sparse")
  )
  assert full[0] != sparse[0]


def test_contexts_of_texts_may_be_read_full():
  """Which does not touch the probabilities of continuations that are given."""
  asked = requests("generate_until", (TEXT, dict(max_gen_toks=16)))
  given = requests("loglikelihood", (TEXT, "The hill"))
  options = dict(stream="sparse", max_length=272)
  sparse, read_full = (
    make_adapter(prefill_stream=stream, **options) for stream in (None, "full")
  )
  assert read_full.generate_until(asked) != sparse.generate_until(asked)
  assert read_full.loglikelihood(given) == sparse.loglikelihood(given)
  with pytest.raises(errors.ConfigError, match="read sparse are continued sparse, not full"):
    make_adapter(stream="full", prefill_stream="sparse")


def test_a_text_stops_before_it_is_as_long_as_it_may_be(monkeypatch):
  """What is behind a stop string is not generated."""
  adapter = make_adapter(max_length=256)
  (text,) = adapter.generate_until(requests("generate_until", ("A", dict(max_gen_toks=200))))
  generate, made = harness_model.stop_strings.generate.generate, []

  def remember(*args, **kwargs):
    made.extend(generate(*args, **kwargs))
    return made

  monkeypatch.setattr(harness_model.stop_strings.generate, "generate", remember)
  asked = ("A", dict(until=text[10:13], max_gen_toks=200))
  (short,) = adapter.generate_until(requests("generate_until", asked))
  assert short == text.partition(text[10:13])[0]
  assert len(make_tokenizer().decode(made[0])) < len(text)


def test_drawn_texts_follow_the_seed():
  asked = requests("generate_until", ("A", dict(temperature=1.5, max_gen_toks=12)))
  adapter = make_adapter()
  first, again = adapter.generate_until(asked), adapter.generate_until(asked)
  assert first == again
  adapter.seed = 1
  assert adapter.generate_until(asked) != first


def test_a_byte_tokenizer_needs_no_bos():
  transformer, params, mesh = make_model()
  adapter = harness_model.Model(
    transformer,
    params,
    tokenizers.ByteTokenizer(),
    stream="full",
    mesh=mesh,
    max_length=LENGTH,
    chunk_length=24,
    add_bos=False,
    progress=False,
  )
  assert adapter.tok_encode("ab") == [97, 98]
  assert adapter.prefix_token_id == 256
  assert adapter.eot_token_id == 257
  ((found, _),) = adapter.loglikelihood(requests("loglikelihood", ("", "ab")))
  assert math.isfinite(found)
  assert adapter.generate_until(requests("generate_until", ("", dict(max_gen_toks=3))))


def test_no_room_for_a_prompt_is_refused():
  asked = requests("generate_until", ("A", {}))
  with pytest.raises(errors.ConfigError, match=r"256 tokens .* rows of 48; .*max_gen_toks"):
    make_adapter().generate_until(asked)


def test_a_bos_that_there_is_not_is_refused(monkeypatch):
  monkeypatch.setattr(make_tokenizer(), "bos_id", None)
  with pytest.raises(errors.ConfigError, match="has no bos"):
    make_adapter(add_bos=True)
  assert make_adapter().tok_encode("a") == make_tokenizer().encode("a")
  assert make_adapter().prefix_token_id == make_tokenizer().eos_id
