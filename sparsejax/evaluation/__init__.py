"""Questions put to a checkpoint, and tables of the answers."""
