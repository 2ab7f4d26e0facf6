"""Reads a config file and applies `--config.a.b=value` to it, with errors a person can use."""

import ast
import difflib
import importlib.util
import pathlib
import sys
from typing import Any

import ml_collections

from sparsejax import errors

PREFIX = "--config."
NEGATED_PREFIX = "--noconfig."

# What other codebases call some of our keys.
ALSO_KNOWN_AS = {
  "block_counts": "attention.num_blocks",
  "topk": "attention.num_blocks",
  "batch": "data.batch_size",
  "seq_len": "data.sequence_length",
  "learning_rate": "optimizer.peak_lr",
  "lr": "optimizer.peak_lr",
  "steps": "train.num_steps",
  "gradient_accumulation_steps": "train.accumulate_steps",
}


def is_override(argument: str) -> bool:
  """Whether a command-line argument sets a config key."""
  return argument.startswith((PREFIX, NEGATED_PREFIX))


def load(path: str, overrides: list[str] | tuple[str, ...] = ()) -> ml_collections.ConfigDict:
  """Returns the locked config of a file's `get_config()`, after the overrides.

  Args:
    path: a Python file. It is executed: treat a config file as code.
    overrides: `--config.a.b=value`, `--config.flag` for True, `--noconfig.flag` for False.

  Raises:
    ConfigError: no such file or key, or a value of the wrong type.
  """
  config = _execute(pathlib.Path(path))
  for argument in overrides:
    _apply(config, argument)
  return config.lock()


def presets(folder: str | pathlib.Path = "configs") -> dict[str, str]:
  """The config files of a folder and the first line of each one's docstring."""
  found = {}
  for file in sorted(pathlib.Path(folder).glob("*.py")):
    if not file.stem.startswith("_"):
      docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
      found[str(file)] = docstring.partition("\n")[0]
  return found


def as_text(config: ml_collections.ConfigDict) -> str:
  """One `key = value` line for every key."""
  return "\n".join(f"{key} = {value!r}" for key, value in flatten(config).items())


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Every key of a config by its dotted path, in order."""
  flat = {}
  for key in config:
    value = config[key]
    if isinstance(value, ml_collections.ConfigDict):
      flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
    else:
      flat[key] = value
  return flat


def _execute(path: pathlib.Path) -> ml_collections.ConfigDict:
  if not path.is_file():
    near = difflib.get_close_matches(str(path), presets(), n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise errors.ConfigError(
      f"no config file {str(path)!r}.{hint} --list_configs shows the presets."
    )
  spec = importlib.util.spec_from_file_location("sparsejax_user_config", path.resolve())
  if spec is None or spec.loader is None:
    raise errors.ConfigError(f"{path} is not a Python file; a config file ends in .py.")
  module = importlib.util.module_from_spec(spec)
  # A config says `from configs import base` wherever it is launched from.
  root = str(path.resolve().parent.parent)
  sys.path.insert(0, root)
  try:
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
      raise errors.ConfigError(f"{path} has no function get_config() that returns a config.")
    config = module.get_config()
  except (
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    SyntaxError,
    ImportError,
  ) as error:
    raise errors.ConfigError(
      f"{path} cannot be read as a config: {_first_line(error)}"
    ) from error
  finally:
    sys.path.remove(root)
  if not isinstance(config, ml_collections.ConfigDict):
    raise errors.ConfigError(
      f"get_config() of {path} returned {type(config).__name__}; it must return a ConfigDict."
    )
  return config


def _first_line(error: BaseException) -> str:
  text = str(error.args[0]) if error.args else type(error).__name__
  # ml_collections appends every field there is.
  return text.strip().partition("\n")[0].partition(" Other fields present")[0]


def _apply(config: ml_collections.ConfigDict, argument: str) -> None:
  path, text = _split(argument)
  *sections, name = path.split(".")
  holder = config
  for section in sections:
    inner = holder.get(section)
    if not isinstance(inner, ml_collections.ConfigDict):
      raise _unknown(config, path)
    holder = inner
  if name not in holder:
    raise _unknown(config, path)
  if isinstance(holder[name], ml_collections.ConfigDict):
    keys = ", ".join(f"{path}.{key}" for key in holder[name])
    raise errors.ConfigError(f"config key {path!r} is a section; set one of its keys: {keys}.")
  reference = dict(holder.items(preserve_field_references=True))[name]
  is_optional = holder[name] is None or isinstance(reference, ml_collections.FieldReference)
  holder[name] = _parse(path, text, holder.get_type(name), is_optional)


def _split(argument: str) -> tuple[str, str]:
  if argument.startswith(NEGATED_PREFIX):
    return argument.removeprefix(NEGATED_PREFIX), "false"
  path, equals, text = argument.removeprefix(PREFIX).partition("=")
  return path, text if equals else "true"


def _unknown(config: ml_collections.ConfigDict, path: str) -> errors.ConfigError:
  keys = list(flatten(config))
  section, _, name = path.rpartition(".")
  siblings = [key for key in keys if section and key.rpartition(".")[0] == section]
  by_name = {key.rpartition(".")[2]: key for key in keys}
  near = [ALSO_KNOWN_AS[name]] if name in ALSO_KNOWN_AS else []
  near += [by_name[n] for n in difflib.get_close_matches(name, by_name, n=2, cutoff=0.7)]
  near += difflib.get_close_matches(path, siblings or keys, n=2, cutoff=0.7)
  near = list(dict.fromkeys(near))[:3]
  hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
  if siblings:
    listing = f" Keys of {section!r}: {', '.join(k.rpartition('.')[2] for k in siblings)}."
  else:
    listing = f" Top-level keys: {', '.join(dict.fromkeys(k.partition('.')[0] for k in keys))}."
  return errors.ConfigError(f"unknown config key {path!r}.{hint}{listing}")


def _parse(path: str, text: str, kind: type, is_optional: bool) -> Any:
  """`text` as a value of the key's type; a key that was None may be None again."""
  if text.lower() in ("none", "null"):
    if is_optional:
      return None
    # For other text, `none` is a word like any other.
    if kind is not str:
      raise errors.ConfigError(f"config key {path!r} takes {_EXAMPLES[kind]}; not None.")
  try:
    return _PARSERS[kind](text)
  except ValueError:
    example = _EXAMPLES[kind]
    raise errors.ConfigError(
      f"config key {path!r} takes {example}; {text!r} is none."
    ) from None


def _parse_bool(text: str) -> bool:
  words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
  if text.lower() not in words:
    raise ValueError(text)
  return words[text.lower()]


def _parse_int(text: str) -> int:
  try:
    return int(text)
  except ValueError:
    number = float(text)
    if not number.is_integer():
      raise
    return int(number)


def _parse_str(text: str) -> str:
  is_quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
  return text[1:-1] if is_quoted else text


def _parse_tuple(text: str) -> tuple:
  body = text.strip()
  if body[:1] in "([" and body[-1:] in ")]":
    body = body[1:-1]
  return tuple(_literal(item.strip()) for item in body.split(",") if item.strip())


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


_PARSERS = {
  bool: _parse_bool,
  int: _parse_int,
  float: float,
  str: _parse_str,
  tuple: _parse_tuple,
}
_EXAMPLES = {
  bool: "true or false",
  int: "a whole number (1000, 1_000 or 1e3)",
  float: "a number",
  str: "text",
  tuple: "a list (a,b or '(a, b)')",
}
