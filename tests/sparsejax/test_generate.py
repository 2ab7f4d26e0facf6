"""The program that continues prompts: what it asks for, shows, and says to a mistake."""

import io
import types

import pytest

from sparsejax import generate, sharding
from sparsejax.data import tokenizers
from sparsejax.decoding import sampling
from sparsejax.evaluation import extrapolation
from tests import small


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--prompt=a", "--prompt_file=b"], "--prompt and --prompt_file are two prompts; give one"),
    (["--prompt_file="], "--prompt_file has an empty path; name a file, or -"),
    (["--prompt_file=no/such/file"], "--prompt_file=no/such/file cannot be read"),
    (["--num_texts=0"], "--num_texts=0 must be at least 1"),
    (["--prompt=ab\udcff"], "--prompt is not UTF-8; give such text in a --prompt_file"),
    (["--rope_scaling=lama3"], "unknown --rope_scaling 'lama3'. Did you mean 'llama3'?"),
    (["--top_p=2"], "top_p=2.0 is not above 0 and at most 1"),
    ([], "no/such/run holds no checkpoint"),
  ],
)
def test_a_mistake_gets_one_clear_error(arguments, message, capsys):
  assert generate.main(["--workdir=no/such/run", *arguments]) == 2
  said = capsys.readouterr().err
  assert said.startswith("error: ")
  assert message in said
  assert said.count("\n") == 1


@pytest.fixture
def asked(monkeypatch):
  """What is asked of the library, and how, of a checkpoint whose weights nobody reads."""
  config = small.make_config(attention__method="ssa")
  found = types.SimpleNamespace(
    config=config,
    transformer=small.make_model(attention__method="ssa"),
    corpus=types.SimpleNamespace(tokenizer=tokenizers.ByteTokenizer()),
    mesh=sharding.make_mesh(data=-1, fsdp=1, tensor=1),
    params="weights",
    step=7,
  )
  calls, described = [], {}

  def describe(path, template, **options):
    described.update(options, path=path)
    return found

  def answer(transformer, params, prompts, **options):
    own = dict(transformer=transformer, params=params, prompts=prompts, described=described)
    calls.append(own | options)
    for number in range(len(prompts)):
      for token in b"xyz"[: 3 - number]:
        options["on_token"](number, token)
      if number:
        options["on_token"](number, options["stop_ids"][0])
    return [[]] * len(prompts)

  monkeypatch.setattr(generate.subjects, "describe", describe)
  monkeypatch.setattr(generate.subjects, "with_params", lambda subject: subject)
  monkeypatch.setattr(generate.generate, "generate", answer)
  return calls


def test_what_is_asked_for_reaches_the_library(asked, tmp_path):
  path = tmp_path / "start.txt"
  path.write_bytes(b"a\r\nb")
  flags = dict(mode="sparse", budget=8, temperature=0.5, top_k=3, top_p=0.75, seed=5, rows=2)
  flags |= dict(max_new_tokens=3, num_texts=3, prefill_chunk=16, prefill_mode="full")
  flags |= dict(offload="never", prompt_file=path, step=6, kernels="auto")
  flags |= dict(rope_scaling="llama3,factor=4", sources="data/a,data/b")
  arguments = [f"--{name}={value}" for name, value in flags.items()]
  assert generate.main(["--workdir=run", *arguments]) == 0
  (call,) = asked
  # Ends of lines are those of the file.
  bos = tokenizers.ByteTokenizer().bos_id
  assert call["prompts"] == [[bos, *b"a\r\nb"]] * 3
  assert call["sampling"] == sampling.Sampling(temperature=0.5, top_k=3, top_p=0.75)
  assert call["transformer"].options.budget == 8
  assert call["stop_ids"] == (tokenizers.ByteTokenizer().eos_id,)
  assert call["num_ids"] == tokenizers.ByteTokenizer().vocab_size
  expected = dict(stream="sparse", seed=5, rows=2, max_new_tokens=3, prefill_chunk=16)
  expected |= dict(prefill_stream="full", offload="never", num_slots=None, params="weights")
  assert {name: call[name] for name in expected} == expected
  assert call["described"] == dict(
    path="run",
    step=6,
    kernels="auto",
    budgets=(8,),
    rope_scaling=extrapolation.RopeScaling(rope_type="llama3", factor=4.0),
    sources=["data/a", "data/b"],
    checks_data=False,
  )


def test_a_prompt_may_come_from_standard_input(asked, monkeypatch):
  given = io.TextIOWrapper(io.BytesIO("a\r\nä".encode()), encoding="ascii")
  monkeypatch.setattr(generate.sys, "stdin", given)
  assert generate.main(["--workdir=run", "--prompt_file=-"]) == 0
  assert asked[0]["prompts"] == [[tokenizers.ByteTokenizer().bos_id, *"a\r\nä".encode()]]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_progress_is_told_of_every_token_and_of_the_end(asked, monkeypatch, error):
  told = []

  class Progress:
    def __init__(self, num_texts, max_new_tokens, *, prompt_length):
      told.append((num_texts, max_new_tokens, prompt_length))

    def count(self):
      told.append("token")
      if error is not None:
        raise error

    def close(self):
      told.append("end")

  monkeypatch.setattr(generate.shows, "Progress", Progress)
  generate.main(["--workdir=run", "--prompt=ab", "--num_texts=2", "--max_new_tokens=9"])
  assert told == [(2, 9, 3)] + ["token"] * (6 if error is None else 1) + ["end"]


