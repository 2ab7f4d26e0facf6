"""What the programs are started with."""

import os

import pytest

from tests import compiling


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
  """One device, and one cache of compiled programs for all the processes started here."""
  kept = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
  return kept | dict(
    XLA_FLAGS=compiling.FLAGS,
    JAX_COMPILATION_CACHE_DIR=str(tmp_path_factory.mktemp("compiled")),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    JAX_PLATFORMS="cpu",
    PYTHONUNBUFFERED="1",
  )
