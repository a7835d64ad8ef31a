import numpy as np
from absl.testing import absltest, parameterized

from bertjax.data.beam import minhash


def overlapping(shared, own):
  """Two texts of one-word n-grams, `shared` in common and `own` each."""
  words = [f"w{i}" for i in range(shared + 2 * own)]
  return " ".join(words[: shared + own]), " ".join(
    [*words[:shared], *words[shared + own :]]
  )


class MinHashTest(parameterized.TestCase):
  @parameterized.parameters((90, 5), (60, 30), (10, 95), (2500, 1000))
  def test_estimates_the_overlap(self, shared, own):
    hashes = minhash.MinHash(num_hashes=2000, bands=10, ngram=1)
    one, other = map(hashes.signature, overlapping(shared, own))
    overlap = shared / (shared + 2 * own)
    deviation = (overlap * (1 - overlap) / 2000) ** 0.5
    found = minhash.similarity(one, other)
    self.assertAlmostEqual(found, overlap, delta=4 * deviation)

  def test_keys_meet_as_often_as_bands_say(self):
    met = []
    for seed in range(200):
      hashes = minhash.MinHash(num_hashes=12, bands=4, ngram=1, seed=seed)
      keys = [
        set(hashes.keys(hashes.signature(text))) for text in overlapping(60, 20)
      ]
      self.assertLen(keys[0], 4)
      met.append(bool(keys[0] & keys[1]))
    expected = 1 - (1 - 0.6**3) ** 4  # 0.622
    # Four standard deviations of 200 draws.
    self.assertAlmostEqual(np.mean(met), expected, delta=4 * 0.034)

  def test_bands_of_equal_numbers_have_keys_of_their_own(self):
    hashes = minhash.MinHash(num_hashes=12, bands=4)
    self.assertLen(set(hashes.keys(np.zeros(12, np.uint32))), 4)

  def test_ngrams_of_short_and_long_texts(self):
    hashes = minhash.MinHash(ngram=3)
    self.assertEqual(hashes.ngrams("A  b\nc D"), {"a b c", "b c d"})
    self.assertEqual(hashes.ngrams("a b"), {"a b"})

  def test_signature_is_the_same_on_every_machine(self):
    hashes = minhash.MinHash(num_hashes=4, bands=2)
    np.testing.assert_array_equal(
      hashes.signature("Four score and seven years ago"), _FOUR_SCORE
    )

  @parameterized.parameters(
    (dict(num_hashes=10, bands=3), "bands=3 must divide num_hashes=10"),
    (dict(ngram=0), "ngram=0 must be at least 1"),
  )
  def test_refuses(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      minhash.MinHash(**options)


_FOUR_SCORE = [118597468, 1560064711, 2465932607, 402862589]

if __name__ == "__main__":
  absltest.main()
