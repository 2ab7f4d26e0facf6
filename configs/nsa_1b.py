"""NSA at the sizes of SSA's baseline, 1B: blocks 16 x 16, a window of 128 keys.

  python train.py --config=configs/nsa_1b.py --workdir=runs/nsa_1b

Compression is learned and every branch has keys and values of its own, as in NSA's paper
(arXiv:2502.11089). What SSA's paper (arXiv:2511.20102, Table 1) publishes for these sizes,
WikiText perplexity 16.02 at a budget of 256 tokens, is of its released code, which differs by
the lines in comments below. See full_1b.py for the corpus.
"""

from configs import base


def get_config():
  c = base.get_config()
  c.attention.method = "nsa"
  c.attention.gate = False  # NSA's three gates stand in for the one of the other methods
  c.nsa.update(compress_length=16, compress_stride=16, window=128)
  # As SSA's released code has it:
  # c.nsa.update(compression="mean", kv="shared", num_initial=0, num_local=1)
  # c.attention.selection = "half_local"
  return c
