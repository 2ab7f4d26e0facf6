r"""InfLLM-V2, 1B, its long stage at NOSA's budget: 1 initial, 16 local, 47 others of 64 blocks.

  python train.py --config=configs/infllmv2_1b.py --workdir=runs/infllmv2_1b \
    --config.train.init_from=runs/full_1b

The baseline of arXiv:2510.13602. InfLLM-V2 itself reads 96 blocks, 32 of them local
(arXiv:2509.24663): `--config.attention.num_blocks=96 --config.infllmv2.num_local=32`. See
nosa_1b.py for the stage.
"""

from configs import nosa_1b


def get_config():
  c = nosa_1b.get_config()
  c.attention.method = "infllmv2"
  return c
