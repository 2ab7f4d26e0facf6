"""Where the queries of a chunk stand among the keys."""


def check(num_queries: int, num_keys: int, query_offset) -> None:
  """Checks that queries have places among the keys, as far as that is known.

  Args:
    num_queries, num_keys: T and S.
    query_offset: position of the first query; a traced one cannot be checked.

  Raises:
    ValueError: a query before the first key, or behind the last.
  """
  first = query_offset if isinstance(query_offset, int) else 0
  if first < 0 or first + num_queries > num_keys:
    raise ValueError(
      f"{num_queries} queries from {query_offset=} on do not lie within {num_keys} keys; a "
      "query is at the position of a key"
    )
