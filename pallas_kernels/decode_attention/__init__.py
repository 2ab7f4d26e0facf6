"""Attention of one query per row to keys that lie in pages."""
