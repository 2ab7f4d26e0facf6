"""Attention in which every query reads a short list of key blocks."""
