"""What the README's two commands install."""

import pathlib
import re
import subprocess

from packaging import requirements
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
  ("goal", "device", "extras"),
  [
    ("train", "cpu", set()),
    ("train", "cuda12", {"cuda12"}),
    ("train", "cuda13", {"cuda13"}),
    ("test", "cpu", {"dev"}),
    ("test", "cuda13", {"cuda13", "dev"}),
  ],
)
def test_a_command_installs_its_extras(goal, device, extras):
  # -n prints the commands, -W makes the installation due however old it is.
  printed = subprocess.run(
    ["make", "-n", "-W", "pyproject.toml", goal, f"EXTRA={device}"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  (asked,) = re.findall(r'-e "\.(.*)"', printed)
  # pip refuses `.[]`, although it is no worse than `.`.
  assert asked != "[]"
  assert requirements.Requirement(f"sparsejax{asked}").extras == extras
