"""What the program that continues prompts says to a mistake, before it loads anything."""

import pytest

from sparsejax import generate


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--prompt=a", "--prompt_file=b"], "--prompt and --prompt_file are two prompts; give one"),
    (["--prompt_file=no/such/file"], "--prompt_file=no/such/file cannot be read"),
    (["--num_texts=0"], "--num_texts=0 must be at least 1"),
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


class Letters:
  """A tokenizer whose ids are bytes."""

  def decode(self, ids):
    return bytes(ids).decode("utf-8", errors="replace")


def test_a_character_of_several_tokens_is_shown_when_it_is_whole(capsys):
  shown, show = [], generate.Stream(Letters(), "a")
  assert capsys.readouterr().out == ""
  for token in "bä€".encode():
    show(0, token)
    shown.append(capsys.readouterr().out)
  assert shown == ["ab", "", "ä", "", "", "€"]
  show(0, 0xE2)
  show.end()
  assert capsys.readouterr().out == "\ufffd\n"
