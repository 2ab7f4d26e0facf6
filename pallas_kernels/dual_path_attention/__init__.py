"""Full and block-sparse attention over the same queries, keys and values."""
