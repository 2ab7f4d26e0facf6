"""Causal attention in which every query reads every earlier key of its document."""
