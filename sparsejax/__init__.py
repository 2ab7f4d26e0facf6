"""Pretrain and serve language models with trainable sparse attention, in JAX."""

__version__ = "0.1.0"
