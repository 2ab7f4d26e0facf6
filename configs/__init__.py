"""Presets. Each module has `get_config()`; `base` holds every key and its default."""
