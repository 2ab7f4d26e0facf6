"""From queries and keys to the list of key blocks that each query reads."""
