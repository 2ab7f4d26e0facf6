"""From a config file and overrides to checked, recorded settings and plain objects."""
