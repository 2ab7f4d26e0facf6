"""Sparse Sparse Attention, 20M. See full_20m.py for the corpus.

python train.py --config=configs/ssa_20m.py --workdir=runs/ssa_20m
"""

from configs import full_20m


def get_config():
  c = full_20m.get_config()
  c.attention.method = "ssa"
  return c
