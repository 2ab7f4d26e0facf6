r"""Turns text into shards of token ids.

  python -m sparsejax.data.prepare corpus.jsonl.zst more/*.parquet src/ --out=data/mine \
    --tokenizer=train:8192

Reads .txt and other text files (one document each), .jsonl, .jsonl.gz, .jsonl.zst, .parquet
and folders of any of these. Interrupted, the same command carries on where it stopped; the
result does not depend on the number of processes.

What is done with unusual documents: empty ones (nothing but white space) are counted and
left out. Ones that are not UTF-8 stop the work with file and line, unless --on_bad_utf8 is
`skip` or `replace`; both are counted. Long ones are tokenized in pieces cut at line ends,
so memory stays bounded. A document goes to the validation split by a hash of its beginning:
equal documents land on the same side, whatever file they are in.
"""

import argparse
from collections.abc import Iterable, Iterator
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import sys

import numpy as np
import tqdm

from sparsejax import errors
from sparsejax.data import documents, shards, tokenizers

# Small files are gathered until one process has this many bytes to read.
UNIT_BYTES = 16 * 2**20
# Characters tokenized at once.
PIECE_CHARACTERS = 2**16
TRAIN_PREFIX = "train:"


@dataclasses.dataclass(frozen=True)
class Settings:
  """Everything that decides what the shards hold.

  Attributes:
    tokenizer: `byte`, a path to a `tokenizer.json`, or `train:SIZE`.
    validation_fraction: share of the documents set aside.
    reading: how files become documents.
    bos, eos: names of the tokens around a document; None looks for the usual ones.
    tokenizer_sample_bytes: text that `train:SIZE` learns from, spread over the input.
  """

  tokenizer: str = tokenizers.BYTE
  validation_fraction: float = 0.01
  reading: documents.Options = dataclasses.field(default_factory=documents.Options)
  bos: str | None = None
  eos: str | None = None
  tokenizer_sample_bytes: int = 64 * 2**20


def prepare(
  inputs: list[str],
  out: str | pathlib.Path,
  settings: Settings = Settings(),
  *,
  extensions: tuple[str, ...] = (),
  num_workers: int = 1,
  show_progress: bool = False,
) -> shards.Manifest:
  """Tokenizes files into `out` and returns the manifest; resumes what was interrupted.

  Args:
    inputs: files and folders.
    out: directory to make; a finished one with the same settings is left as it is.
    settings: what the shards shall hold.
    extensions: endings to take from folders; () takes every known one.
    num_workers: processes that read and tokenize.
    show_progress: whether to draw a progress bar on stderr.

  Raises:
    DataError: input that is missing or broken, or an `out` made from something else.
  """
  if not 0.0 <= settings.validation_fraction < 1.0:
    raise errors.DataError(
      f"--validation_fraction={settings.validation_fraction} must be in [0, 1)."
    )
  out = pathlib.Path(out)
  units = _plan(
    [p for f in documents.find_files(inputs, extensions) for p in documents.split_file(f)]
  )
  is_done = _claim(out, units, settings)
  if is_done:
    # All that an interrupt at the very end may have left.
    shutil.rmtree(out / "units", ignore_errors=True)
    return shards.load(out)

  (out / "units").mkdir(exist_ok=True)
  tokenizer = _make_tokenizer(out, units, settings)
  # uint16 halves the disk space of every vocabulary that fits.
  dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
  work = functools.partial(_run_unit, out=out, settings=settings, dtype=dtype)
  with tqdm.tqdm(
    total=sum(part.num_bytes for unit in units for part in unit),
    unit="B",
    unit_scale=True,
    desc="tokenizing",
    disable=not show_progress,
  ) as bar:
    results = []
    for unit, result in zip(units, _map(work, units, num_workers), strict=True):
      results.append(result)
      bar.update(sum(part.num_bytes for part in unit))

  manifest = _gather(results, tokenizer, dtype, settings)
  _refuse_empty_splits(manifest, settings)
  manifest.save(out)
  shutil.rmtree(out / "units")
  return manifest


