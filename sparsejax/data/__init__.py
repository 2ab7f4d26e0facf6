"""From text on disk to batches of token rows."""
