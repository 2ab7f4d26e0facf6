"""NOSA, 20M: of 16 blocks of 16 keys, 5 forced, 4 by the query and 7 by the eviction head.

  python train.py --config=configs/nosa_20m.py --workdir=runs/nosa_20m

A quarter of the paper's numbers (arXiv:2510.13602: 64 blocks of 64 keys, 1 initial, 16 local,
16 by the query), and so the same bound on locality, 0.75. See full_20m.py for the corpus.
"""

from configs import full_20m


def get_config():
  c = full_20m.get_config()
  c.attention.method = "nosa"
  c.train.num_steps = 1640  # the same time on one H200, on kernels, as full attention's 2000
  return c