def _plan(parts: list[documents.Part]) -> list[list[documents.Part]]:
  """Gathers parts into units of about equal size, whatever the number of processes."""
  units: list[list[documents.Part]] = []
  size = UNIT_BYTES
  for part in parts:
    if size + part.num_bytes > UNIT_BYTES:
      units.append([])
      size = 0
    units[-1].append(part)
    size += part.num_bytes
  return units


def _claim(out: pathlib.Path, units, settings: Settings) -> bool:
  """Makes the directory ours; returns whether it is finished already.

  Raises:
    DataError: it holds, or was begun with, other text or settings.
  """
  description = dataclasses.asdict(settings)
  description["units"] = [[dataclasses.asdict(part) for part in unit] for unit in units]
  read = [part.path for unit in units for part in unit]
  if settings.tokenizer != tokenizers.BYTE:
    named = pathlib.Path(settings.tokenizer)
    read += [str(path) for path in (named, named / "tokenizer.json") if path.is_file()]
  stamps = [os.stat(path).st_mtime_ns for path in read]
  description["key"] = hashlib.sha256(
    json.dumps([description, stamps], sort_keys=True).encode()
  ).hexdigest()
  begun = out / "prepare.json"
  try:
    if begun.is_file():
      if json.loads(begun.read_text())["key"] == description["key"]:
        return (out / shards.MANIFEST).is_file()
      if (out / shards.MANIFEST).is_file() or any((out / "units").glob("[0-9]*.json")):
        raise errors.DataError(
          f"{out} was made from other text or settings (see {begun}); choose another --out, "
          "or delete it."
        )
      # Nothing was finished, as when the settings were refused: they may be mended.
      for pattern in ("tokenizer.json", "*.tmp", "*.array_record", "*.index.npy"):
        for unfinished in out.glob(pattern):
          unfinished.unlink()
    elif out.exists() and any(path.name != "prepare.json.tmp" for path in out.iterdir()):
      raise errors.DataError(f"{out} is not empty; choose another --out, or empty it.")
    out.mkdir(parents=True, exist_ok=True)
    shards.write_atomically(begun, json.dumps(description, indent=2) + "\n")
  except OSError as error:
    raise errors.DataError(f"cannot write to {out}: {error.strerror}.") from error
  return False


def _make_tokenizer(out: pathlib.Path, units, settings: Settings) -> tokenizers.Tokenizer:
  saved = out / "tokenizer.json"
  if settings.tokenizer == tokenizers.BYTE:
    return tokenizers.ByteTokenizer()
  if not saved.is_file():
    if settings.tokenizer.startswith(TRAIN_PREFIX):
      size = settings.tokenizer.removeprefix(TRAIN_PREFIX)
      if not size.isdigit():
        raise errors.DataError(f"--tokenizer={settings.tokenizer} needs a number: train:8192.")
      tokenizer = tokenizers.train_bpe(_sample(units, settings), int(size))
    else:
      tokenizer = tokenizers.load(settings.tokenizer, bos=settings.bos, eos=settings.eos)
    # Under another name first: an interrupt must not leave half a tokenizer.
    unfinished = out / "units"
    tokenizer.save(unfinished)
    os.replace(unfinished / "tokenizer.json", saved)
  return tokenizers.load(str(saved), bos=settings.bos, eos=settings.eos)


