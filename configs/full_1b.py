r"""Full attention, 1B: the dense baseline of SSA's Table 1 (arXiv:2511.20102).

  python train.py --config=configs/full_1b.py --workdir=runs/full_1b

Published for this setting (100B tokens): WikiText perplexity 15.13 full, 17.05 at a budget
of 256 tokens. Prepare the corpus first, with the Llama 3.2 tokenizer:

  python -m sparsejax.data.prepare smollm/*.parquet --out=data/smollm \
    --tokenizer=llama-3.2/tokenizer.json
"""

from configs import base


def get_config():
  return base.get_config()
