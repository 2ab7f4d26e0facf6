"""What kernels need to know of block lists, computed from them inside of jit.

A *unit* is 16 rows of queries that belong to one key/value head: the heads of one token
where there are 16 of them, several tokens with fewer heads, half a token with 32. Kernels
work on tiles of units (`query_tiles`) and on tiles of keys (`key_tiles`).

All shapes are static and hold the worst case, so nothing can overflow; where the worst case
itself is too large for 32-bit indices, `ValueError` is raised while tracing.

Shape letters, used in every file of this folder:
  B batch   T queries   K key/value heads   R = B * K   N key blocks
  M blocks listed per query   U units of a row R   E entries of a unit
"""
