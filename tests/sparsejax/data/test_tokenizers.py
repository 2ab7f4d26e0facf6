"""Text survives the way to ids and back, and every id knows the bytes it stands for."""

import json
import pathlib

import hypothesis
from hypothesis import strategies
import numpy as np
import pytest
import tokenizers as hf

from sparsejax import errors
from sparsejax.data import tokenizers

TEXT = "def f(x):\n    return x + 12345\n\n# für  Ünïcode 漢字 🙂\r\n\tindented; tabs\n"


@pytest.fixture(scope="session")
def bpe():
  return tokenizers.train_bpe([TEXT] * 20, 400)


def word_level(vocabulary, **changes):
  """A tokenizer.json of whole words, which is no byte-level vocabulary."""
  tokenizer = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token=min(vocabulary)))
  tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  return json.dumps(json.loads(tokenizer.to_str()) | changes)


def content(tokenizer, directory):
  tokenizer.save(directory)
  return (pathlib.Path(directory) / "tokenizer.json").read_text(encoding="utf-8")


@hypothesis.settings(deadline=None)
@hypothesis.given(strategies.text())
def test_bytes_are_the_utf8_of_the_text(text):
  tokenizer = tokenizers.ByteTokenizer()
  assert bytes(tokenizer.encode(text)) == text.encode("utf-8")
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids_of_the_byte_tokenizer_lie_beyond_the_bytes_and_vanish():
  tokenizer = tokenizers.ByteTokenizer()
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (256, 257, 258)
  assert tokenizer.decode(np.array([256, 104, 105, 257])) == "hi"
  assert tokenizer.decode([0xC3, 257]) == "\ufffd"
  assert tokenizer.bytes_per_id().tolist() == [1] * 256 + [0, 0]


@hypothesis.settings(deadline=None)
@hypothesis.given(strategies.text())
def test_a_trained_tokenizer_gives_back_any_text(bpe, text):
  ids = bpe.encode(text)
  assert bpe.decode(ids) == text
  assert not {bpe.bos_id, bpe.eos_id} & set(ids)
  assert max(ids, default=0) < bpe.vocab_size


@hypothesis.settings(deadline=None)
@hypothesis.given(strategies.text())
def test_bytes_per_id_add_up_to_the_text(bpe, text):
  assert bpe.bytes_per_id()[bpe.encode(text)].sum() == len(text.encode("utf-8"))


def test_training_merges_what_repeats():
  tokenizer = tokenizers.train_bpe(["return value\n"] * 50, 290)
  assert len(tokenizer.encode("return value\n")) < 5
  assert tokenizer.vocab_size <= 290
  assert (tokenizer.bos, tokenizer.eos) == ("<|begin_of_text|>", "<|end_of_text|>")


def test_training_keeps_numbers_in_threes_and_lines_apart():
  """Even what always stands together is not merged across these borders."""
  tokenizer = tokenizers.train_bpe(["123456789 return\nreturn\n"] * 50, 600)
  pieces = [tokenizer.decode([i]) for i in tokenizer.encode("123456 return\nreturn\n")]
  assert pieces == ["123", "456", " return", "\n", "return", "\n"]


def test_text_that_spells_a_special_token_is_text(bpe):
  """A document about tokenizers must not end itself."""
  text = f"a{bpe.eos}b{bpe.bos}c"
  ids = bpe.encode(text)
  assert not {bpe.bos_id, bpe.eos_id} & set(ids)
  assert bpe.decode(ids) == text


def test_special_tokens_vanish_in_decoding(bpe):
  assert bpe.decode([bpe.bos_id, *bpe.encode("hi"), bpe.eos_id]) == "hi"
  assert bpe.bytes_per_id()[[bpe.bos_id, bpe.eos_id]].tolist() == [0, 0]


def test_too_small_a_vocabulary_is_refused():
  with pytest.raises(errors.DataError, match=r"train:257 is too small.* 258"):
    tokenizers.train_bpe([TEXT], 257)
  assert tokenizers.train_bpe([TEXT], 258).vocab_size == 258


def test_the_size_of_a_vocabulary_with_holes_is_its_largest_id():
  tokenizer = tokenizers.JsonTokenizer(word_level({"a": 0, "b": 3, "</s>": 11}))
  assert tokenizer.vocab_size == 12
  assert tokenizer.encode("b a") == [3, 0]


def test_padding_truncation_and_templates_of_the_file_are_not_applied():
  tokenizer = hf.Tokenizer(hf.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
  tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  tokenizer.enable_truncation(2)
  tokenizer.enable_padding(length=8)
  tokenizer.post_processor = hf.processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 1)]
  )
  assert tokenizers.JsonTokenizer(tokenizer.to_str()).encode("a a a") == [0, 0, 0]


@pytest.mark.parametrize(
  ("vocabulary", "bos", "eos"),
  [
    (["<|begin_of_text|>", "<|end_of_text|>"], "<|begin_of_text|>", "<|end_of_text|>"),
    (["<s>", "</s>"], "<s>", "</s>"),
    (["<bos>", "<eos>"], "<bos>", "<eos>"),
    (["[BOS]", "[EOS]"], "[BOS]", "[EOS]"),
    (["<|endoftext|>"], None, "<|endoftext|>"),
    (["</s>", "<|endoftext|>", "<|im_end|>"], None, "<|endoftext|>"),
  ],
)
def test_document_marks_are_found_by_their_usual_names(vocabulary, bos, eos):
  numbered = {name: number for number, name in enumerate(["word", *vocabulary])}
  tokenizer = tokenizers.JsonTokenizer(word_level(numbered))
  assert (tokenizer.bos, tokenizer.eos) == (bos, eos)
  assert (tokenizer.bos_id, tokenizer.eos_id) == (numbered.get(bos), numbered[eos])


