"""How much of what is written after a question is right."""

import numpy as np
import pytest

from sparsejax.data import tokenizers
from sparsejax.evaluation.needles import answers, questions

BYTES = tokenizers.ByteTokenizer()


def text_question(*right, pattern=r"\d+"):
  ids = np.array(BYTES.encode(f" {', '.join(right)}."), np.int32)
  return questions.Question("single", ids[:0], ids, right, pattern, (), ())


@pytest.mark.parametrize(
  ("right", "written", "score"),
  [
    (["12345"], " 12345.", 1.0),
    (["12345"], " It is 12345, no doubt", 1.0),
    (["12345"], " 123456", 0.0),
    (["12345"], " 99999 or 12345", 0.0),
    (["12345"], "", 0.0),
    (["111", "222"], " 222 and 111", 1.0),
    (["111", "222"], " 333, 111, 222", 0.5),
  ],
)
def test_answers_are_found_in_what_is_written(right, written, score):
  question = text_question(*right)
  assert answers.share_found(question, BYTES.encode(written), BYTES.decode) == score


def test_ids_are_compared_one_by_one():
  ids = np.array([7, 8], np.int32)
  question = questions.Question("mqar", ids[:0], ids, (), "", (), ())
  for given, score in (([7, 8, 9], 1.0), ([7, 9], 0.5), ([7], 0.5), ([], 0.0), ([8, 7], 0.0)):
    assert answers.share_found(question, given, BYTES.decode) == score
