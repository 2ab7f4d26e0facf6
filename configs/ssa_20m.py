"""Sparse Sparse Attention, 20M. See full_20m.py for the corpus.

python train.py --config=configs/ssa_20m.py --workdir=runs/ssa_20m
"""

from configs import full_20m


def get_config():
  c = full_20m.get_config()
  c.attention.method = "ssa"
  c.train.num_steps = 1300  # the same time on one H200, on kernels, as full attention's 2000
  return c