def test_named_document_marks_win_over_the_usual_ones():
  text = word_level({"</s>": 0, "<s>": 1, "open": 2, "close": 3})
  tokenizer = tokenizers.JsonTokenizer(text, bos="open", eos="close")
  assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 3)


@pytest.mark.parametrize("role", ["bos", "eos"])
def test_an_unknown_document_mark_names_its_flag(role):
  with pytest.raises(errors.DataError, match=f"--{role}='<none>' is not a token"):
    tokenizers.JsonTokenizer(word_level({"a": 0, "</s>": 1}), **{role: "<none>"})


def test_a_tokenizer_without_an_end_asks_for_one():
  with pytest.raises(errors.DataError, match="name its own with --eos"):
    tokenizers.JsonTokenizer(word_level({"a": 0, "b": 1}))


@pytest.mark.parametrize(
  "text",
  ["", "[]", "{}", '{"model": 3}', "not json", hf.Tokenizer(hf.models.BPE()).to_str()],
  ids=["nothing", "list", "object", "model", "words", "no_vocabulary"],
)
def test_what_is_no_tokenizer_is_refused(text):
  with pytest.raises(errors.DataError, match=r"tokenizer"):
    tokenizers.JsonTokenizer(text)


def test_the_fingerprint_tells_content_and_marks_apart():
  text = word_level({"a": 0, "b": 1, "<s>": 2, "</s>": 3})
  other = word_level({"b": 0, "a": 1, "<s>": 2, "</s>": 3})
  fingerprints = [
    tokenizers.JsonTokenizer(text).fingerprint,
    tokenizers.JsonTokenizer(other).fingerprint,
    tokenizers.JsonTokenizer(text, eos="a").fingerprint,
    tokenizers.JsonTokenizer(text, bos="a").fingerprint,
    tokenizers.ByteTokenizer().fingerprint,
  ]
  assert len(set(fingerprints)) == len(fingerprints)
  assert tokenizers.JsonTokenizer(text).fingerprint == fingerprints[0]
  assert tokenizers.JsonTokenizer(text, bos="<s>", eos="</s>").fingerprint == fingerprints[0]


def test_bytes_per_id_are_unknown_where_a_token_is_not_its_bytes():
  assert tokenizers.JsonTokenizer(word_level({"a": 0, "</s>": 1})).bytes_per_id() is None


def test_a_byte_level_decoder_is_found_inside_a_sequence(bpe, tmp_path):
  spec = json.loads(content(bpe, tmp_path))
  spec["decoder"] = dict(type="Sequence", decoders=[dict(type="Fuse"), spec["decoder"]])
  tokenizer = tokenizers.JsonTokenizer(json.dumps(spec))
  np.testing.assert_array_equal(tokenizer.bytes_per_id(), bpe.bytes_per_id())


def test_added_tokens_that_are_text_count_their_bytes(bpe, tmp_path):
  """Some vocabularies add runs of spaces as tokens of their own; they are text."""
  spec = json.loads(content(bpe, tmp_path))
  flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
  added = dict(id=bpe.vocab_size, content="§§", **flags)
  spec["added_tokens"].append(added)
  tokenizer = tokenizers.JsonTokenizer(json.dumps(spec))
  ids = tokenizer.encode("a§§b")
  assert bpe.vocab_size in ids
  assert tokenizer.bytes_per_id()[ids].sum() == len("a§§b".encode())


def test_load_reads_a_file_or_its_folder(bpe, tmp_path):
  bpe.save(tmp_path)
  for name in (tmp_path, tmp_path / "tokenizer.json"):
    loaded = tokenizers.load(str(name))
    assert loaded.fingerprint == bpe.fingerprint
    assert loaded.encode(TEXT) == bpe.encode(TEXT)
  assert isinstance(tokenizers.load("byte"), tokenizers.ByteTokenizer)


def test_load_refuses_what_is_missing(tmp_path):
  for name in (tmp_path / "none.json", tmp_path):
    with pytest.raises(errors.DataError, match=r"no tokenizer .*give 'byte'.*train:SIZE"):
      tokenizers.load(str(name))


def test_load_refuses_too_large_a_file(bpe, tmp_path, monkeypatch):
  bpe.save(tmp_path)
  size = (tmp_path / "tokenizer.json").stat().st_size
  monkeypatch.setattr(tokenizers, "MAX_TOKENIZER_BYTES", size - 1)
  with pytest.raises(errors.DataError, match=f"has {size} bytes.* at most {size - 1}"):
    tokenizers.load(str(tmp_path))
  monkeypatch.setattr(tokenizers, "MAX_TOKENIZER_BYTES", size)
  assert tokenizers.load(str(tmp_path)).fingerprint == bpe.fingerprint


def test_load_refuses_a_file_that_is_not_utf8(tmp_path):
  (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{")
  with pytest.raises(errors.DataError, match=r"tokenizer.json is not UTF-8"):
    tokenizers.load(str(tmp_path))
