"""Trains one model.

  python train.py --config=configs/smoke.py --workdir=runs/smoke
  python train.py --config=configs/ssa_1b.py --config.train.num_steps=1e4 --workdir=runs/a

The same command resumes from the newest checkpoint in the workdir.
"""

import sys

from absl import app, flags

from sparsejax import command_line, errors
from sparsejax.configuration import overrides
from sparsejax.training import dry_run, loop, signals

CONFIG = flags.DEFINE_string("config", None, "What to train: a file of configs/.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints and metrics go.")
ALLOW = flags.DEFINE_list(
  "allow_config_change", [], "Keys in which a resumed run may differ from its checkpoint."
)
PRINT = flags.DEFINE_bool("print_config", False, "Print every key and exit.")
LIST = flags.DEFINE_bool("list_configs", False, "Print the presets and exit.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print shapes, sizes and memory, and exit.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster.")


def main(arguments: list[str]) -> int:
  if LIST.value:
    for path, docstring in overrides.presets().items():
      print(f"{path:24} {docstring}")
    return 0
  if CONFIG.value is None:
    raise errors.ConfigError("name a --config; --list_configs shows the presets.")
  config = overrides.load(CONFIG.value, command_line.config_overrides(arguments))
  if PRINT.value:
    print(overrides.as_text(config))
    return 0
  if DISTRIBUTED.value:
    command_line.join_cluster()
  if DRY_RUN.value:
    for line in dry_run.run(config):
      print(line, flush=True)
    return 0
  if WORKDIR.value is None:
    raise errors.ConfigError("name a --workdir for checkpoints and metrics.")
  result = loop.run(config, WORKDIR.value, allow_config_change=tuple(ALLOW.value))
  return signals.EXIT_INTERRUPTED if result.was_interrupted else 0


if __name__ == "__main__":
  sys.exit(app.run(command_line.friendly(main), flags_parser=command_line.parse_flags))
