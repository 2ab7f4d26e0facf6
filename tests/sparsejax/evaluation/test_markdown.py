"""Tables out of text."""

from sparsejax.evaluation import markdown


def test_a_text_falls_into_lines_and_tables():
  rows = [("a", "bb"), ("-", "2"), ("", "---")]
  text = f"before\n\n{markdown.align(rows)}\nbetween\n{markdown.align(rows[:2])}"
  assert markdown.blocks(text) == ["before", rows, "between", rows[:2]]
