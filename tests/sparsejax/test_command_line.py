"""What the scripts share, run in this process."""

import io
import logging as python_logging
import sys

from absl import flags, logging
import jax
import pytest

from sparsejax import command_line, errors


@pytest.fixture
def own_flags(monkeypatch):
  """Flags of a script of its own, apart from those that libraries define."""
  values = flags.FlagValues()
  flags.DEFINE_string("config", None, "", flag_values=values)
  flags.DEFINE_bool("dry_run", False, "", flag_values=values)
  flags.DEFINE_integer("max_rows", 0, "", flag_values=values)
  monkeypatch.setattr(flags, "FLAGS", values)
  return values


@pytest.fixture(autouse=True)
def loud_again():
  """The command line turns logging down; what follows gets it as it was."""
  before = logging.get_verbosity(), python_logging.getLogger("jax").level
  yield
  logging.set_verbosity(before[0])
  python_logging.getLogger("jax").setLevel(before[1])


def test_flags_are_ours_and_overrides_are_the_configs(own_flags):
  rest = command_line.parse_flags(
    ["train.py", "--config.seed=3", "--config=a.py", "--noconfig.attention.gate", "--dry_run"]
  )
  assert rest == ["train.py", "--config.seed=3", "--noconfig.attention.gate"]
  assert own_flags.config == "a.py"
  assert own_flags.dry_run is True
  assert command_line.config_overrides(rest) == rest[1:]


def test_the_scripts_name_is_no_override():
  assert command_line.config_overrides(["--config.py", "--config.a=1"]) == ["--config.a=1"]


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--confg=a.py", "error: Unknown command line flag 'confg'. Did you mean: config ?\n"),
    ("--zzzz", "error: Unknown command line flag 'zzzz'\n"),
    ("--max_rows=few", "error: flag --max_rows=few: invalid literal for int()"),
    ("config=a.py", "error: unexpected argument 'config=a.py'; flags begin with --.\n"),
  ],
)
@pytest.mark.usefixtures("own_flags")
def test_a_flag_that_does_not_exist_ends_the_program(argument, message, capsys):
  with pytest.raises(SystemExit) as caught:
    command_line.parse_flags(["train.py", argument])
  assert caught.value.code == 2
  said = capsys.readouterr()
  assert said.err.startswith(message)
  assert said.err.count("\n") == 1
  assert said.out == ""


@pytest.mark.parametrize(
  "kind", [errors.UserError, errors.ConfigError, errors.DataError, errors.CheckpointError]
)
def test_a_users_mistake_is_one_message_and_status_2(kind, capsys):
  def main(arguments):
    raise kind(f"no such thing as {arguments[1]}; take another.")

  assert command_line.friendly(main)(["train.py", "this"]) == 2
  said = capsys.readouterr()
  assert said.err == "error: no such thing as this; take another.\n"
  assert said.out == ""


def test_a_mistake_of_ours_keeps_its_traceback():
  def main(arguments):
    raise ValueError(arguments)

  with pytest.raises(ValueError, match=r"train\.py"):
    command_line.friendly(main)(["train.py"])


@pytest.mark.parametrize("status", [0, 75])
def test_the_status_of_main_is_the_programs(status):
  def main(arguments):
    """Documented."""
    return status

  wrapped = command_line.friendly(main)
  assert wrapped([]) == status
  assert wrapped.__doc__ == "Documented."


def test_chatter_is_off_and_warnings_stay():
  logging.set_verbosity(logging.INFO)
  python_logging.getLogger("jax").setLevel(python_logging.DEBUG)
  command_line.friendly(lambda arguments: 0)([])
  assert logging.get_verbosity() == logging.WARNING
  assert python_logging.getLogger("jax").level == python_logging.WARNING


def test_a_cluster_is_joined_through_jax(monkeypatch):
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda: calls.append("joined"))
  command_line.join_cluster()
  assert calls == ["joined"]


def test_characters_that_a_terminal_lacks_end_nothing(monkeypatch):
  written = io.BytesIO()
  stdout = io.TextIOWrapper(written, encoding="latin-1", write_through=True)
  monkeypatch.setattr(sys, "stdout", stdout)
  assert command_line.friendly(lambda _: sys.stdout.write("é → ü") and 0)([]) == 0
  assert written.getvalue() == "é ? ü".encode("latin-1")
