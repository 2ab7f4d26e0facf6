"""MoBA, 20M: sparse stream only, 16 blocks of 16 keys. See full_20m.py for the corpus.

python train.py --config=configs/moba_20m.py --workdir=runs/moba_20m
"""

from configs import full_20m


def get_config():
  c = full_20m.get_config()
  c.attention.method = "moba"
  c.train.num_steps = 1700  # the same time on one H200, on kernels, as full attention's 2000
  return c
