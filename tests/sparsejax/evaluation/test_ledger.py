"""What was measured is found again after any end of the process; nothing else is."""

import signal
import subprocess
import sys
import time

import pytest

from sparsejax import errors
from sparsejax.evaluation import ledger


def fill(path, count, first=0):
  with ledger.Ledger(path, commit="abc", device="1 x cpu") as book:
    for number in range(first, first + count):
      book.add(dict(number=number, what="x"), [number, 0.1 * number, None])


def values(path, count):
  with ledger.Ledger(path) as book:
    return [
      None if book.find(key) is None else book.take(key)
      for key in (dict(number=number, what="x") for number in range(count))
    ]


def test_values_come_back_as_they_were(tmp_path):
  fill(tmp_path / "deep" / "out", 3)
  with ledger.Ledger(tmp_path / "deep" / "out", commit="new") as book:
    # The order of a key's entries is not part of it.
    assert book.take(dict(what="x", number=2)) == [2, 0.2, None]
    assert book.find(dict(number=2)) is None
    assert book.find(dict(number=2.5, what="x")) is None
    book.add(dict(number=2.5, what="x"), "new")
    assert (book.num_taken, book.num_measured, book.made_by) == (1, 1, {("abc", "1 x cpu")})
  with ledger.Ledger(tmp_path / "deep" / "out") as book:
    assert book.take(dict(number=2.5, what="x")) == "new"


@pytest.mark.parametrize("cut", [1, 2, 30, 100])
def test_a_torn_last_line_is_left_out_and_its_place_written_anew(tmp_path, cut):
  fill(tmp_path, 3)
  path = tmp_path / ledger.NAME
  path.write_bytes(path.read_bytes()[:-cut])
  assert values(tmp_path, 3) == [[0, 0.0, None], [1, 0.1, None], None]
  fill(tmp_path, 1, first=2)
  assert values(tmp_path, 3) == [[0, 0.0, None], [1, 0.1, None], [2, 0.2, None]]
  assert len(path.read_text().splitlines()) == 3


def test_a_line_that_is_damaged_in_the_midst_is_named(tmp_path):
  fill(tmp_path, 3)
  path = tmp_path / ledger.NAME
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join([lines[0], lines[1].replace('"key"', '"kye"'), lines[2]]))
  with pytest.raises(errors.DataError, match=r"line 2 of .*cells\.jsonl is damaged.*--fresh"):
    ledger.Ledger(tmp_path)
  with ledger.Ledger(tmp_path, is_fresh=True) as book:
    assert book.find(dict(number=0, what="x")) is None
    book.add(dict(number=1, what="x"), "new")
    book.add(dict(number=2, what="x"), "newer")
  assert values(tmp_path, 3) == [None, "new", "newer"]


def test_what_is_there_is_forgotten_when_there_is_something_new(tmp_path):
  fill(tmp_path, 3)
  with ledger.Ledger(tmp_path, is_fresh=True) as book:
    assert book.find(dict(number=0, what="x")) is None
  # As where another of several directories is in use, or parameters are damaged.
  assert values(tmp_path, 3) == [[n, 0.1 * n, None] for n in range(3)]


def test_a_value_counts_only_beside_its_files(tmp_path):
  key, files = dict(number=1), ("deep/lists",)
  with ledger.Ledger(tmp_path) as book:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "lists").write_text("as it was")
    book.add(key, 1, files)
    assert book.find(key, files) is not None
  (tmp_path / "deep" / "lists").write_text("of another request")
  with ledger.Ledger(tmp_path) as book:
    assert book.find(key, files) is None
  (tmp_path / "deep" / "lists").unlink()
  with ledger.Ledger(tmp_path) as book:
    assert book.find(key, files) is None


def test_two_cannot_write_to_one_place(tmp_path):
  with ledger.Ledger(tmp_path), pytest.raises(errors.UserError, match="another evaluation is"):
    ledger.Ledger(tmp_path)
  assert values(tmp_path, 1) == [None]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match=r"cannot write to .*file/out: .*another --out"):
    ledger.Ledger(tmp_path / "file" / "out")


def test_a_killed_process_leaves_all_that_it_finished(tmp_path):
  program = (
    "import pathlib, sys\n"
    "from sparsejax.evaluation import ledger\n"
    "with ledger.Ledger(pathlib.Path(sys.argv[1]), commit='abc') as book:\n"
    "  number = 0\n"
    "  while True:\n"
    "    book.add(dict(number=number, what='x'), [number, 0.1 * number, None])\n"
    "    number += 1\n"
  )
  process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
  path = tmp_path / ledger.NAME
  deadline = time.monotonic() + 60
  while not path.exists() or path.read_bytes().count(b"\n") < 20:
    assert process.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.005)
  process.kill()
  assert process.wait() == -signal.SIGKILL
  count = path.read_bytes().count(b"\n")
  assert values(tmp_path, count) == [[n, 0.1 * n, None] for n in range(count)]
