"""Importing the library does nothing but define things."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent

# In a process of its own: here, a backend runs already.
CODE = """
import contextlib, importlib, io, json, pkgutil, sys
import jax
names, texts = [], io.StringIO()
with contextlib.redirect_stdout(texts), contextlib.redirect_stderr(texts):
  for root in ("sparsejax", "pallas_kernels", "configs"):
    package = importlib.import_module(root)
    names.append(root)
    for module in pkgutil.walk_packages(package.__path__, root + "."):
      names.append(module.name)
      try:
        importlib.import_module(module.name)
      except ModuleNotFoundError as error:
        # Files of kernels in a language that is an optional extra, and the one that knows
        # lm-evaluation-harness; the front doors are not.
        is_kernel = error.name == "triton" and ".triton_" in module.name
        is_harness = error.name == "lm_eval" and module.name.endswith(".harness_model")
        if not (is_kernel or is_harness):
          raise
from absl import flags
from jax.extend import backend
# A list of devices that can still be set means that nobody has asked for one.
untouched = True
try:
  jax.config.update("jax_num_cpu_devices", 3)
except RuntimeError:
  untouched = False
print(json.dumps(dict(
  names=names,
  untouched=untouched,
  devices=len(jax.devices()),
  said=texts.getvalue(),
  is_parsed=flags.FLAGS.is_parsed(),
  ours=[name for name in flags.FLAGS if flags.FLAGS.find_module_defining_flag(name)
        .startswith(("sparsejax", "pallas_kernels", "configs"))],
  drawing="matplotlib.pyplot" in sys.modules,
)))
"""


def run():
  found = subprocess.run(
    [sys.executable, "-W", "error", "-c", CODE],
    cwd=ROOT,
    check=False,
    capture_output=True,
    text=True,
  )
  assert found.returncode == 0, found.stderr
  assert found.stderr == ""
  return json.loads(found.stdout)


def test_importing_everything_touches_no_device_and_says_nothing():
  found = run()
  # The number of devices can only be set before the backend is there.
  assert found["untouched"]
  assert found["devices"] == 3
  assert found["said"] == ""
  assert not found["is_parsed"]
  # Only scripts define flags.
  assert found["ours"] == []
  assert not found["drawing"]
  files = [
    path
    for root in ("sparsejax", "pallas_kernels", "configs")
    for path in (ROOT / root).rglob("*.py")
  ]
  assert len(found["names"]) == len(set(found["names"])) == len(files)
