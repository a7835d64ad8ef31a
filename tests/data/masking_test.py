"""Masking: rates, shares, what is never chosen, independence of batching."""

import sys
from pathlib import Path

import numpy as np
from absl.testing import absltest, parameterized
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent))
import fakes

from bertjax.data import masking

_TOKENIZER = fakes.FakeTokenizer(5000)
_VOCABULARY = masking.Vocabulary.of(_TOKENIZER)
_UNITS = [(u, u) for u in masking.UNITS]


def make_rows(num_rows=1600, seq_len=128, seed=0):
  """Rows of two segments with random padding."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(5, 5000, (num_rows, seq_len)).astype(np.int32)
  segments = np.ones((num_rows, seq_len), np.int32)
  segments[:, 50:] = 2
  tokens[:, [0, 50]], tokens[:, 49] = _TOKENIZER.cls_id, _TOKENIZER.sep_id
  for row, end in enumerate(rng.integers(60, seq_len + 1, num_rows)):
    tokens[row, end - 1] = _TOKENIZER.sep_id
    tokens[row, end:], segments[row, end:] = _TOKENIZER.pad_id, 0
  return tokens, segments


def mask(tokens, segments, epoch=0, first=0, seed=3, **options):
  return masking.mask_rows(
    tokens,
    segments,
    masking=masking.Masking(**options),
    vocabulary=_VOCABULARY,
    seed=seed,
    epochs=np.full(len(tokens), epoch),
    indices=first + np.arange(len(tokens)),
  )


class MaskingTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tokens, cls.segments = make_rows()
    cls.masked = {
      unit: mask(cls.tokens, cls.segments, unit=unit) for unit in masking.UNITS
    }

  def chosen(self, unit):
    batch = self.masked[unit]
    rows, slots = np.nonzero(batch["labels"] >= 0)
    chosen = np.zeros(self.tokens.shape, bool)
    chosen[rows, batch["masked_positions"][rows, slots]] = True
    return chosen

  @parameterized.named_parameters(_UNITS)
  def test_rate_and_shares_over_1e5_tokens(self, unit):
    real = self.segments > 0
    self.assertGreater(real.sum(), 1e5)
    chosen = self.chosen(unit)
    # The sheet's tolerance; rounding to whole tokens per row is inside it.
    self.assertAlmostEqual(chosen.sum() / real.sum(), 0.15, delta=0.005)
    tokens = self.masked[unit]["tokens"]
    masks = (tokens[chosen] == _TOKENIZER.mask_id).mean()
    kept = (tokens[chosen] == self.tokens[chosen]).mean()
    # 22,000 draws of p = 0.8: standard deviation 0.0027, of 0.1: 0.002; the
    # seed is fixed, three deviations are allowed.
    self.assertAlmostEqual(masks, 0.8, delta=0.0081)
    self.assertAlmostEqual(kept, 0.1, delta=0.006)
    self.assertAlmostEqual(1 - masks - kept, 0.1, delta=0.006)

  def test_shares_within_half_a_percent_over_many_masks(self):
    masks = kept = total = 0
    for epoch in range(5):
      batch = mask(self.tokens, self.segments, epoch=epoch)
      used = batch["labels"] >= 0
      at = np.take_along_axis(batch["tokens"], batch["masked_positions"], 1)
      masks += (at[used] == _TOKENIZER.mask_id).sum()
      kept += (at == batch["labels"])[used].sum()
      total += used.sum()
    self.assertAlmostEqual(masks / total, 0.8, delta=0.005)
    self.assertAlmostEqual(kept / total, 0.1, delta=0.005)

  @parameterized.named_parameters(_UNITS)
  def test_only_ordinary_tokens_are_chosen_and_nothing_else_changes(self, unit):
    chosen, batch = self.chosen(unit), self.masked[unit]
    self.assertFalse((chosen & (self.segments == 0)).any())
    self.assertFalse(np.isin(self.tokens[chosen], _TOKENIZER.special_ids).any())
    np.testing.assert_array_equal(
      batch["tokens"][~chosen], self.tokens[~chosen]
    )
    np.testing.assert_array_equal(
      batch["labels"][batch["labels"] >= 0], self.tokens[chosen]
    )

  @parameterized.named_parameters(_UNITS[1:])
  def test_words_are_never_split(self, unit):
    chosen = self.chosen(unit)
    ordinary = ~np.isin(self.tokens, _TOKENIZER.special_ids)
    joins = _TOKENIZER.continues_word[self.tokens] & ordinary
    joins[:, 1:] &= ordinary[:, :-1]
    rows, places = np.nonzero(joins[:, 1:])
    self.assertGreater(len(rows), 1000)
    np.testing.assert_array_equal(
      chosen[rows, places + 1], chosen[rows, places]
    )

  @parameterized.named_parameters(("token", "token"), ("word", "whole_word"))
  def test_every_position_is_as_likely(self, unit):
    tokens, segments = self.tokens.copy(), np.ones_like(self.segments)
    tokens[:] = 7  # one ordinary word of one piece, 128 of them
    batch = mask(tokens, segments, unit=unit)
    counts = np.bincount(batch["masked_positions"].ravel(), minlength=128)
    # A wrong hash shows as p < 1e-10; the seed is fixed.
    self.assertGreater(stats.chisquare(counts).pvalue, 1e-3)

  @parameterized.named_parameters(
    ("span", masking.geometric_lengths(), 3.797),
    ("ngram", masking.inverse_lengths(), 3 / (1 + 1 / 2 + 1 / 3)),
  )
  def test_units_have_the_papers_lengths(self, lengths, mean):
    # SpanBERT states a mean of 3.8; ALBERT's is 3 / H(3).
    shape = (400, 4000)  # long rows: the cut at their ends does not count
    keys = masking.row_keys(0, np.zeros(400, int), np.arange(400))
    words = np.ones(shape, bool)
    starts = masking.unit_starts(keys, words, words, lengths)
    sizes = np.concatenate([np.diff(np.flatnonzero(r))[1:] for r in starts])
    self.assertAlmostEqual(sizes.mean(), mean, delta=0.02)
    share = np.bincount(sizes, minlength=len(lengths) + 1)[1:] / len(sizes)
    np.testing.assert_allclose(share, lengths, atol=0.003)  # 4e5 draws

  @parameterized.parameters("span", "ngram")
  def test_no_word_of_a_row_is_as_good_as_another_for_a_unit(self, unit):
    """But the first one, which begins what is left of one."""
    shape = (20_000, 24)
    words = np.ones(shape, bool)
    lengths = masking.Masking(unit=unit).span_lengths
    keys = masking.row_keys(0, np.zeros(len(words), int), np.arange(len(words)))
    shares = masking.unit_starts(keys, words, words, lengths).mean(0)
    mean = lengths @ np.arange(1, 1 + len(lengths))
    self.assertEqual(shares[0], 1)
    np.testing.assert_allclose(shares[1:], 1 / mean, atol=0.015)

  def test_spans_run_longer_than_single_words(self):
    def runs(unit):
      chosen = self.chosen(unit)
      return (chosen[:, 1:] & chosen[:, :-1]).sum() / chosen.sum()

    self.assertGreater(runs("span"), 1.3 * runs("whole_word"))

  @parameterized.named_parameters(_UNITS)
  def test_a_row_is_masked_alike_in_any_batch(self, unit):
    for first, stop in ((0, 1), (7, 20), (1500, 1600)):
      part = mask(
        self.tokens[first:stop],
        self.segments[first:stop],
        first=first,
        unit=unit,
      )
      for name, whole in self.masked[unit].items():
        np.testing.assert_array_equal(part[name], whole[first:stop])

  @parameterized.parameters(dict(epoch=1), dict(seed=4), dict(first=1))
  def test_epoch_seed_and_index_change_the_mask(self, **changes):
    other = mask(self.tokens, self.segments, **changes)
    same = other["masked_positions"] == self.masked["token"]["masked_positions"]
    self.assertFalse(same.all(axis=1).any())

  def test_only_masks(self):
    batch = mask(self.tokens, self.segments, mask_share=1.0, random_share=0.0)
    shown = np.take_along_axis(batch["tokens"], batch["masked_positions"], 1)
    self.assertTrue((shown[batch["labels"] >= 0] == _TOKENIZER.mask_id).all())

  @parameterized.parameters(False, True)
  def test_random_tokens_are_special_only_if_asked(self, specials):
    small = masking.Vocabulary(
      4, np.arange(8) < 5, np.zeros(8, bool)
    )  # 5 of 8 ids are special
    tokens = np.full((100, 64), 5, np.int32)
    batch = masking.mask_rows(
      tokens,
      np.ones_like(tokens),
      masking=masking.Masking(
        mask_share=0.0, random_share=1.0, random_specials=specials
      ),
      vocabulary=small,
      seed=0,
      epochs=np.zeros(100, int),
      indices=np.arange(100),
    )
    self.assertEqual((batch["tokens"] < 5).any(), specials)

  def test_padding_rows_have_no_labels_and_short_rows_have_one(self):
    tokens = np.array([[0] * 6, [2, 9, 3, 0, 0, 0], [2, 3, 0, 0, 0, 0]])
    batch = mask(tokens, np.where(tokens, 1, 0), rate=0.5)
    np.testing.assert_array_equal((batch["labels"] >= 0).sum(1), [0, 1, 0])
    self.assertEqual(batch["labels"].shape, (3, 3))

  @parameterized.parameters(
    (dict(rate=1.5), "data.masking.rate=1.5 must be between"),
    (dict(unit="word"), "data.masking.unit='word' must be one of token"),
    (dict(random_share=0.3), "data.masking.random_share=0.3 must be in"),
    (dict(max_masked=0), "data.masking.max_masked=0 must be at least 1"),
  )
  def test_bad_options_are_named(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      masking.Masking(**options)

  def test_too_few_slots_are_refused(self):
    with self.assertRaisesRegex(
      ValueError, r"max_masked=10 must be at least 19, what data.masking.rate"
    ):
      masking.Masking(max_masked=10).slots(128)
    self.assertEqual(masking.Masking(max_masked=76).slots(512), 76)
    self.assertEqual(masking.Masking().slots(512), 77)


if __name__ == "__main__":
  absltest.main()
