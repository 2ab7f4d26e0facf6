"""InfLLM-V2, 20M: of 16 blocks of 16 keys, 1 initial, 4 local and the 11 best others.

  python train.py --config=configs/infllmv2_20m.py --workdir=runs/infllmv2_20m

The proportions are those of NOSA's baseline, a quarter of its numbers: 64 blocks of 64 keys,
1 initial, 16 local. Windows are half a block every quarter, here 8 keys every 4, as base.py
has them. See full_20m.py for the corpus.
"""

from configs import full_20m


def get_config():
  c = full_20m.get_config()
  c.attention.method = "infllmv2"
  c.train.num_steps = 1680  # the same time on one H200, on kernels, as full attention's 2000
  return c
