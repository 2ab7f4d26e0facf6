"""Causal attention of a chunk of a row's queries to all of its keys so far."""
