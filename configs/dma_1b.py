r"""DMA, 1B, its long stage at NOSA's budget: 17 of 64 blocks forced, 47 by scores of keys.

  python train.py --config=configs/dma_1b.py --workdir=runs/dma_1b \
    --config.train.init_from=runs/full_1b

The baseline of arXiv:2510.13602, in blocks (see sparsejax/attention/dma.py). See nosa_1b.py
for the stage and the dense model.
"""

from configs import nosa_1b


def get_config():
  c = nosa_1b.get_config()
  c.attention.method = "dma"
  return c
