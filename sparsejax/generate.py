"""Continues a prompt with a trained model, as it is drawn.

  python -m sparsejax.generate --workdir=runs/smoke --prompt="def main("
  python -m sparsejax.generate --workdir=runs/a --prompt_file=start.txt --mode=sparse \
    --budget=256 --temperature=0.7 --top_p=0.9 --num_texts=4

In a notebook: `sparsejax.decoding.generate.generate`.
"""

import argparse
import pathlib
import sys
import time

from configs import base
from sparsejax import command_line, errors
from sparsejax.configuration import build
from sparsejax.decoding import generate, sampling
from sparsejax.evaluation import subject as subjects


def run(asked: argparse.Namespace) -> int:
  """Does what was asked; returns the exit status."""
  if asked.num_texts < 1:
    raise errors.ConfigError(f"--num_texts={asked.num_texts} must be at least 1.")
  how = sampling.Sampling(temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p)
  text = _prompt(asked)
  budgets = () if asked.budget is None else (asked.budget,)
  subject = subjects.load(
    asked.workdir, base.get_config(), step=asked.step, kernels=asked.kernels, budgets=budgets
  )
  transformer = subject.transformer
  for budget in budgets:
    transformer = build.with_budget(transformer, budget)
  tokenizer = subject.corpus.tokenizer
  opened = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  prompt = opened + tokenizer.encode(text)
  if not prompt:
    raise errors.ConfigError(
      "the tokenizer has no token that opens a document; name a --prompt to begin with."
    )
  show = Stream(tokenizer, text) if asked.num_texts == 1 else None
  began = time.perf_counter()
  texts = generate.generate(
    transformer,
    subject.params,
    [prompt] * asked.num_texts,
    max_new_tokens=asked.max_new_tokens,
    stream=asked.mode or transformer.options.home_stream,
    mesh=subject.mesh,
    sampling=how,
    seed=asked.seed,
    num_ids=tokenizer.vocab_size,
    stop_ids=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
    offload=asked.offload,
    num_slots=asked.num_slots,
    prefill_chunk=asked.prefill_chunk,
    prefill_stream=asked.prefill_mode,
    on_token=show,
    on_choice=lambda choice: sys.stderr.write(f"backend of {choice}\n"),
  )
  seconds = time.perf_counter() - began
  if show is None:
    for number, ids in enumerate(texts):
      sys.stdout.write(f"--- text {number}\n{text}{tokenizer.decode(ids)}\n")
  else:
    show.end()
  num_tokens = sum(map(len, texts))
  sys.stderr.write(
    f"{num_tokens} tokens in {seconds:.1f} s, compilation included; step {subject.step} of "
    f"{asked.workdir}\n"
  )
  return 0


class Stream:
  """Writes a text as it is drawn: what its ids stand for, once no later id can change it."""

  def __init__(self, tokenizer, prompt: str):
    self._tokenizer, self._ids, self._written = tokenizer, [], 0
    # Shown with the first id: until then there may be other things to say.
    self._prompt = prompt

  def __call__(self, number: int, token: int) -> None:
    del number  # there is one
    if not self._ids:
      self._write(self._prompt)
    self._ids.append(token)
    text = self._tokenizer.decode(self._ids)
    # Characters of several bytes may come in several tokens.
    if not text.endswith("\ufffd"):
      self._write(text[self._written :])
      self._written = len(text)

  def end(self) -> None:
    self._write(self._tokenizer.decode(self._ids)[self._written :] + "\n")

  def _write(self, text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _prompt(asked: argparse.Namespace) -> str:
  if asked.prompt_file is None:
    return asked.prompt or ""
  if asked.prompt is not None:
    raise errors.ConfigError("--prompt and --prompt_file are two prompts; give one.")
  try:
    return pathlib.Path(asked.prompt_file).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise errors.DataError(
      f"--prompt_file={asked.prompt_file} cannot be read: {error}"
    ) from error


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
  add("--prompt", help="text to continue; none begins a document")
  add("--prompt_file", help="a file with that text")
  add("--max_new_tokens", type=int, default=256, help="after which a text ends (256)")
  add("--num_texts", type=int, default=1, help="how many; one is shown as it is drawn")
  add("--mode", choices=("full", "sparse"), help="of inference; as trained if not given")
  add("--budget", type=int, help="keys a token reads when sparse; as trained if not given")
  add("--temperature", type=float, default=0.8, help="divides the logits; 0 is greedy (0.8)")
  add("--top_k", type=int, default=0, help="draws from so many ids at most; 0 is all")
  add("--top_p", type=float, default=1.0, help="draws from the likeliest of that probability")
  add("--seed", type=int, default=0, help="of the draws")
  add("--offload", default="auto", help="pages in the host's memory: auto, never, always")
  add("--num_slots", type=int, help="pages per row and key head on the device, if not all")
  add("--prefill_chunk", type=int, help="tokens of a prompt read at a time; about 4096")
  add("--prefill_mode", choices=("full", "sparse"), help="of reading the prompt, if not --mode")
  add("--kernels", choices=("auto", "strict"), help="in place of the config's")
  asked = parser.parse_args(arguments)
  return command_line.friendly(lambda _: run(asked))([])


if __name__ == "__main__":
  sys.exit(main())
