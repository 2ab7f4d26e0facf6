"""SSA on Python's own source files, small enough to learn on two CPU cores.

python train.py --config=configs/smoke.py --workdir=runs/smoke
"""

from configs import base


def get_config():
  c = base.get_config()
  c.model.update(
    num_hidden_layers=4,
    hidden_size=128,
    intermediate_size=352,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=320,
    rope_theta=10_000.0,
    dtype="float32",  # CPUs have no fast bfloat16
    remat="none",
  )
  c.attention.update(method="ssa", block_size=16, num_blocks=4)
  c.infllmv2.update(num_initial=0, num_local=2)
  c.nosa.num_query_aware = 1
  c.loss.chunk_length = 256
  c.data.update(sources=("stdlib",), sequence_length=256, batch_size=16)
  c.optimizer.update(peak_lr=3e-3, warmup_steps=20)
  c.train.update(
    num_steps=180,
    accumulate_steps=1,
    log_every=20,
    eval_every=90,
    eval_batches=8,
    save_every=90,
  )
  return c
