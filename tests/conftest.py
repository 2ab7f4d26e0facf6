"""Strictness for every test: eight devices, no silent broadcasting, checked array types."""

import gc
import os
import pathlib
import tempfile

from tests import compiling

# Compiling is most of what the tests do.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {compiling.FLAGS}"

# Threads of interpreted GPU kernels wait for each other, each in a thread of the CPU client,
# which makes as many as there are processors unless it is told of more.
os.environ.setdefault("NPROC", "16")

import jax
import jaxtyping
import pytest

# Tracing makes objects by the million, few of them garbage that has to be looked for.
gc.set_threshold(100_000, 20, 20)

# Before anything asks for a device. Several devices on the CPU stand for several GPUs.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
os.environ.setdefault("MPLBACKEND", "Agg")

# Tests that know nothing of each other ask for the same programs. A folder for each process,
# because the cache's writes are not atomic; gone when it ends, so that nothing is remembered.
COMPILED = tempfile.TemporaryDirectory(prefix="sparsejax-tests-")
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

# Shapes written in the signatures of the kernels are checked at every call.
jaxtyping.install_import_hook("pallas_kernels", "beartype.beartype")

# Files that take longest, which start first: else the last of them keeps one worker busy while
# the others have nothing left. Nothing but time depends on this list.
LONGEST = (
  "pallas_kernels/test_mosaic_gpu.py",
  "end_to_end/test_runs.py",
  "sparsejax/attention/test_methods.py",
  "pallas_kernels/test_selection_mosaic_gpu.py",
  "sparsejax/decoding/test_cache.py",
  "pallas_kernels/test_decode_attention.py",
  "sparsejax/decoding/test_generate.py",
  "sparsejax/training/test_step.py",
  "test_examples.py",
  "end_to_end/test_requests.py",
  "pallas_kernels/test_block_sparse_attention.py",
  "sparsejax/attention/test_over_a_mesh.py",
  "sparsejax/test_layer_patterns.py",
  "sparsejax/decoding/test_prefill.py",
)


def pytest_collection_modifyitems(items):
  here = pathlib.Path(__file__).parent
  rank = {here / name: i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: rank.get(item.path, len(LONGEST)))
  marked = [item for item in items if item.get_closest_marker("gpu")]
  if marked and jax.devices()[0].platform != "gpu":
    for item in marked:
      item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_unconfigure():
  COMPILED.cleanup()
