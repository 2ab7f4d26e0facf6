r"""NOSA, 1B, its long stage: rows of 16k, from a model that full attention trained.

  python train.py --config=configs/full_1b.py --workdir=runs/full_1b
  python train.py --config=configs/nosa_1b.py --workdir=runs/nosa_1b \
    --config.train.init_from=runs/full_1b

Of 64 blocks of 64 keys, 1 initial, 16 local, 16 by the query and 31 by the eviction head
(arXiv:2510.13602), which is new and begins without a say. The schedule and the 5B tokens are
those that InfLLM-V2 has for such a stage (arXiv:2509.24663), since NOSA's are not printed; the
model, SSA's 1B, the warm-up and the tokens per step are this repository's choice. `data/long`
is text prepared as for full_1b.py, in long documents.
"""

from configs import base


def get_config():
  c = base.get_config()
  c.attention.update(method="nosa", block_size=64, num_blocks=64)
  c.infllmv2.update(num_initial=1, num_local=16, window_size=32, window_stride=16)
  c.nosa.num_query_aware = 16
  c.data.update(sources=("data/long",), sequence_length=16384, batch_size=192)
  c.optimizer.update(schedule="linear", peak_lr=3e-4, end_lr=2.75e-4, warmup_steps=16)
  c.train.num_steps = 1590
  return c
