"""The models that the notebooks look at: trained the first time one asks, then found again.

SPARSEJAX_EXAMPLES=quick makes them, and what notebooks do with them, so small that all of it
takes seconds: that is how tests run the notebooks. Nothing is learned then, and pictures show
nothing but that they can be drawn.
"""

import os
import pathlib

import ml_collections

from configs import base, smoke
from sparsejax.data import stdlib
from sparsejax.evaluation import subject
from sparsejax.training import loop

IS_QUICK = os.environ.get("SPARSEJAX_EXAMPLES") == "quick"
# Beside the notebooks' folder, in which they run.
RUNS = pathlib.Path("../runs") / ("examples_quick" if IS_QUICK else "examples")


def config(method: str) -> ml_collections.ConfigDict:
  """The smoke preset with another method, and two blocks of 16 keys for a query to read."""
  c = smoke.get_config()
  c.attention.update(method=method, num_blocks=2)
  c.data.sources = (str(RUNS / "stdlib"),)
  c.train.update(num_steps=240, eval_every=20, save_every=240)
  c.train.update(sample_tokens=0, tensorboard=False)
  if IS_QUICK:
    c.model.update(num_hidden_layers=2, hidden_size=32, intermediate_size=64, head_dim=16)
    c.data.update(sequence_length=128, batch_size=8)
    c.loss.chunk_length = 128
    c.optimizer.warmup_steps = 1
    c.train.update(num_steps=4, eval_every=2, save_every=4, eval_batches=1)
  return c


def train(method: str) -> pathlib.Path:
  """Trains a model, unless that has been done; returns its workdir.

  The data, Python's own source files, are prepared once for all.
  """
  workdir, its_config = RUNS / method, config(method)
  if not (workdir / "checkpoints" / str(its_config.train.num_steps)).exists():
    stdlib.prepare_stdlib(RUNS / "stdlib")
    loop.run(its_config, workdir)
  return workdir


def load(method: str, **options) -> subject.Subject:
  """The trained model with its data, ready for questions; see `subject.load` for options."""
  return subject.load(train(method), base.get_config(), **options)
