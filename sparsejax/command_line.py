"""What the scripts share: flags, friendly errors, joining a cluster."""

from collections.abc import Callable
import functools
import io
import logging as python_logging
import sys

from absl import flags, logging
import jax

from sparsejax import errors
from sparsejax.configuration import overrides


def parse_flags(arguments: list[str]) -> list[str]:
  """Parses a command line, leaving `--config.a.b=value` for the config; see `absl.app.run`.

  Any other flag that is unknown ends the program with the nearest names and status 2.
  """
  ours = [a for a in arguments[1:] if overrides.is_override(a)]
  rest = [a for a in arguments if not overrides.is_override(a)]
  try:
    positional = flags.FLAGS(rest)
    if len(positional) > 1:
      raise errors.ConfigError(f"unexpected argument {positional[1]!r}; flags begin with --.")
  except (flags.Error, errors.UserError) as error:
    sys.stderr.write(f"error: {error}\n")
    sys.exit(2)
  return [arguments[0], *ours]


def config_overrides(arguments: list[str]) -> list[str]:
  """The overrides among what `parse_flags` returned."""
  return [a for a in arguments[1:] if overrides.is_override(a)]


def friendly(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
  """`main`, with a user's mistakes shown as one message and status 2, not a traceback."""

  @functools.wraps(main)
  def run(arguments: list[str]) -> int:
    _quiet()
    _write_anything()
    try:
      return main(arguments)
    except errors.UserError as error:
      sys.stderr.write(f"error: {error}\n")
      return 2

  return run


def join_cluster() -> None:
  """Connects this process with the others of its run (Slurm, MPI or JAX_* variables)."""
  jax.distributed.initialize()


def _quiet() -> None:
  """Keeps libraries' chatter off the screen; warnings and errors stay."""
  logging.set_verbosity(logging.WARNING)
  python_logging.getLogger("jax").setLevel(python_logging.WARNING)


def _write_anything() -> None:
  """Has a mark written for characters that a terminal does not know."""
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="replace")
