"""From a config to a trained checkpoint."""
