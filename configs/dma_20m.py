"""DMA, 20M: of 16 blocks of 16 keys, 5 forced and 11 by exponentiated scores of keys.

  python train.py --config=configs/dma_20m.py --workdir=runs/dma_20m

The budget of nosa_20m.py without queries that choose. See full_20m.py for the corpus.
"""

from configs import full_20m


def get_config():
  c = full_20m.get_config()
  c.attention.method = "dma"
  c.train.num_steps = 1750  # the same time on one H200, on kernels, as full attention's 2000
  return c
