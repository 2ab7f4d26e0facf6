"""MoBA as SSA's paper trains it, 1B: sparse stream only, 16 blocks of 16 keys.

  python train.py --config=configs/moba_1b.py --workdir=runs/moba_1b

Published for this setting (arXiv:2511.20102, Table 1): WikiText perplexity 16.68 full,
16.54 at a budget of 256 tokens. See full_1b.py for the corpus.
"""

from configs import base


def get_config():
  c = base.get_config()
  c.attention.method = "moba"
  return c
