"""NSA, 20M: learned compression, 16 blocks of 16 keys, a window of 128. See full_20m.py.

python train.py --config=configs/nsa_20m.py --workdir=runs/nsa_20m
"""

from configs import full_20m


def get_config():
  c = full_20m.get_config()
  c.attention.method = "nsa"
  c.attention.gate = False  # NSA's three gates stand in for the one of the other methods
  c.nsa.update(compress_length=16, compress_stride=16, window=128)
  c.train.num_steps = 1060  # the same time on one H200, on kernels, as full attention's 2000
  return c
