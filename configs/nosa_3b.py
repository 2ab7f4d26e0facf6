r"""NOSA, 3B, its long stage: nosa_1b.py in the shape of Llama 3.2 3B with 2 key/value heads.

  python train.py --config=configs/nosa_3b.py --workdir=runs/nosa_3b --config.mesh.fsdp=8 \
    --config.mesh.data=1 --config.train.init_from=...

arXiv:2510.13602 has a 3B model whose shape is not printed; this one is our choice.
"""

from configs import nosa_1b


def get_config():
  c = nosa_1b.get_config()
  c.model.update(
    num_hidden_layers=28,
    hidden_size=3072,
    intermediate_size=8192,
    num_attention_heads=24,
    num_key_value_heads=2,
    head_dim=128,
  )
  return c