def test_standard_input_may_be_closed_or_a_stand_in(asked, monkeypatch, capsys):
  monkeypatch.setattr(generate.sys, "stdin", None)
  assert generate.main(["--workdir=run", "--prompt_file=-"]) == 2
  said = capsys.readouterr().err
  assert said == "error: --prompt_file=- cannot be read: there is no standard input\n"
  monkeypatch.setattr(generate.sys, "stdin", io.StringIO("ab"))
  assert generate.main(["--workdir=run", "--prompt_file=-"]) == 0
  assert asked[0]["prompts"][0][1:] == [*b"ab"]


def test_the_last_line_says_what_changes_a_text(asked, capsys):
  arguments = ["--workdir=run", "--prompt=ab", "--prefill_mode=full", "--rope_scaling=default"]
  generate.main(arguments)
  said = capsys.readouterr().err
  assert "step 7 of run, sparse at 24 keys, prompt full, RoPE default, seed 0\n" in said
  generate.main([*arguments, "--mode=full", "--seed=3"])
  assert "step 7 of run, full, RoPE default, seed 3\n" in capsys.readouterr().err


def test_a_window_is_told_without_a_budget(asked, monkeypatch, capsys):
  describe = generate.subjects.describe

  def of_window(*args, **options):
    found = describe(*args, **options)
    found.transformer = small.make_model(attention__method="sliding_window")
    return found

  monkeypatch.setattr(generate.subjects, "describe", of_window)
  assert generate.main(["--workdir=run", "--prompt=a"]) == 0
  assert "step 7 of run, sparse, seed 0\n" in capsys.readouterr().err


def test_what_is_not_asked_for_is_as_trained(asked):
  assert generate.main(["--workdir=run", "--prompt=a"]) == 0
  (call,) = asked
  assert call["sampling"] == sampling.Sampling(temperature=0.8)
  assert call["transformer"].options.budget == 24
  expected = dict(stream="sparse", prefill_stream=None, offload="auto", seed=0)
  assert {name: call[name] for name in expected} == expected
  expected = dict(path="run", step=None, kernels=None, budgets=(), rope_scaling=None)
  expected |= dict(sources=(), checks_data=False)
  assert call["described"] == expected


def test_texts_are_shown_as_they_end(asked, capsys):
  """By their number of tokens, or by what ends them."""
  arguments = ["--workdir=run", "--prompt=a", "--num_texts=2", "--max_new_tokens=3"]
  assert generate.main(arguments) == 0
  shown = capsys.readouterr()
  assert shown.out == "--- text 0\naxyz\n--- text 1\naxy\n"
  assert "step 7 of run, sparse at 24 keys, seed 0\n" in shown.err
  assert "note:" not in shown.err
  longer = [*arguments[:2], "--max_new_tokens=70"]
  generate.main(longer)
  assert "note: a length of 72 tokens is beyond the 64 that" in capsys.readouterr().err
  generate.main([*longer, "--rope_scaling=default"])
  assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--mode=full", "--budget=8"], "--budget=8 is of sparse inference, and this is full"),
    (["--max_new_tokens=0"], "max_new_tokens=0 must be at least 1"),
    (["--rows=0"], "rows=0 must be at least 1"),
    (["--seed=4294967296"], "seed=4294967296 must be at most 4294967295"),
    (["--prefill_chunk=17"], "prefill_chunk=17 is not a multiple of the 8 tokens"),
    (["--offload=never", "--num_slots=4"], "num_slots=4 is of pages in the host's memory"),
    (["--mode=full", "--prefill_mode=sparse"], "read sparse are continued sparse, not full"),
  ],
)
def test_a_mistake_is_refused_before_weights_are_read(
  arguments, message, asked, capsys, monkeypatch
):
  monkeypatch.setattr(generate.subjects, "with_params", None)
  assert generate.main(["--workdir=run", "--prompt=a", *arguments]) == 2
  assert message in capsys.readouterr().err
  assert not asked


@pytest.mark.parametrize(
  ("error", "status"), [(KeyboardInterrupt, 130), (BrokenPipeError, 141)]
)
def test_who_stops_reading_gets_no_traceback(error, status, monkeypatch, asked):
  def stop(*args, **kwargs):
    raise error

  monkeypatch.setattr(generate.generate, "generate", stop)
  monkeypatch.setattr(generate.os, "dup2", lambda *args: None)
  assert generate.main(["--workdir=run", "--prompt=a"]) == status
