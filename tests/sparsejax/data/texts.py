"""Texts to prepare, and what became of them."""

from sparsejax.data import prepare, shards

HALF = prepare.Settings(validation_fraction=0.5)
# Long ones, short ones, empty ones, and some that are there twice.
TEXTS = [f"document {n % 35}\n" * (1 + n % 7) for n in range(40)] + ["", " \n\t"]


def contents(folder):
  """Every file of a folder and what is in it."""
  paths = [path for path in folder.rglob("*") if path.is_file()]
  return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def texts_of(directory, split):
  """The documents of a split, decoded, in the order on disk."""
  manifest = shards.load(directory)
  tokenizer = shards.load_tokenizer(directory, manifest)
  if not manifest.splits[split]:
    return []
  records = shards.Records(directory, manifest, split)
  ids = [[] for _ in range(records.document_R[-1] + 1)]
  for record, document in enumerate(records.document_R):
    ids[document] += records[record].tolist()
  for document in ids:
    assert (document[0], document[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
  return [tokenizer.decode(document) for document in ids]


def all_texts():
  return [*(t for n in range(4) for t in TEXTS[n::4]), "def f(x):\n  return x\n", "a table",
          "of", "three rows"]  # fmt: skip