def _sample(units, settings: Settings) -> Iterator[str]:
  """Text from all over the input, up to the sample's size."""
  # Every unit gives its share, so that no one source decides the vocabulary.
  share = max(2**16, settings.tokenizer_sample_bytes // max(1, len(units)))
  for unit in units:
    taken = 0
    for pieces in _documents(unit, settings, documents.Counts()):
      for piece in pieces:
        yield piece
        taken += len(piece)
      if taken >= share:
        break


def _documents(unit, settings: Settings, counts: documents.Counts):
  for part in unit:
    for pieces in documents.read(part, settings.reading, counts):
      yield at_line_ends(pieces, PIECE_CHARACTERS)


def at_line_ends(pieces: Iterable[str], size: int) -> Iterator[str]:
  """The same text in pieces of `size` characters at most that end, if they can, with a line."""
  rest = ""
  for piece in pieces:
    rest += piece
    while len(rest) > size:
      cut = rest.rfind("\n", 0, size) + 1 or size
      yield rest[:cut]
      rest = rest[cut:]
  if rest:
    yield rest


def _map(work, units, num_workers: int) -> Iterator[dict]:
  if num_workers <= 1:
    yield from map(work, enumerate(units))
    return
  # spawn: forking a process that runs threads (tokenizers does) may hang.
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(num_workers, mp_context=context) as pool:
    try:
      yield from pool.map(work, enumerate(units))
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def _run_unit(numbered, *, out: pathlib.Path, settings: Settings, dtype: str) -> dict:
  """Tokenizes one unit into at most one shard a split; skips one that is done."""
  number, unit = numbered
  record = out / "units" / f"{number:05d}.json"
  if record.is_file():
    return json.loads(record.read_text())
  tokenizer = tokenizers.load(
    tokenizers.BYTE if settings.tokenizer == tokenizers.BYTE else str(out / "tokenizer.json"),
    bos=settings.bos,
    eos=settings.eos,
  )
  writers = {
    split: shards.ShardWriter(out, f"{split}-{number:05d}.array_record", np.dtype(dtype))
    for split in shards.SPLITS
  }
  counts = documents.Counts()
  for pieces in _documents(unit, settings, counts):
    _write_document(pieces, writers, tokenizer, counts, settings.validation_fraction)
  written = {split: writer.close() for split, writer in writers.items()}
  result = dict(
    shards={s: dataclasses.asdict(shard) for s, shard in written.items() if shard},
    counts=dataclasses.asdict(counts),
  )
  shards.write_atomically(record, json.dumps(result))
  return result


def _write_document(pieces, writers, tokenizer, counts, validation_fraction) -> None:
  counts.documents += 1
  writer = None
  num_bytes = 0
  blank = ""
  for piece in pieces:
    if writer is None:
      if not piece.strip():
        blank += piece
        continue
      piece = blank + piece
      writer = writers[_split_of(piece, validation_fraction)]
      if tokenizer.bos_id is not None:
        writer.extend([tokenizer.bos_id])
    writer.extend(tokenizer.encode(piece))
    num_bytes += len(piece.encode("utf-8"))
  if writer is None:
    counts.empty += 1
    return
  writer.extend([tokenizer.eos_id])
  writer.end_document(num_bytes)
  counts.text_bytes += num_bytes


def _split_of(beginning: str, validation_fraction: float) -> str:
  digest = hashlib.sha256(beginning.encode("utf-8")).digest()
  is_validation = int.from_bytes(digest[:8], "big") < validation_fraction * 2**64
  return "validation" if is_validation else "train"


def _gather(results, tokenizer, dtype: str, settings: Settings) -> shards.Manifest:
  splits = {
    split: tuple(
      shards.Shard(**result["shards"][split]) for result in results if split in result["shards"]
    )
    for split in shards.SPLITS
  }
  counts = {
    field.name: sum(result["counts"][field.name] for result in results)
    for field in dataclasses.fields(documents.Counts)
  }
  kind = tokenizers.BYTE if settings.tokenizer == tokenizers.BYTE else "json"
  return shards.Manifest(
    tokenizer=dict(
      kind=kind,
      fingerprint=tokenizer.fingerprint,
      vocab_size=tokenizer.vocab_size,
      bos=tokenizer.bos,
      eos=tokenizer.eos,
    ),
    dtype=dtype,
    splits=splits,
    counts=counts,
    options=dataclasses.asdict(settings),
  )


def _refuse_empty_splits(manifest: shards.Manifest, settings: Settings) -> None:
  if not manifest.splits["train"]:
    raise errors.DataError(
      f"no document is left for training: {manifest.counts['documents']} read, "
      f"{manifest.counts['empty']} empty, {manifest.counts['bad_utf8']} not UTF-8."
    )
  if settings.validation_fraction and not manifest.splits["validation"]:
    raise errors.DataError(
      f"none of {manifest.counts['documents']} documents fell to the validation split at "
      f"--validation_fraction={settings.validation_fraction}; raise it, or split long files "
      "with --separator."
    )


def summary(manifest: shards.Manifest) -> str:
  """One line per split and one of counts, for people."""
  lines = []
  for split in shards.SPLITS:
    files = manifest.splits[split]
    lines.append(
      f"{split}: {sum(s.documents for s in files):,} documents, "
      f"{manifest.num_tokens(split):,} tokens, {sum(s.text_bytes for s in files):,} bytes of "
      f"text in {len(files)} shards"
    )
  counts = manifest.counts
  lines.append(
    f"read {counts['documents']:,} documents; {counts['empty']:,} empty ones left out; "
    f"{counts['bad_utf8']:,} not UTF-8 ({manifest.options['reading']['on_bad_utf8']})"
  )
  lines.append(
    f"tokenizer {manifest.tokenizer['fingerprint']} with {manifest.tokenizer['vocab_size']} "
    f"ids; dataset {manifest.fingerprint}"
  )
  return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m sparsejax.data.prepare",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  default = Settings()
  parser.add_argument("inputs", nargs="*", help="files and folders of text")
  parser.add_argument("--out", help="directory to write")
  parser.add_argument(
    "--tokenizer",
    default=default.tokenizer,
    help="byte, a tokenizer.json, or train:SIZE (byte-level BPE)",
  )
  parser.add_argument("--bos", help="token that opens a document")
  parser.add_argument("--eos", help="token that closes a document")
  parser.add_argument("--validation_fraction", type=float, default=default.validation_fraction)
  parser.add_argument(
    "--extensions",
    default="",
    help="endings to take from folders, e.g. .py,.md (default: all known)",
  )
  parser.add_argument(
    "--text_key",
    default=default.reading.text_key,
    help="field of a JSON line or column of a table that holds the text",
  )
  parser.add_argument(
    "--separator",
    default=default.reading.separator,
    help="string between the documents of one text file",
  )
  parser.add_argument(
    "--on_bad_utf8",
    choices=documents.ON_BAD_UTF8,
    default=default.reading.on_bad_utf8,
  )
  parser.add_argument("--workers", type=int, default=os.cpu_count())
  parser.add_argument(
    "--verify", metavar="DIR", help="read a prepared directory again and compare its hashes"
  )
  return parser


def main(arguments: list[str] | None = None) -> int:
  """The command line; returns the exit status."""
  parser = _parser()
  options = parser.parse_args(arguments)
  try:
    if options.verify:
      sys.stdout.write(f"{shards.verify(options.verify)} files are as they were written\n")
      return 0
    if not options.inputs or not options.out:
      parser.error("name the input files and --out, or --verify=DIR")
    manifest = prepare(
      options.inputs,
      options.out,
      Settings(
        tokenizer=options.tokenizer,
        validation_fraction=options.validation_fraction,
        reading=documents.Options(
          text_key=options.text_key,
          separator=options.separator,
          on_bad_utf8=options.on_bad_utf8,
        ),
        bos=options.bos,
        eos=options.eos,
      ),
      extensions=tuple(e for e in options.extensions.split(",") if e),
      num_workers=options.workers,
      show_progress=sys.stderr.isatty(),
    )
    sys.stdout.write(summary(manifest) + "\n")
  except errors.UserError as error:
    sys.stderr.write(f"error: {error}\n")
    return 2
  except KeyboardInterrupt:
    sys.stderr.write("interrupted; the same command carries on from here\n")
    return 130
  return 0


if __name__ == "__main__":
  sys.exit(main())
