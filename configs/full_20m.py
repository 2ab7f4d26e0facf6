r"""Full attention, 20M: the dense baseline of the small comparison.

  python -m sparsejax.data.prepare .venv/lib/python3.12/site-packages --out=data/python \
    --extensions=.py --on_bad_utf8=skip --tokenizer=train:8192
  python train.py --config=configs/full_20m.py --workdir=runs/full_20m

The corpus is the Python source text of the packages installed beside you. Documents are
separate in both streams. Measured results: results/20m.
"""

from configs import base


def get_config():
  c = base.get_config()
  c.model.update(
    num_hidden_layers=10,
    hidden_size=384,
    intermediate_size=1024,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=8192,
    rope_theta=10_000.0,
    remat="attention",  # a quarter of the memory at the same speed
  )
  c.data.update(sources=("data/python",), sequence_length=2048, batch_size=32, num_workers=2)
  c.optimizer.update(peak_lr=2e-3, warmup_steps=100)
  c.train.update(
    num_steps=2000,
    accumulate_steps=1,
    log_every=25,
    eval_every=100,
    eval_batches=4,
    save_every=500,
  )
  return c
