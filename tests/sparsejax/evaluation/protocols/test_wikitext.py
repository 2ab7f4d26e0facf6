"""WikiText: what its tokenizer did is undone, and pages are found in all of its forms."""

import pytest

from sparsejax import errors
from sparsejax.evaluation.protocols import held_out, wikitext

LINES = [
  " ",
  " = Robert = ",
  " ",
  " Robert is an actor , born in 1 @,@ 979 . ",
  " = = Career = = ",
  " ",
  " = = = Early = = = ",
  " He had a role . ",
  " = Ryan = ",
  " ",
  " Text . ",
]
PAGES = ["\n".join(LINES[1:8]), "\n".join(LINES[8:])]

BROKEN = [
  " = = = Head = = = \n He said : \" a ' b ' c \" ; ( the [ 2nd ] ) one . ",
  "the boys ' ball , 1 @.@ 5 m @-@ long ! Is it ? It 's at 20 ° N is N what",
  "{ a } {b} () ( ) '' \" \" '  unclosed ( bracket \n next\n\n = = x",
  '1 @,@ 000 @,@ 000 . . . , ; " quote " and " more "',
]


def test_marks_and_spaces_are_mended():
  assert wikitext.mend(PAGES[0]) == (
    " = Robert =\n\nRobert is an actor, born in 1,979.\n== Career ==\n\n=== Early ===\n"
    "He had a role. "
  )
  assert wikitext.mend("1 @.@ 5 m @-@ long ! Is it ? Ann 's ; on N days") == (
    "1.5 m-long! Is it? Ann's; on 1 days"
  )
  assert wikitext.mend("( the [ 2nd ] ) \" a \" ' b '") == "(the [2nd]) \"a\" 'b'"


@pytest.mark.parametrize("text", [*PAGES, *BROKEN, "\n".join(LINES)])
def test_mending_and_counting_are_those_of_the_harness(text):
  theirs = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
  assert wikitext.mend(text) == theirs.wikitext_detokenizer(dict(page=text))
  found = theirs.process_results(dict(page=text), (-1.0,))
  assert found["word_perplexity"] == (-1.0, held_out.count_words(text))
  assert found["byte_perplexity"] == (-1.0, len(text.encode()))


def real(pages):
  return [page for page in pages if page.strip()]


def test_pages_begin_with_their_titles():
  assert real(wikitext.pages(["\n".join(LINES)], is_table=False)) == PAGES


def test_tables_of_pages_and_of_lines_have_the_same_pages():
  assert list(wikitext.pages(PAGES, is_table=True)) == PAGES
  # As the library of data sets has them: with their ends, and nothing for blank lines.
  rows = [f"{line}\n" if line.strip() else "" for line in LINES]
  found = real(wikitext.pages(rows, is_table=True))
  assert [page.split() for page in found] == [page.split() for page in PAGES]


@pytest.mark.parametrize(("text", "is_table"), [(" = = No title = = \n", False), ("x\n", True)])
def test_text_without_pages_is_refused(text, is_table):
  with pytest.raises(
    errors.DataError, match=r"=wikitext finds no title of a page, a line like"
  ):
    list(wikitext.pages([text], is_table=is_table))
