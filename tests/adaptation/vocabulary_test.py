"""Rows of new pieces: which they are, and how they begin."""

import numpy as np
from absl.testing import absltest, parameterized

from bertjax.adaptation import vocabulary
from bertjax.data.tokenizers import (
  append_pieces,
  pad_vocabulary,
  reuse_unused,
  train_tokenizer,
)

_TEXTS = ["play played player run running jump jumping"] * 5
_WIDTH = 3


class NewRowsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.old = pad_vocabulary(
      train_tokenizer("wordpiece", _TEXTS, vocab_size=47), 50
    )  # with three [unusedN] rows
    rng = np.random.default_rng(0)
    cls.table = rng.normal(size=(50, _WIDTH)).astype(np.float32)
    cls.fresh = rng.normal(size=(56, _WIDTH)).astype(np.float32)

  def extended(self, tokenizer, start, num_new=56):
    new = vocabulary.new_rows(self.old, tokenizer, 50, num_new)
    return new, vocabulary.extended(
      self.table, self.fresh[:num_new], new, start
    )

  def spelled(self, text):
    return self.table[self.old.encode(text)].mean(0)

  def test_appended_pieces_and_padding_follow_the_old_rows(self):
    tokenizer = append_pieces(self.old, ["runner", "##run"])
    new, table = self.extended(tokenizer, "subword_mean")
    self.assertSequenceEqual(new.rows, range(50, 56))
    np.testing.assert_array_equal(table[:50], self.table)
    np.testing.assert_allclose(table[50], self.spelled("runner"), atol=1e-6)
    within = self.table[self.old.encode("prun")[1:]].mean(0)
    np.testing.assert_allclose(table[51], within, atol=1e-6)
    # Rows without a piece have no spelling.
    np.testing.assert_allclose(table[55], self.table.mean(0), atol=1e-6)

  @parameterized.parameters(
    # The longest first, as within a word; "run" begins one.
    ("##runing", ("##r", "##u", "##ning")),
    ("##ingning", ("##ing", "##ning")),
    # No piece goes on with a "j": as a word of its own.
    ("##jump", ("jump",)),
    ("##xyz", ()),
  )
  def test_what_continues_a_word_is_spelled_within_one(self, piece, pieces):
    tokenizer = append_pieces(self.old, [piece])
    new = vocabulary.new_rows(self.old, tokenizer, 50, 51)
    self.assertSequenceEqual(self.old.pieces(new.spelled[0]), pieces)

  def test_reused_rows_are_new_as_well(self):
    tokenizer = reuse_unused(self.old, ["playing"])
    new, table = self.extended(tokenizer, "subword_mean", num_new=50)
    (row,) = new.rows
    self.assertEqual(tokenizer.vocabulary[row], "playing")
    np.testing.assert_allclose(table[row], self.spelled("playing"), atol=1e-6)
    others = np.arange(50) != row
    np.testing.assert_array_equal(table[others], self.table[others])

  def test_each_way_to_begin(self):
    tokenizer = append_pieces(self.old, ["runner"])
    for start, want in (
      ("mean", self.table.mean(0)),
      ("random", self.fresh[50]),
      ("subword_mean", self.spelled("runner")),
    ):
      _, table = self.extended(tokenizer, start, num_new=51)
      np.testing.assert_allclose(table[50], want, atol=1e-6, err_msg=start)

  def test_a_byte_level_piece_is_spelled_by_its_text(self):
    old = train_tokenizer("byte_bpe", _TEXTS, vocab_size=270)
    tokenizer = append_pieces(old, ["playing"])
    size = old.vocab_size
    new = vocabulary.new_rows(old, tokenizer, size, size + 1)
    np.testing.assert_array_equal(new.spelled[0], old.encode("playing"))


if __name__ == "__main__":
  absltest.main()
