"""Causal attention to every earlier key of a query's document, or to the last of them."""
