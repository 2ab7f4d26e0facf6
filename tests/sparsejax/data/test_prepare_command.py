"""Preparing from the command line."""

import pathlib
import subprocess
import sys

import pytest

from sparsejax.data import prepare, shards
from tests.sparsejax.data import texts

ROOT = pathlib.Path(__file__).parents[3]
pytestmark = pytest.mark.usefixtures("small_units")


def command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "sparsejax.data.prepare", *map(str, arguments)],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip


def test_the_command_line_prepares(corpus, tmp_path):
  out = tmp_path / "out"
  done = command(
    corpus,
    f"--out={out}",
    "--validation_fraction=0.5",
    "--extensions=.jsonl,.py",
    "--workers=2",
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == prepare.summary(shards.load(out)) + "\n"
  assert sorted(texts.texts_of(out, "train") + texts.texts_of(out, "validation")) == sorted(
    text for text in texts.all_texts()[:-3] if text.strip()
  )


@pytest.mark.parametrize("kind", ["missing", "broken"])
def test_the_command_line_says_what_is_wrong_in_one_line(corpus, tmp_path, kind):
  (corpus / "z.txt").write_bytes(b"good\n\xff")
  inputs = dict(missing=[tmp_path / "none"], broken=[corpus])[kind]
  failed = command(*inputs, f"--out={tmp_path / 'out'}", "--workers=2")
  assert (failed.returncode, failed.stdout) == (2, "")
  what = dict(missing=r"does not exist.", broken="z.txt:2 is not UTF-8. ")[kind]
  assert failed.stderr.startswith("error: ")
  assert what in failed.stderr
  assert failed.stderr.count("\n") == 1
  assert "Traceback" not in failed.stderr


def test_every_option_reaches_the_settings(tmp_path, capsys, bpe):
  folder, _ = bpe
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'{"body": "text"}\n{"body": "\xff"}\n')
  out = tmp_path / "out"
  arguments = [str(path), f"--out={out}", f"--tokenizer={folder}", "--validation_fraction=0",
               "--text_key=body", "--on_bad_utf8=replace", "--separator=##", "--workers=1",
               "--bos=<|end_of_text|>", "--eos=<|begin_of_text|>"]  # fmt: skip
  assert prepare.main(arguments) == 0
  assert shards.load(out).options == dict(
    tokenizer=str(folder),
    validation_fraction=0.0,
    reading=dict(text_key="body", separator="##", on_bad_utf8="replace"),
    bos="<|end_of_text|>",
    eos="<|begin_of_text|>",
    tokenizer_sample_bytes=prepare.Settings().tokenizer_sample_bytes,
  )
  assert texts.texts_of(out, "train") == ["text", "\ufffd"]
  assert capsys.readouterr().err == ""


def test_verifying_finds_what_changed(corpus, tmp_path, capsys):
  out = tmp_path / "out"
  manifest = prepare.prepare([str(corpus)], out, texts.HALF)
  num_files = 2 * sum(map(len, manifest.splits.values()))
  assert prepare.main([f"--verify={out}"]) == 0
  assert capsys.readouterr().out == f"{num_files} files are as they were written\n"
  file = out / manifest.splits["validation"][-1].file
  data = bytearray(file.read_bytes())
  data[100] ^= 1
  file.write_bytes(data)
  assert prepare.main([f"--verify={out}"]) == 2
  assert f"{file} differs from its recorded hash" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["a.txt"], ["--out=b"], ["a.txt", "--out"]])
def test_a_command_line_without_input_or_output_shows_its_usage(arguments, capsys):
  with pytest.raises(SystemExit) as exited:
    prepare.main(arguments)
  assert exited.value.code == 2
  assert "usage: python -m sparsejax.data.prepare" in capsys.readouterr().err


def test_an_interrupted_command_says_how_to_carry_on(corpus, tmp_path, capsys, monkeypatch):
  def press_control_c(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(prepare, "_write_document", press_control_c)
  assert prepare.main([str(corpus), f"--out={tmp_path / 'out'}", "--workers=1"]) == 130
  assert "the same command carries on" in capsys.readouterr().err
