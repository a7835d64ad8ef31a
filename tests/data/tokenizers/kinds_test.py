"""Properties of every kind of tokenizer, and of byte, byte-BPE, unigram."""

import pathlib
import tempfile

import hypothesis
import hypothesis.strategies as st
import numpy as np
import sentencepiece
from absl.testing import absltest, parameterized

from bertjax.data import tokenizers
from bertjax.data.tokenizers import training

_CORPUS = [
  "The quick brown fox jumps over the lazy dog; the dog sleeps.",
  "Naïve cafés in 東京 sell coffee, tea and <s>tokens</s> for $3.50!",
  "Words, worlds, wordings and wordless words are words with endings.",
  "[SEP] is a separator and [MASK] a mask, says <mask> the text <pad>.",
] * 6
_OPTIONS = {"wordpiece": 140, "bpe": 140, "byte_bpe": 330, "unigram": 90}
_ODD = "Fresh [MASK] <mask> \ud800 Ünseen 東 👍\n\ttabs  and [SEP]</s> <s>"

_FOREIGN = (
  "", " \n\t ", "  a <url>  b<url>\n\nc ", "ﬁne ½ ① \u3000 e\u0301 é Ǆ",
  "東京は日本の首都です。한국어 \U00020000 中a文", "שָׁלוֹם العَرَبِيَّة हिन्दी ไทย",
  "I ❤️ you 👩‍👩‍👧 🇩🇪 👍🏽 !!", "x" * 250, "a\x00b\ufffdc\u200bd\xad▁e ▁▁",
)  # fmt: skip


def _train(kind, **options):
  if kind in _OPTIONS:
    options.setdefault("vocab_size", _OPTIONS[kind])
  return tokenizers.train_tokenizer(kind, _CORPUS, **options)


class EveryKindTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.trained = {k: _train(k, pad_to_multiple=8) for k in training.TRAINERS}

  @parameterized.parameters(*training.TRAINERS)
  def test_transformers_reads_the_standard_files_alike(self, kind):
    from transformers import AutoTokenizer

    ours = _train(kind, pad_to_multiple=8, user_tokens=["<url>"])
    with tempfile.TemporaryDirectory() as folder:
      for name, content in ours.files().items():
        (pathlib.Path(folder) / name).write_bytes(content)
      theirs = AutoTokenizer.from_pretrained(folder)
      again = tokenizers.load_tokenizer(folder)
    self.assertLen(theirs, ours.vocab_size)
    for text in [*_CORPUS[:4], *_FOREIGN]:
      ids = ours.encode(text, parse_special=True).tolist()
      self.assertEqual(theirs.encode(text, add_special_tokens=False), ids, text)
      self.assertEqual(again.encode(text, parse_special=True).tolist(), ids)
      self.assertEqual(again.encode(text).tolist(), ours.encode(text).tolist())

  @parameterized.parameters(*training.TRAINERS)
  def test_saved_and_loaded_is_the_same(self, kind):
    tokenizer = self.trained[kind]
    with tempfile.TemporaryDirectory() as root:
      folder = pathlib.Path(root) / "vocab"
      tokenizer.save(folder)
      tokenizer.save(folder)  # replaces itself
      self.assertEqual(
        [p.name for p in pathlib.Path(root).iterdir()], ["vocab"]
      )
      loaded = tokenizers.load_tokenizer(folder)
      before = {p.name: p.read_bytes() for p in folder.iterdir()}
      loaded.save(folder)
      after = {p.name: p.read_bytes() for p in folder.iterdir()}
    self.assertEqual(before, after)
    self.assertEqual(loaded.kind, kind)
    self.assertEqual(loaded.vocabulary, tokenizer.vocabulary)
    self.assertEqual(loaded.fingerprint(), tokenizer.fingerprint())
    self.assertEqual(loaded.training, tokenizer.training)
    np.testing.assert_array_equal(loaded.encode(_ODD), tokenizer.encode(_ODD))
    np.testing.assert_array_equal(
      loaded.continues_word, tokenizer.continues_word
    )

  @parameterized.parameters(*training.TRAINERS)
  def test_text_never_spells_a_special_id(self, kind):
    tokenizer = self.trained[kind]
    spelled = [" ".join(tokenizer.specials.names()), _ODD, *_CORPUS]
    special = set(tokenizer.special_ids.tolist()) - {tokenizer.unk_id}
    for ids in tokenizer.encode_batch(spelled):
      self.assertEqual(ids.dtype, np.int32)
      self.assertEmpty(special & set(ids.tolist()))

  @parameterized.parameters(*training.TRAINERS)
  def test_prompts_may_hold_special_tokens(self, kind):
    tokenizer = self.trained[kind]
    s = tokenizer.specials
    ids = tokenizer.encode(
      f"{s.cls}fox {s.mask} dog{s.sep}", parse_special=True
    )
    special = [i for i in ids if i in tokenizer.special_ids]
    self.assertEqual(
      special, [tokenizer.cls_id, tokenizer.mask_id, tokenizer.sep_id]
    )
    self.assertIn("fox", tokenizer.decode(ids))
    self.assertNotIn(s.mask, tokenizer.decode(ids))
    self.assertIn(s.mask, tokenizer.decode(ids, keep_special=True))

  @parameterized.parameters(*training.TRAINERS)
  def test_a_batch_equals_its_texts_one_by_one(self, kind):
    tokenizer = self.trained[kind]
    texts = ["", *_CORPUS[:4], _ODD, " "]
    batch = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
      np.testing.assert_array_equal(ids, tokenizer.encode(text))
    self.assertEmpty(tokenizer.encode_batch([]))
    self.assertLen(batch[0], 0)

  @parameterized.parameters(*training.TRAINERS)
  def test_padding_rows_come_last_and_are_never_used(self, kind):
    tokenizer, plain = self.trained[kind], _train(kind)
    self.assertEqual(tokenizer.vocab_size, -(-plain.vocab_size // 8) * 8)
    rows = tokenizer.vocabulary[plain.vocab_size :]
    self.assertEqual(rows, tuple(f"[unused{i}]" for i in range(len(rows))))
    np.testing.assert_array_equal(tokenizer.encode(_ODD), plain.encode(_ODD))

  @parameterized.parameters(*training.TRAINERS)
  def test_new_pieces_get_rows_and_old_ids_stay(self, kind):
    tokenizer = _train(kind, pad_to_multiple=400)
    size = tokenizer.vocab_size
    old = tokenizer.encode(_CORPUS[0])
    longer = tokenizers.append_pieces(tokenizer, ["zyzzyva"])
    reused = tokenizers.reuse_unused(tokenizer, ["zyzzyva"])
    row = tokenizer.piece_id("[unused0]")
    for new, expected in ((longer, size), (reused, row)):
      self.assertEqual(new.piece_id("zyzzyva"), expected)
      self.assertIn(expected, new.encode("a zyzzyva dog").tolist())
      self.assertIn("zyzzyva", new.decode(new.encode("a zyzzyva dog")))
      np.testing.assert_array_equal(new.encode(_CORPUS[0]), old)
      self.assertNotEqual(new.fingerprint(), tokenizer.fingerprint())
      with tempfile.TemporaryDirectory() as root:
        new.save(root)
        loaded = tokenizers.load_tokenizer(root)
      np.testing.assert_array_equal(
        loaded.encode("a zyzzyva dog"), new.encode("a zyzzyva dog")
      )
    self.assertEqual((longer.vocab_size, reused.vocab_size), (size + 1, size))

  @parameterized.parameters(*training.TRAINERS)
  def test_user_tokens_stay_whole_and_are_no_specials(self, kind):
    tokenizer = _train(kind, user_tokens=("<URL>",))
    ids = tokenizer.encode("see <URL>, dog").tolist()
    row = tokenizer.piece_id("<URL>")
    self.assertEqual(ids.count(row), 1)
    self.assertNotIn(row, tokenizer.special_ids)
    self.assertFalse(tokenizer.continues_word[row])
    self.assertIn("<URL>", tokenizer.decode(ids))

  def test_a_piece_that_no_word_has_is_found_by_its_spelling(self):
    tokenizer = _train("wordpiece")
    new = ["COVID-19", "Übermut", "new york", "zyx"]
    longer = tokenizers.append_pieces(tokenizer, new)
    size = tokenizer.vocab_size
    self.assertEqual(
      longer.encode(" ".join(new)).tolist(), list(range(size, size + 4))
    )
    self.assertEqual(longer.user_tokens, tuple(new[:3]))
    with self.assertRaisesRegex(ValueError, "'##É' continues no word"):
      tokenizers.append_pieces(tokenizer, ["##É"])

  def test_too_many_or_known_pieces_are_refused(self):
    tokenizer = _train("wordpiece")
    with self.assertRaisesRegex(ValueError, "do not fit into the 0"):
      tokenizers.reuse_unused(tokenizer, ["new"])
    with self.assertRaisesRegex(ValueError, r"'\[PAD\]' is in the vocabulary"):
      tokenizers.append_pieces(tokenizer, ["[PAD]"])


class ByteTest(absltest.TestCase):
  @hypothesis.settings(deadline=None)
  @hypothesis.given(st.text())
  def test_decode_inverts_encode(self, text):
    tokenizer = tokenizers.train_tokenizer("bytes", [])
    ids = tokenizer.encode(text)
    self.assertEqual(tokenizer.decode(ids), text)
    self.assertEqual((ids - 5).tolist(), list(text.encode()))

  def test_words_begin_at_whitespace(self):
    tokenizer = tokenizers.train_tokenizer("bytes", [])
    starts = ~tokenizer.continues_word[tokenizer.encode("ab cd\ne")]
    self.assertEqual(starts.tolist(), [0, 0, 1, 0, 0, 1, 0])


class ByteBPETest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.ours = _train("byte_bpe")

  def test_specials_have_robertas_ids(self):
    self.assertEqual(
      self.ours.vocabulary[:5], ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    )

  @hypothesis.settings(deadline=None)
  @hypothesis.given(st.text(st.characters(codec="utf-8")))
  def test_decode_inverts_encode(self, text):
    self.assertEqual(self.ours.decode(self.ours.encode(text)), text)

  @parameterized.named_parameters(
    ("words", "The lazy dog's words,  and\n\nworlds 123"),
    ("mask", "The lazy <mask> sleeps <mask>."),
    ("unicode", "東京 naïve 👍🏽 \u00a0x"),
  )
  def test_ids_equal_transformers_roberta(self, text):
    from transformers import AddedToken, RobertaTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
      for name in ("vocab.json", "merges.txt"):
        (pathlib.Path(folder) / name).write_bytes(self.ours.files()[name])
      loaded = tokenizers.load_tokenizer(folder)
      # As in RoBERTa's published files, which the class alone does not know.
      mask = AddedToken("<mask>", lstrip=True, special=True)
      oracle = RobertaTokenizerFast.from_pretrained(folder, mask_token=mask)
    expected = oracle(text, add_special_tokens=False)["input_ids"]
    for tokenizer in (self.ours, loaded):
      ids = tokenizer.encode(text, parse_special=True)
      self.assertEqual(ids.tolist(), expected)

  def test_a_leading_space_starts_a_word(self):
    ids = self.ours.encode("words with\nwords")
    pieces = self.ours.pieces(ids)
    self.assertEqual(
      self.ours.continues_word[ids].tolist(),
      [p[0] not in "ĠĊ" for p in pieces],
    )


class UnigramTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.ours = _train("unigram")
    cls.oracle = sentencepiece.SentencePieceProcessor(
      model_proto=cls.ours.files()["spiece.model"]
    )

  @parameterized.parameters(*_CORPUS[:4], "", "unseen ﬁgures ① Ω")
  def test_ids_and_text_equal_sentencepiece(self, text):
    ids = self.ours.encode(text)
    self.assertEqual(ids.tolist(), self.oracle.encode(text))
    known = [i for i in ids.tolist() if i != self.ours.unk_id]
    self.assertEqual(self.ours.decode(known), self.oracle.decode(known))

  def test_a_read_model_is_neither_spelt_nor_moved_by_its_extra_rows(self):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "tokenizer.json"
      path.write_bytes(self.ours.files()["tokenizer.json"])
      read = tokenizers.load_tokenizer(folder)
    text = "[MASK] a [SEP] 龍x龍 [unused0]"
    ids = read.encode(text).tolist()
    self.assertEqual(ids, self.ours.encode(text).tolist())
    self.assertNotIn(read.mask_id, ids)
    self.assertNotIn(read.sep_id, ids)
    padded = tokenizers.pad_vocabulary(read, 64)
    self.assertGreater(padded.vocab_size, read.vocab_size)
    self.assertEqual(padded.encode(text).tolist(), ids)

  def test_plain_model_file_gets_a_mask_row_after_its_last(self):
    specials = tokenizers.Specials(mask="<other_m>")
    source = training.train_unigram(_CORPUS, 80, specials)
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "spm.model"
      path.write_bytes(source.files()["spiece.model"])
      loaded = tokenizers.load_tokenizer(folder)
    self.assertEqual(loaded.mask_id, source.vocab_size)
    ids = loaded.encode("The [MASK] dog", parse_special=True).tolist()
    parts = [source.encode(t).tolist() for t in ("The ", " dog")]
    self.assertEqual(ids, [*parts[0], source.vocab_size, *parts[1]])

  def test_fairseq_layout_is_that_of_xlm_roberta(self):
    specials = tokenizers.Specials(
        pad="<none>", unk="<unk>", cls="<s>", sep="</s>", mask="<unused_m>",
        order=("unk", "cls", "sep", "pad", "mask"),
    )  # fmt: skip
    source = training.train_unigram(_CORPUS, 80, specials)
    content = source.files()["spiece.model"]
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "sentencepiece.bpe.model"
      path.write_bytes(content)
      loaded = tokenizers.load_tokenizer(folder)
      saved = pathlib.Path(folder) / "ours"
      loaded.save(saved)
      again = tokenizers.load_tokenizer(saved)
    raw = sentencepiece.SentencePieceProcessor(model_proto=content)
    expected = [3 if i == 0 else i + 1 for i in raw.encode("The dog 龍")]
    self.assertEqual(loaded.encode("The dog 龍").tolist(), expected)
    self.assertEqual(again.encode("The dog 龍").tolist(), expected)
    self.assertEqual(loaded.vocabulary[:4], ("<s>", "<pad>", "</s>", "<unk>"))
    self.assertEqual(loaded.mask_id, raw.get_piece_size() + 1)


if __name__ == "__main__":
  absltest.main()
