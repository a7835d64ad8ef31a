import pathlib
import random
import tempfile

from absl.testing import absltest

from bertjax.data import cache_build, cache_shards, sentences
from bertjax.data.beam import minhash, statistics
from tests.data import cache_test


def job(texts):
  return cache_shards.Job(
    source=cache_test.FakeSource(texts),
    split="train",
    tokenizer=cache_test.FakeTokenizer(vocab_size=2**31),
    splitter="sentences",
    max_tokens_per_document=None,
    documents_per_shard=4,
  )


def sentence_of(rng, count):
  return " ".join(f"w{rng.randrange(10**6)}" for _ in range(count)) + "."


class CorpusStatisticsTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    rng = random.Random(0)
    plain = [
      f"{sentence_of(rng, 80)} {sentence_of(rng, 41 + i)}" for i in range(12)
    ]
    # The 60th of some 130 words is another one: overlaps of 0.9 and more.
    near = []
    for i in (1, 2, 3, 3):
      words = plain[i].split()
      words[60] = f"w{rng.randrange(10**6)}"
      near.append(" ".join(words))
    half = [f"{plain[4][: len(plain[4]) // 2]} {sentence_of(rng, 65)}"]
    cls.texts = [
      plain[0],
      near[0],  # stands before what it is made of
      *plain[1:],
      *near[1:],
      *half,
      "",
      plain[5],
      f"  {plain[5]}",  # of the same tokens
      near[2],
      "COPY" + plain[6],
    ]
    cls.folder = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    cls.found = statistics.corpus_statistics(
      job(cls.texts), str(cls.folder), readers=3
    )

  def test_sizes_equal_a_plain_count(self):
    texts = [text.removeprefix("COPY") for text in self.texts]
    expected = {
      "documents": len(texts),
      "empty": texts.count(""),
      "characters": sum(map(len, texts)),
      "sentences": sum(
        bool(sentence.split())
        for text in texts
        for sentence in sentences.sentences(text)
      ),
      "tokens": sum(len(text.split()) for text in texts),
    }
    self.assertEqual({k: self.found[k] for k in expected}, expected)

  def test_duplicates_are_those_that_a_cache_drops(self):
    seen = [tuple(text.split()) for text in self.texts if text]
    self.assertEqual(self.found["duplicates"], len(seen) - len(set(seen)))
    cache = cache_build.build_cache(
      job(self.texts).source,
      "train",
      job(self.texts).tokenizer,
      "sentences",
      str(self.folder),
    )
    self.assertEqual(self.found["duplicates"], cache.duplicates)

  def test_near_duplicates_equal_exact_overlaps(self):
    """Found are the planted ones, by all pairs of distinct documents."""
    ngrams = minhash.MinHash().ngrams
    kept, near = {}, 0
    for text in self.texts:
      if not text or text.startswith("COPY") or tuple(text.split()) in kept:
        continue
      mine = ngrams(text)
      overlaps = [
        len(mine & other) / len(mine | other) for other in kept.values()
      ]
      # No pair is close to the threshold, where an estimate may err.
      self.assertFalse([o for o in overlaps if 0.6 < o < 0.9])
      near += max(overlaps, default=0) >= 0.8
      kept[tuple(text.split())] = mine
    self.assertEqual(near, 4)
    self.assertEqual(self.found["near_duplicates"], near)

  def test_documents_that_share_a_key_are_compared(self):
    """The planted ones overlap by 0.9 and more, not wholly."""
    found = statistics.corpus_statistics(
      job(self.texts), str(self.folder), threshold=1.0
    )
    self.assertEqual(found, self.found | {"near_duplicates": 0})

  def test_refuses_a_bad_threshold(self):
    with self.assertRaisesRegex(ValueError, r"threshold=1\.5 must be above 0"):
      statistics.corpus_statistics(job(["a"]), str(self.folder), threshold=1.5)


if __name__ == "__main__":
  absltest.main()
