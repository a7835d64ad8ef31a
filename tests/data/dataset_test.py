"""Instance modes and the dataset: what a row holds, and that it is pure."""

import json
import sys
from pathlib import Path

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import fakes

from bertjax.data import audit, instances, packing, text_dataset
from bertjax.data.instances import pairs

_MODES = [(name, name) for name in instances.INSTANCES]
_WHOLE = ("single_segment", "packed", "full_sentences", "doc_sentences")


def make(
  cache, name="packed", seq_len=32, masking=(), negatives=None, **options
):
  mode = dict(name=name)
  if negatives is not None:
    mode["negatives"] = negatives
  vocab_size = 200
  if isinstance(cache, tuple):
    cache, vocab_size = cache
  kwargs = dict(block_tokens=2_000, block_documents=8) | options
  return text_dataset.TextDataset(
    cache,
    fakes.FakeTokenizer(vocab_size),
    instances=mode,
    masking=masking if masking is None else dict(masking),
    seq_len=seq_len,
    **kwargs,
  )


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


class PackingTest(parameterized.TestCase):
  @settings(max_examples=200, deadline=None)
  @given(st.lists(st.integers(1, 17), max_size=60))
  def test_no_row_overflows_and_every_piece_is_placed(self, lengths):
    row = packing.best_fit_decreasing(np.array(lengths, int), 17)
    used = np.bincount(row, lengths) if lengths else np.zeros(0)
    self.assertTrue((used <= 17).all() and (used > 0).all())
    # Best fit decreasing never needs more than 11/9 of the best plus one.
    self.assertLessEqual(len(used), 11 / 9 * -(-sum(lengths) // 17) * 2 + 1)

  def test_rows_are_full(self):
    lengths = np.random.default_rng(0).integers(1, 129, 20_000)
    rows = packing.best_fit_decreasing(lengths, 128).max() + 1
    self.assertGreater(lengths.sum() / (rows * 128), 0.99)

  def test_overlong_piece_is_refused(self):
    with self.assertRaisesRegex(ValueError, "must have 1..8 tokens"):
      packing.best_fit_decreasing(np.array([3, 9]), 8)


class InstancesTest(parameterized.TestCase):
  @parameterized.named_parameters((m, m) for m in _WHOLE)
  def test_every_token_appears_exactly_once_in_an_epoch(self, name):
    cache = fakes.distinct_cache()
    data = make(cache, name, masking=None)
    for epoch_start, epoch in ((0, 0), (data.rows_per_epoch(0), 1)):
      count = data.rows_per_epoch(epoch)
      tokens = data.rows(epoch_start, epoch_start + count)["tokens"]
      np.testing.assert_array_equal(
        np.sort(tokens[tokens >= 5]), np.arange(5, cache[1])
      )

  @parameterized.named_parameters(_MODES)
  def test_rows_are_well_formed(self, name):
    data = make(fakes.random_cache(), name, masking=None)
    batch = data.batch(0, 400)
    tokens, ids = batch["tokens"], batch["segment_ids"]
    spec = data.batch_spec(400)
    self.assertEqual(spec.keys(), batch.keys())
    for key, value in batch.items():
      self.assertEqual((spec[key].shape, spec[key].dtype),
                       (value.shape, value.dtype))  # fmt: skip
    self.assertTrue((tokens[ids == 0] == 0).all())
    for row in range(400):
      real = np.count_nonzero(ids[row])
      self.assertTrue((ids[row, :real] > 0).all())  # padding is at the end
      for segment in range(1, ids[row].max() + 1):
        at = np.flatnonzero(ids[row] == segment)
        np.testing.assert_array_equal(at, at[0] + np.arange(len(at)))
        np.testing.assert_array_equal(
          batch["positions"][row, at], np.arange(len(at))
        )
        self.assertEqual(tokens[row, at[0]], 2)
        self.assertEqual(tokens[row, at[-1]], 3)
        self.assertEqual((tokens[row, at] == 2).sum(), 1)

  def test_packed_rows_hold_whole_documents_and_are_full(self):
    cache, vocab_size = fakes.distinct_cache(600, max_sentences=2)
    data = make((cache, vocab_size), masking=None, block_tokens=10**6)
    owner = np.repeat(np.arange(600), cache.document_lengths)
    batch = data.rows(0, data.rows_per_epoch(0))
    for tokens, ids in zip(batch["tokens"], batch["segment_ids"]):
      documents = [
        set(owner[tokens[(ids == i) & (tokens >= 5)] - 5])
        for i in range(1, ids.max() + 1)
      ]
      self.assertTrue(all(len(d) == 1 for d in documents))
    self.assertGreater((batch["segment_ids"] > 0).mean(), 0.95)
    self.assertGreater(batch["segment_ids"].max(), 1)

  def test_full_sentences_pack_greedily_and_separate_documents(self):
    # 4 + 3 | 6 + 2 tokens, rows of 14: [CLS] 4 3 [SEP] fits the next 6? No:
    # 1 + 7 + 1 + 6 + 1 = 16. Second row: 1 + 8 + 1 = 10.
    block = instances.BlockIndex(
      np.array([7, 8]), np.array([2, 2]), np.array([4, 3, 6, 2])
    )
    rng = np.random.default_rng(0)
    plan = instances.INSTANCES["full_sentences"]().plan(block, 14, rng)
    np.testing.assert_array_equal(plan.row_offsets, [0, 1, 2])
    np.testing.assert_array_equal(plan.lengths, [7, 8])
    plan = instances.INSTANCES["full_sentences"]().plan(block, 16, rng)
    np.testing.assert_array_equal(plan.row_offsets, [0, 2, 3])
    np.testing.assert_array_equal(plan.lengths, [7, 6, 2])
    np.testing.assert_array_equal(plan.opens, [True, False, True])
    plan = instances.INSTANCES["doc_sentences"]().plan(block, 16, rng)
    np.testing.assert_array_equal(plan.lengths, [7, 8])

  def parts(self, batch, row):
    tokens, types = batch["tokens"][row], batch["type_ids"][row]
    return [
      tokens[(types == t) & (tokens >= 5) & (batch["segment_ids"][row] > 0)]
      for t in (0, 1)
    ]

  def test_next_sentence_labels_tell_the_truth(self):
    cache, vocab_size = fakes.distinct_cache(400)
    data = make((cache, vocab_size), "nsp", 48, masking=None)
    owner = np.repeat(np.arange(400), cache.document_lengths)
    batch = data.rows(0, data.rows_per_epoch(0))
    self.assertEqual(set(batch["pair_labels"]), {0, 1})
    for row, label in enumerate(batch["pair_labels"]):
      a, b = self.parts(batch, row)
      for part in (a, b):  # consecutive tokens of one document
        self.assertTrue((np.diff(part) == 1).all())
        self.assertLen(set(owner[part - 5]), 1)
      same = owner[a[0] - 5] == owner[b[0] - 5]
      self.assertEqual(same, label == 0)
      if label == 0 and len(a) + len(b) < 45:  # not truncated
        self.assertEqual(b[0], a[-1] + 1)

  def test_negatives_of_the_same_source(self):
    cache, vocab_size = fakes.distinct_cache(400)
    sources = np.random.default_rng(3).integers(0, 5, 400)
    sources[sources == 4] = 3  # uneven shares
    sources[[7, 9]] = [8, 6]  # no document shares these
    cache.document_sources = sources
    data = make(
      (cache, vocab_size), "nsp", 48, masking=None, negatives="same_source"
    )
    owner = np.repeat(np.arange(400), cache.document_lengths)
    batch = data.rows(0, data.rows_per_epoch(0))
    partners = set()
    for row, label in enumerate(batch["pair_labels"]):
      a, b = self.parts(batch, row)
      if label < 0:  # one sentence, nowhere to take another from
        self.assertEmpty(b)
        continue
      first, second = owner[a[0] - 5], owner[b[0] - 5]
      self.assertEqual(first == second, label == 0)
      self.assertEqual(sources[first], sources[second])
      partners.add((int(first), int(second)))
    # A negative is drawn from all of a source, not from its neighbour.
    steps = {(b - a) % 400 for a, b in partners if a != b}
    self.assertGreater(len(steps), 100)
    lonely = np.isin(owner, [7, 9])
    rows = [
      label
      for row, label in enumerate(batch["pair_labels"])
      if lonely[self.parts(batch, row)[0][0] - 5]
    ]
    self.assertNotEmpty(rows)
    self.assertNotIn(1, rows)

  def test_negatives_need_a_cache_that_knows_sources(self):
    with self.assertRaisesRegex(
      ValueError, "negatives='same_source' needs the source.*Delete that folder"
    ):
      make(fakes.random_cache(20), "nsp", negatives="same_source")

  def test_next_sentence_rate(self):
    several = fakes.FakeCache([[[7] * 3] * 40 for _ in range(400)])
    single = fakes.FakeCache([[[7] * 60] * 5 for _ in range(50)])
    data = make(several, "nsp", 67, masking=None)
    labels = data.rows(0, data.rows_per_epoch(0))["pair_labels"]
    # One chunk in about ten, a document's last, may have one sentence only;
    # the generator's rule is checked exactly below.
    self.assertGreater(labels.mean(), 0.45)
    data = make(single, "nsp", 32, masking=None)
    labels = data.rows(0, data.rows_per_epoch(0))["pair_labels"]
    self.assertTrue((labels == 1).all())

  def test_half_of_the_chunks_of_two_sentences_are_random(self):
    # Without put back (real) a document of two sentences is one chunk; after a
    # random B its second sentence is left and gets a random B as well.
    cache = fakes.FakeCache([[[7] * 3] * 2 for _ in range(4000)])
    data = text_dataset.TextDataset(
      cache,
      fakes.FakeTokenizer(),
      instances=dict(name="nsp", short_seq_prob=0.0),
      seq_len=32,
    )
    labels = data.rows(0, data.rows_per_epoch(0))["pair_labels"]
    real = (labels == 0).sum()
    self.assertEqual((labels == 1).sum(), 2 * (4000 - real))  # put back
    self.assertAlmostEqual(real / 4000, 0.5, delta=0.024)  # three deviations

  def test_sentence_order_swaps_half(self):
    cache, vocab_size = fakes.distinct_cache(600, max_sentences=20)
    data = make((cache, vocab_size), "sop", 40, masking=None)
    batch = data.rows(0, data.rows_per_epoch(0))
    labels = batch["pair_labels"]
    for row, label in enumerate(labels):
      a, b = self.parts(batch, row)
      if label < 0:
        self.assertEmpty(b)
      else:
        self.assertEqual(a[0] < b[0], label == 0)
    # About 2,000 pairs: standard deviation 0.011.
    self.assertAlmostEqual(labels[labels >= 0].mean(), 0.5, delta=0.034)

  @settings(max_examples=300, deadline=None)
  @given(st.integers(1, 40), st.integers(0, 40), st.integers(2, 30))
  def test_truncation_is_the_step_by_step_rule(self, a, b, limit):
    wanted_a, wanted_b = a, b
    while wanted_a + wanted_b > limit:
      if wanted_a > wanted_b:
        wanted_a -= 1
      else:
        wanted_b -= 1
    got = pairs.truncate_pair(np.array([a]), np.array([b]), limit)
    self.assertEqual((got[0][0], got[1][0]), (wanted_a, wanted_b))


class StreamTest(parameterized.TestCase):
  @parameterized.named_parameters(_MODES)
  def test_rows_do_not_depend_on_batching_or_hosts(self, name):
    cache = fakes.random_cache(120)
    whole = make(cache, name).rows(0, 600)  # crosses blocks and epochs
    other = make(cache, name)
    for size, hosts in ((40, 1), (60, 3)):
      for step in (3, 0, 7):  # out of order
        parts = [other.batch(step, size, p, hosts) for p in range(hosts)]
        joined = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        first = step * size
        assert_same(joined, {k: v[first : first + size]
                             for k, v in whole.items()})  # fmt: skip

  def test_epoch_and_index_of_a_row_are_exact(self):
    data = make(fakes.random_cache(100), "nsp")
    start = 0
    for epoch in range(3):
      count = data.rows_per_epoch(epoch)
      self.assertEqual(data.epoch_of(start), (epoch, 0))
      self.assertEqual(data.epoch_of(start + count - 1), (epoch, count - 1))
      start += count
    counts = {data.rows_per_epoch(e) for e in range(3)}
    self.assertGreater(len(counts), 1)  # else the test shows nothing

  def test_seeds_and_epochs_differ(self):
    cache = fakes.random_cache(100)
    data = make(cache, "single_segment")
    count = data.rows_per_epoch(0)
    first = data.rows(0, count)["tokens"]
    self.assertFalse((first == data.rows(count, 2 * count)["tokens"]).all())
    other = make(cache, "single_segment", seed=1).rows(0, count)["tokens"]
    self.assertFalse((first == other).all())

  def test_static_masking_repeats_after_dupe_factor_epochs(self):
    data = make(fakes.random_cache(50), masking=dict(dupe_factor=2))
    counts = [data.rows_per_epoch(e) for e in range(3)]
    one = data.rows(0, counts[0])
    again = data.rows(sum(counts[:2]), sum(counts))
    assert_same(one, again)
    two = data.rows(counts[0], sum(counts[:2]))
    self.assertFalse((one["tokens"][:20] == two["tokens"][:20]).all())

  @parameterized.parameters(0, 4)
  def test_resume_is_bitwise_through_json(self, prefetch):
    cache = fakes.random_cache(150)
    stream = make(cache, "nsp").iterator(16, prefetch=prefetch)
    for _ in range(33):
      next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    wanted = [next(stream) for _ in range(5)]
    self.assertEqual(state["step"], 33)
    fresh = make(cache, "nsp")
    resumed = fresh.iterator(16, prefetch=prefetch)
    resumed.set_state(state)
    for batch in wanted:
      assert_same(next(resumed), batch)
    half = make(cache, "nsp").iterator(16, 33, 1, 2, prefetch=prefetch)
    assert_same(next(half), {k: v[8:] for k, v in wanted[0].items()})
    for opened in (stream, resumed, half):
      opened.close()

  def test_resume_plans_no_earlier_block(self):
    cache = fakes.random_cache(300)
    state = make(cache, "nsp").iterator(16, 500, prefetch=0).get_state()
    fresh = make(cache, "nsp")
    stream = fresh.iterator(16, prefetch=0)
    stream.set_state(state)
    next(stream)
    self.assertLessEqual(len(fresh._block_rows), 2)

  def test_evaluation_counts_every_row_once_and_pads_the_last_batch(self):
    cache = fakes.distinct_cache()
    data = make(cache, "single_segment", masking=None)
    batches = list(data.evaluation_batches(64))
    self.assertEqual({b["tokens"].shape for b in batches}, {(64, 32)})
    tokens = np.concatenate([b["tokens"] for b in batches])
    np.testing.assert_array_equal(
      np.sort(tokens[tokens >= 5]), np.arange(5, cache[1])
    )
    masked = make(cache, "nsp", seed=5)
    one, two = (list(d.evaluation_batches(64)) for d in (
        masked, make(cache, "nsp", seed=6)))  # fmt: skip
    assert_same(one[-1], two[-1])  # independent of the run's seed
    empty = one[-1]["segment_ids"].max(axis=1) == 0
    self.assertTrue(empty.any())
    self.assertTrue((one[-1]["labels"][empty] == -1).all())
    self.assertTrue((one[-1]["pair_labels"][empty] == -1).all())
    self.assertLen(list(masked.evaluation_batches(64, 2)), 2)
    hosts = [list(masked.evaluation_batches(64, None, p, 2)) for p in (0, 1)]
    joined = {k: np.concatenate([h[-1][k] for h in hosts]) for k in one[-1]}
    assert_same(joined, one[-1])


class BadInputTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(name="pack"), r"data.instances.name='pack' is unknown.*'packed'"),
    (dict(name="nsp", seq_len=4), "data.seq_len=4 is too short for"),
    (dict(masking=dict(rte=0.2)), r"data.masking.rte is not an option"),
    (dict(masking=dict(max_masked=2)), r"max_masked=2 must be at least 4"),
  )
  def test_bad_options_are_named(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      make(fakes.random_cache(20), **options)

  def test_bad_options_of_pairs_are_named(self):
    cache = fakes.random_cache(20)
    for name, options, message in (
      ("nsp", dict(random_rate=1.5), "instances.random_rate=1.5 must lie in"),
      ("sop", dict(swap_rate=-1), "instances.swap_rate=-1 must lie in 0..1"),
      ("sop", dict(short_seq_prob=2), "instances.short_seq_prob=2 must lie"),
      ("nsp", dict(negatives="same"), "negatives='same' must be one of any_do"),
      ("sop", dict(negatives="same"), "negatives is not an option"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        text_dataset.TextDataset(
          cache,
          fakes.FakeTokenizer(),
          instances=dict(name=name, **options),
          seq_len=32,
        )

  def test_empty_corpus(self):
    with self.assertRaisesRegex(ValueError, "data.source gave 0 documents"):
      make(fakes.FakeCache([]))

  def test_one_document_makes_no_random_pairs(self):
    with self.assertRaisesRegex(ValueError, "gave 1 documents.*needs 2"):
      make(fakes.random_cache(1), "nsp")

  def test_cache_of_another_tokenizer(self):
    cache = fakes.random_cache(20)
    cache.manifest["tokenizer"]["fingerprint"] = "other"
    with self.assertRaisesRegex(ValueError, "data.tokenizer has fingerprint"):
      make(cache)

  def test_batch_that_does_not_divide(self):
    data = make(fakes.random_cache(20))
    with self.assertRaisesRegex(ValueError, "data.batch_size=6 does not divid"):
      data.iterator(6, process_count=4)

  @parameterized.parameters(
    (16, dict(seed=1), "belongs to other data"),
    (32, dict(), "data.batch_size=32 differs from the 16"),
  )
  def test_foreign_state(self, batch_size, changes, message):
    cache = fakes.random_cache(20)
    state = make(cache).iterator(16, prefetch=0).get_state()
    stream = make(cache, **changes).iterator(batch_size, prefetch=0)
    with self.assertRaisesRegex(ValueError, message):
      stream.set_state(state)


class AuditTest(absltest.TestCase):
  def test_statistics_of_a_healthy_stream(self):
    data = make(fakes.random_cache(600), "nsp", 64)
    batches = [data.batch(i, 64) for i in range(8)]
    stats = audit.audit(batches, data.tokenizer)
    self.assertEqual(stats["rows"], 512)
    self.assertAlmostEqual(stats["masked_rate"], 0.15, delta=0.01)
    shares = [stats[k] for k in ("mask_share", "random_share", "kept_share")]
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.03)  # 3,000
    self.assertEqual(stats["duplicate_rows"], 0)
    twice = audit.audit(batches[:1] * 2, data.tokenizer)
    self.assertEqual(twice["duplicate_rows"], 0.5)
    self.assertIn("masked_rate", audit.text(stats))

  def test_originals_are_restored(self):
    data = make(fakes.random_cache(60))
    np.testing.assert_array_equal(
      audit.original_tokens(data.rows(0, 50)),
      data.originals(0, 50)["tokens"],
    )

  def test_show_marks_the_masks(self):
    data = make(fakes.random_cache(60))
    shown = audit.show(data, data.tokenizer, 3)
    labels = data.rows(3, 4)["labels"]
    self.assertEqual(shown.count("<"), (labels >= 0).sum())
    self.assertNotIn("[PAD]", shown)

  def test_no_batches(self):
    with self.assertRaisesRegex(ValueError, "at least one batch"):
      audit.audit([], fakes.FakeTokenizer())


if __name__ == "__main__":
  absltest.main()
