r"""Continues a prompt with a trained model, as it is drawn.

  python -m sparsejax.generate --workdir=runs/smoke --prompt="def main("
  python -m sparsejax.generate --workdir=runs/a --prompt_file=start.txt --mode=sparse \
    --budget=256 --temperature=0.7 --top_p=0.9 --num_texts=4

In a notebook: see `sparsejax.decoding.generate`.
"""

import argparse
import contextlib
import os
import pathlib
import sys
import time

from configs import base
from sparsejax import attention, command_line, errors
from sparsejax.configuration import build
from sparsejax.decoding import cache as caches
from sparsejax.decoding import checks, generate, sampling
from sparsejax.decoding import show as shows
from sparsejax.evaluation import extrapolation
from sparsejax.evaluation import subject as subjects


def run(asked: argparse.Namespace) -> int:
  """Does what was asked; returns the exit status."""
  checks.whole("--num_texts", asked.num_texts, least=1)
  draw = sampling.Sampling(temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p)
  scaling = extrapolation.parse(asked.rope_scaling.split(",") if asked.rope_scaling else ())
  text = _prompt(asked)
  budgets = () if asked.budget is None else (asked.budget,)
  described = subjects.describe(
    asked.workdir,
    base.get_config(),
    step=asked.step,
    sources=asked.sources.split(",") if asked.sources else (),
    kernels=asked.kernels,
    budgets=budgets,
    rope_scaling=scaling,
    checks_data=False,
  )
  transformer = described.transformer
  mode = asked.mode or transformer.options.home_stream
  if mode == "full" and budgets:
    raise errors.ConfigError(
      f"--budget={asked.budget} is of sparse inference, and this is full; take --mode=sparse, "
      "or leave it out."
    )
  for budget in budgets:
    transformer = build.with_budget(transformer, budget)
  tokenizer = described.corpus.tokenizer
  opened = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  prompt = opened + tokenizer.encode(text)
  if not prompt:
    raise errors.ConfigError(
      "the tokenizer has no token that opens a document; name a --prompt to begin with."
    )
  longest = checks.check_prompts(
    [prompt],
    max_new_tokens=asked.max_new_tokens,
    length=None,
    vocab_size=transformer.shape.vocab_size,
  )
  settings = dict(
    stream=mode,
    prefill_stream=asked.prefill_mode,
    mesh=described.mesh,
    seed=asked.seed,
    num_ids=tokenizer.vocab_size,
    rows=asked.rows,
    length=longest + asked.max_new_tokens,
    offload=asked.offload,
    num_slots=asked.num_slots,
    prefill_chunk=asked.prefill_chunk,
  )
  checks.check_settings(transformer, **settings)
  config = described.config
  try:
    extrapolation.check(config, config.data.sequence_length, [settings["length"]], scaling)
  except errors.ConfigError as error:
    # A text may end long before; and here nothing is claimed of its worth.
    sys.stderr.write(f"note: {error}\n")
  subject = subjects.with_params(described)
  stop_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
  if asked.num_texts == 1:
    show = shows.Stream(tokenizer.decode, text)
  else:
    show = shows.Texts(tokenizer.decode, text, stop_ids, asked.max_new_tokens)
  began = time.perf_counter()
  progress = shows.Progress(asked.num_texts, asked.max_new_tokens, prompt_length=len(prompt))

  def on_token(number: int, token: int) -> None:
    progress.count()
    show(number, token)

  with contextlib.closing(progress):
    texts = generate.generate(
      transformer,
      subject.params,
      [prompt] * asked.num_texts,
      max_new_tokens=asked.max_new_tokens,
      sampling=draw,
      stop_ids=stop_ids,
      on_token=on_token,
      on_choice=lambda choice: progress.say(f"backend of {choice}"),
      **settings,
    )
  seconds = time.perf_counter() - began
  show.end()
  num_tokens = sum(map(len, texts))
  how = mode
  if mode == "sparse" and attention.names_with_blocks(transformer.options):
    how += f" at {transformer.options.budget} keys"
  if (asked.prefill_mode or mode) != mode:
    how += f", prompt {asked.prefill_mode}"
  if scaling is not None:
    how += f", RoPE {asked.rope_scaling}"
  sys.stderr.write(
    f"{num_tokens} tokens in {seconds:.1f} s, compilation included; step {subject.step} of "
    f"{asked.workdir}, {how}, seed {asked.seed}\n"
  )
  return 0


def _prompt(asked: argparse.Namespace) -> str:
  if asked.prompt_file is None:
    text = asked.prompt or ""
    if any("\ud800" <= x <= "\udfff" for x in text):
      raise errors.DataError("--prompt is not UTF-8; give such text in a --prompt_file.")
    return text
  if not asked.prompt_file:
    raise errors.ConfigError(
      "--prompt_file has an empty path; name a file, or - to read it here."
    )
  if asked.prompt is not None:
    raise errors.ConfigError("--prompt and --prompt_file are two prompts; give one.")
  try:
    # As it is: ends of lines are part of a prompt.
    if asked.prompt_file == "-":
      return _standard_input()
    return pathlib.Path(asked.prompt_file).read_bytes().decode("utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise errors.DataError(
      f"--prompt_file={asked.prompt_file} cannot be read: {error}"
    ) from error


def _standard_input() -> str:
  if sys.stdin is None:
    raise OSError("there is no standard input")
  # A stand-in, as notebooks have, may know no bytes.
  given = getattr(sys.stdin, "buffer", sys.stdin).read()
  return given if isinstance(given, str) else given.decode("utf-8")


def main(arguments: list[str] | None = None) -> int:
  """The command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m sparsejax.generate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--workdir", required=True, help="what train.py wrote, or one checkpoint of it")
  add("--step", type=int, help="checkpoint to take; the newest if not given")
  add("--sources", help="where the training data, with the tokenizer, lie if elsewhere now")
  add("--prompt", help="text to continue; none begins a document")
  add("--prompt_file", help="a file with that text; - is standard input")
  add("--max_new_tokens", type=int, default=256, help="after which a text ends (256)")
  add("--num_texts", type=int, default=1, help="how many; one is shown as it is drawn")
  add("--rows", type=int, default=8, help="texts that are drawn at the same time (8)")
  add("--mode", choices=("full", "sparse"), help="of inference; as trained if not given")
  add("--budget", type=int, help="keys a token reads when sparse; as trained if not given")
  add("--temperature", type=float, default=0.8, help="divides the logits; 0 is greedy (0.8)")
  add("--top_k", type=int, default=0, help="draws from so many ids at most; 0 is all")
  add("--top_p", type=float, default=1.0, help="draws from the likeliest of that probability")
  add("--seed", type=int, default=0, help="of the draws")
  add("--offload", choices=caches.OFFLOAD, default="auto", help="pages in the host's memory")
  add("--num_slots", type=int, help="pages per row and key head on the device, if not all")
  add("--prefill_chunk", type=int, help="tokens of a prompt read at a time; about 4096")
  add("--prefill_mode", choices=("full", "sparse"), help="of reading the prompt, if not --mode")
  add("--rope_scaling", help="in place of the checkpoint's: default, or llama3,factor=4")
  add("--kernels", choices=("auto", "strict"), help="in place of the config's")
  asked = parser.parse_args(arguments)
  try:
    return command_line.friendly(lambda _: run(asked))([])
  except KeyboardInterrupt:
    sys.stderr.write("\ninterrupted\n")
    return 130
  except BrokenPipeError:
    # Whoever read has seen enough; nor is there anyone to whom Python could flush the rest.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


if __name__ == "__main__":
  sys.exit(main())
