"""Sparse Sparse Attention, 1B (arXiv:2511.20102, Table A1).

  python train.py --config=configs/ssa_1b.py --workdir=runs/ssa_1b

Published for this setting (Table 1): WikiText perplexity 15.28 full, 15.96 at a budget of
256 tokens. See full_1b.py for the corpus.
"""

from configs import base


def get_config():
  c = base.get_config()
  c.attention.method = "ssa"
  return c
