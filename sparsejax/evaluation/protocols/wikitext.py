"""WikiText (arXiv:1609.07843) as lm-evaluation-harness scores it: by pages, spaces mended.

The harness reads its pages from `EleutherAI/wikitext_document_level`. Here they may come from
such a table, from a table of lines as `Salesforce/wikitext` is, or from the text itself.
"""

from collections.abc import Iterable, Iterator
import re

from sparsejax import errors

# In this order: later ones see what earlier ones have left.
_TOKENS = (("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))
_ENDS = ":;.!?,"
_PAIRS = ("()", "[]", "{}", '""', "''")
_REST = (
  ("= = = =", "===="),
  ("= = =", "==="),
  ("= =", "=="),
  (" ° ", "°"),
  (" \n", "\n"),
  ("\n ", "\n"),
  # Penn Treebank's sign for a number.
  (" N ", " 1 "),
  (" 's", "'s"),
)


def mend(page: str) -> str:
  """A page without the spaces and marks that WikiText's tokenizer put into it.

  As `wikitext_detokenizer` of lm-evaluation-harness, version 2 of its task, but for a rule
  there that would write a pattern into the text (of quotes and digits between slashes).
  """
  for old, new in (*_TOKENS, *((f" {end} ", f"{end} ") for end in _ENDS)):
    page = page.replace(old, new)
  for opening, closing in _PAIRS:
    inside = rf"{re.escape(opening)}\s*([^{re.escape(closing)}]*?)\s*{re.escape(closing)}"
    page = re.sub(inside, lambda found, o=opening, c=closing: o + found[1] + c, page)
  for old, new in _REST:
    page = page.replace(old, new)
  return page


def pages(documents: Iterable[str], *, is_table: bool) -> Iterator[str]:
  """The pages of WikiText, each from its title (` = Title = `) on.

  Args:
    documents: whole files, or rows of a table.
    is_table: whether they are rows. Rows of more than a line are pages already; if all rows
      are lines, they are put together.

  Raises:
    DataError: text without titles.
  """
  documents = list(documents)
  if is_table:
    if any("\n" in text.rstrip("\n") for text in documents):
      yield from documents
      return
    documents = ["\n".join(text.removesuffix("\n") for text in documents)]
  for text in documents:
    if not any(map(_is_title, text.split("\n"))):
      raise errors.DataError(
        "--protocol=wikitext finds no title of a page, a line like ' = Title = '; name "
        "WikiText as it is distributed, or take --protocol=documents."
      )
    yield from _cut(text)


def _cut(text: str) -> Iterator[str]:
  page: list[str] = []
  for line in text.split("\n"):
    if _is_title(line):
      yield "\n".join(page)
      page = []
    page.append(line)
  yield "\n".join(page)


def _is_title(line: str) -> bool:
  # Headings below the title have more signs: " = = Early life = = ".
  line = line.strip()
  is_heading = line.startswith("= ") and line.endswith(" =") and len(line) > 4
  return is_heading and not line.startswith("= =")
