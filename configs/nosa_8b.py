r"""NOSA, 8B, its long stage: nosa_1b.py with 32 layers of 4096, 32 heads over 2 of 128.

  python train.py --config=configs/nosa_8b.py --workdir=runs/nosa_8b --config.mesh.fsdp=8 \
    --config.mesh.data=1 --config.train.init_from=...

The shape of arXiv:2510.13602, but for the width of the MLP, the vocabulary and separate
embeddings, which are those of Llama 3 8B.
"""

from configs import nosa_1b


def get_config():
  c = nosa_1b.get_config()
  c.model.update(
    num_hidden_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,
    tie_word_embeddings=False,
  )
  return c
