"""The one family of exceptions that a user's mistake may raise."""

from collections.abc import Iterable
import difflib


class UserError(Exception):
  """A mistake the user can mend.

  The message names the value, the limit and the remedy. The command lines print it
  without a traceback and exit with status 2.
  """


class ConfigError(UserError):
  """A configuration that names an unknown key, has a wrong type or contradicts itself."""


class DataError(UserError):
  """Text, shards or tokenizers that are missing, damaged or do not fit together."""


class CheckpointError(UserError):
  """A checkpoint that is missing, damaged or belongs to another configuration."""


def install(extra: str) -> str:
  """How to get an extra of this project, for a sentence about a package that is missing."""
  return f"pip install -e '.[{extra}]' in the repository of sparsejax"


def one_of(what: str, value: str, allowed: Iterable[str]) -> str:
  """A sentence for "`value` is no such `what`", with the nearest names."""
  allowed = list(allowed)
  near = difflib.get_close_matches(value, allowed, n=3, cutoff=0.5)
  hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
  return f"unknown {what} {value!r}.{hint} There are: {', '.join(allowed)}."
