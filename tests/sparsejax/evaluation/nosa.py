"""A small NOSA checkpoint, loaded on one of the simulated devices."""

import dataclasses

import jax

from configs import base
from sparsejax import sharding
from sparsejax.evaluation import subject as subjects
from tests import small


def save(workdir) -> None:
  """Lists of four blocks, of which a query chooses one; data are the built-in `recall`."""
  config = small.make_config(
    attention__method="nosa",
    attention__num_blocks=4,
    nosa__num_query_aware=1,
    data__sources=("recall",),
    data__recall_pairs=2,
    data__recall_queries=2,
  )
  small.save_checkpoints(workdir, config, steps=(1,))


def one_device() -> jax.sharding.Mesh:
  types = (jax.sharding.AxisType.Auto,) * 3
  return jax.make_mesh((1, 1, 1), sharding.AXES, types, devices=jax.devices()[:1])


def load(workdir) -> subjects.Subject:
  """On one device, as pages in the host's memory need it."""
  subject, mesh = subjects.load(workdir, base.get_config()), one_device()
  params = jax.device_put(subject.params, sharding.replicated(mesh))
  return dataclasses.replace(subject, mesh=mesh, params=params)
