"""Rows, labels and metrics of tasks."""

import numpy as np
import scipy.stats
import sklearn.metrics
from absl.testing import absltest, parameterized

from bertjax.data.tokenizers.words import WordTokenizer
from bertjax.tasks import inputs, kinds, metrics
from bertjax.tasks.inputs import PAIR_STYLES
from bertjax.tasks.table import PUBLISHED

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##b", "##c"]


def tokenizer():
  return WordTokenizer(PIECES, lowercase=True)


def pop_longest(first, second, limit):
  """Truncation as the reference does it, token by token."""
  while first + second > limit:
    if first > second:
      first -= 1
    else:
      second -= 1
  return first, second


class RowTest(parameterized.TestCase):
  def test_truncation_is_that_of_the_reference(self):
    for first in range(12):
      for second in range(12):
        for limit in range(24):
          self.assertEqual(
            inputs.kept_lengths(first, second, limit),
            pop_longest(first, second, limit),
            (first, second, limit),
          )

  def test_rows_of_one_text_and_of_pairs(self):
    a, b = np.full(3, 5, np.int32), np.full(4, 6, np.int32)
    rows = inputs.encode_rows([(a,), (a, b)], tokenizer(), 9)
    np.testing.assert_array_equal(
      rows["tokens"],
      [[2, 5, 5, 5, 3, 0, 0, 0, 0], [2, 5, 5, 5, 3, 6, 6, 6, 3]],
    )
    np.testing.assert_array_equal(
      rows["type_ids"], [[0] * 9, [0, 0, 0, 0, 0, 1, 1, 1, 1]]
    )
    np.testing.assert_array_equal(
      rows["segment_ids"], [[1] * 5 + [0] * 4, [1] * 9]
    )
    np.testing.assert_array_equal(
      rows["positions"], [[0, 1, 2, 3, 4, 0, 0, 0, 0], list(range(9))]
    )

  def test_roberta_pairs_have_two_separators_and_one_type(self):
    a, b = np.full(2, 5, np.int32), np.full(2, 6, np.int32)
    rows = inputs.encode_rows([(a, b)], tokenizer(), 9, PAIR_STYLES["roberta"])
    np.testing.assert_array_equal(rows["tokens"], [[2, 5, 5, 3, 3, 6, 6, 3, 0]])
    self.assertFalse(rows["type_ids"].any())


class TaggingTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.kind = kinds.Tagging(labels=("O", "B-X", "I-X"))

  def features(self, words, labels, seq_len=9):
    return self.kind.features(
      [{"words": words, "labels": labels}],
      tokenizer(),
      seq_len,
      PAIR_STYLES["bert"],
    )

  def test_first_pieces_carry_the_labels(self):
    # "abc" is a ##b ##c; a control character alone leaves nothing: [UNK].
    found = self.features(["abc", "b", "\u200b", "ab"], ["B-X", "O", 2, "O"])
    np.testing.assert_array_equal(
      found.arrays["tokens"], [[2, 5, 7, 8, 6, 1, 5, 7, 3]]
    )
    np.testing.assert_array_equal(
      found.arrays["labels"], [[-1, 1, -1, -1, 0, 2, 0, -1, -1]]
    )

  def test_words_cut_off_count_as_outside(self):
    found = self.features(["abc", "b", "b"], ["B-X", "O", "B-X"], seq_len=6)
    labels = found.arrays["labels"][0]
    np.testing.assert_array_equal(labels, [-1, 1, -1, -1, 0, -1])
    logits = np.eye(3)[np.maximum(labels, 0)][None]
    scores = self.kind.score(logits, found)
    self.assertAlmostEqual(scores["accuracy"], 2 / 3)
    self.assertEqual(scores["entity_precision"], 1.0)
    self.assertEqual(scores["entity_recall"], 0.5)

  def test_unequal_lists_and_unknown_labels_are_refused(self):
    with self.assertRaisesRegex(ValueError, "2 words but 1 labels"):
      self.features(["a", "b"], ["O"])
    with self.assertRaisesRegex(ValueError, "labels='B-Y' is no label"):
      self.features(["a"], ["B-Y"])

  @parameterized.parameters("E-X", "S-X", "L-X", "NOUN")
  def test_entities_are_not_made_of_other_labels_than_iob(self, other):
    labels = ("O", "B-X", "I-X", other)
    with self.assertRaisesRegex(ValueError, f"'{other}'.*entity=False"):
      kinds.Tagging(labels=labels)
    kinds.Tagging(labels=labels, entity=False)
    kinds.Tagging(labels=("O", "B", "I"))  # of one type without a name


class TextTest(parameterized.TestCase):
  """What stands where a text should be."""

  @parameterized.parameters(None, True, (["a", "b"],), ({"a": 1},))
  def test_neither_null_nor_lists_become_words(self, wrong):
    right = {"id": "r7", "x": "a", "y": "b", "p": "a", "words": ["a", 2]}
    sentences = kinds.Sentences("x", ("p", "y"), labels=("no", "yes"))
    choices = kinds.Choices("x", ("y", "p"), 2, prefix="p")
    self.assertEqual(sentences.texts(right | {"y": 2.5}), ["a", "a 2.5"])
    self.assertEqual(choices.texts(right), ["a", "a b", "a a"])
    self.assertEqual(kinds.Tagging(labels=("O", "B")).texts(right), ["a 2"])
    for kind, field in ((sentences, "y"), (choices, "y"), (choices, "p")):
      record = kind.prepared(right | {field: wrong}, str.upper)
      with self.assertRaisesRegex(ValueError, f"'r7': {field} holds .* no tex"):
        kind.texts(record)

  @parameterized.parameters(
    ("ab", "no list"), (None, "no list"), (["a", None], "None.* no text")
  )
  def test_lists_hold_texts(self, wrong, message):
    record = {"id": "r7", "x": "a", "words": wrong, "labels": ["O", "O"]}
    for kind in (
      kinds.Choices("x", "words", 2),
      kinds.Tagging(labels=("O", "B-X")),
    ):
      with self.assertRaisesRegex(ValueError, f"'r7': words holds .*{message}"):
        kind.features([record], tokenizer(), 8, PAIR_STYLES["bert"])


class SentencesTest(parameterized.TestCase):
  @parameterized.parameters(
    ("yes", 1), ("no", 0), (1, 1), (True, 1), (None, -1), (-1, -1), ("", -1)
  )
  def test_labels_by_name_or_index(self, value, expected):
    kind = kinds.Sentences("text", labels=("no", "yes"))
    found = kind.features(
      [{"text": "a", "label": value}], tokenizer(), 8, PAIR_STYLES["bert"]
    )
    self.assertEqual(found.arrays["labels"].tolist(), [expected])

  def test_multilabel_is_multi_hot(self):
    kind = kinds.Sentences(
      "text", labels=("x", "y", "z"), multilabel=True, metrics=("micro_f1",)
    )
    found = kind.features(
      [{"text": "a", "label": v} for v in (["z", 0], [], None)],
      tokenizer(),
      8,
      PAIR_STYLES["bert"],
    )
    np.testing.assert_array_equal(
      found.arrays["labels"], [[1, 0, 1], [0, 0, 0], [-1, -1, -1]]
    )

  @parameterized.parameters((("x",), False), ((), True))
  def test_labels_among_which_nothing_is_chosen_are_refused(
    self, labels, several
  ):
    with self.assertRaisesRegex(ValueError, "two classes.* one or more"):
      kinds.Sentences("text", labels=labels, multilabel=several)

  @parameterized.parameters("", -1, None)
  def test_what_is_unknown_is_no_label_among_several(self, unknown):
    kind = kinds.Sentences("text", labels=("x", "y"), multilabel=True)
    with self.assertRaisesRegex(ValueError, "label=.* holds .*; leave out"):
      kind.features(
        [{"text": "a", "label": ["x", unknown]}],
        tokenizer(),
        8,
        PAIR_STYLES["bert"],
      )

  @parameterized.parameters("xy", "x", 1)
  def test_several_labels_are_a_list(self, value):
    kind = kinds.Sentences("text", labels=("x", "y"), multilabel=True)
    with self.assertRaisesRegex(ValueError, "label=.* must be a list"):
      kind.features(
        [{"text": "a", "label": value}], tokenizer(), 8, PAIR_STYLES["bert"]
      )

  def test_labels_are_different(self):
    self._assert_refused(("a", "b", "a"), "labels=.* name 'a' twice")

  def test_ill_typed_labels_are_refused(self):
    message = r"labels=\(0, 1\) must be strings, as \('0', '1'\)"
    self._assert_refused((0, 1), message)

  def _assert_refused(self, labels, message):
    with self.assertRaisesRegex(ValueError, message):
      kinds.Sentences("text", labels=labels)
    with self.assertRaisesRegex(ValueError, message):
      kinds.Tagging(labels=labels, entity=False)

  @parameterized.parameters(
    (dict(labels=("a", "b", "c"), metrics=("f1",)), "'f1'.*multiclass.*macro"),
    (dict(labels=("a", "b"), metrics=("pearson",)), "'pearson'.*binary.* f1"),
    (
      dict(labels=("a", "b"), multilabel=True, metrics=("matthews",)),
      "'matthews'.*multilabel.*micro_f1",
    ),
    (dict(), "'accuracy'.*continuous.*pearson, spearman"),
    (dict(metrics=("pearsen",)), "'pearsen' is unknown"),
  )
  def test_metrics_are_for_such_labels(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      kinds.Sentences("text", **options)

  @parameterized.parameters(0.7, 1.9, float("nan"), ((1,),))
  def test_what_is_no_whole_number_is_no_class(self, value):
    kind = kinds.Sentences("text", labels=("no", "yes"))
    with self.assertRaisesRegex(
      ValueError, "is no class; write one of no, yes"
    ):
      kind.features(
        [{"text": "a", "label": value}], tokenizer(), 8, PAIR_STYLES["bert"]
      )

  def test_a_number_may_stand_for_no_label(self):
    kind, _ = PUBLISHED["glue/stsb"]
    records = [
      {"sentence1": "a", "sentence2": "b", "label": x} for x in (-1.0, 2.5)
    ]
    found = kind.features(records, tokenizer(), 8, PAIR_STYLES["bert"])
    self.assertEqual(found.labelled.tolist(), [False, True])

  def test_other_number_of_classes_is_refused(self):
    kind = kinds.Sentences("text", labels=("no", "yes"))
    features = kinds.Features(
      {"labels": np.zeros(2, np.int32)}, np.zeros(2, bool)
    )
    with self.assertRaisesRegex(ValueError, "num_classes=3.*2 labels"):
      kind.score(np.zeros((2, 3)), features)

  def test_unlabelled_split_is_refused(self):
    kind = kinds.Sentences("text", labels=("no", "yes"))
    features = kinds.Features(
      {"labels": np.full(2, -1, np.int32)}, np.zeros(2, bool)
    )
    with self.assertRaisesRegex(ValueError, "no labels"):
      kind.score(np.zeros((2, 2)), features)


class MetricsTest(parameterized.TestCase):
  def test_classes(self):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, (2, 40))
    tp, fp, fn = ((a & b).sum(), (~a & b & 1).sum(), (a & ~b & 1).sum())
    self.assertAlmostEqual(metrics.binary_f1(a, b), 2 * tp / (2 * tp + fp + fn))
    self.assertAlmostEqual(
      metrics.matthews(a, b), np.corrcoef(a, b)[0, 1]
    )  # the phi coefficient
    c, d = rng.integers(0, 3, (2, 40))
    per_class = [sklearn.metrics.f1_score(c == k, d == k) for k in range(3)]
    self.assertAlmostEqual(metrics.macro_f1(c, d), np.mean(per_class))
    shares = [np.mean(c == k) for k in np.unique(c)]
    self.assertAlmostEqual(metrics.weighted_f1(c, d), np.dot(per_class, shares))
    self.assertAlmostEqual(metrics.micro_f1(c, d), metrics.accuracy(c, d))

  @parameterized.parameters("binary", "multiclass", "multilabel", "continuous")
  def test_every_metric_serves_its_targets(self, target):
    rng = np.random.default_rng(0)
    labels = {
      "binary": rng.integers(0, 2, 40),
      "multiclass": rng.integers(0, 3, 40),
      "multilabel": rng.integers(0, 2, (40, 3)),
      "continuous": rng.normal(size=40),
    }[target]
    served = [m for m in metrics.METRICS.values() if target in m.targets]
    self.assertNotEmpty(served)
    for metric in served:
      self.assertAlmostEqual(metric.score(labels, labels), 1.0)
      self.assertLess(metric.score(labels, np.roll(labels, 1, 0)), 1.0)

  def test_correlations(self):
    a, b = np.random.default_rng(0).normal(size=(2, 30))
    self.assertAlmostEqual(metrics.pearson(a, b), np.corrcoef(a, b)[0, 1])
    ranks = [scipy.stats.rankdata(x) for x in (a, b)]
    self.assertAlmostEqual(metrics.spearman(a, b), np.corrcoef(*ranks)[0, 1])
    self.assertEqual(metrics.pearson(a, np.ones(30)), 0.0)

  @parameterized.parameters(
    ("O B-X I-X O", {("X", 1, 2)}),
    ("B-X B-X", {("X", 0, 0), ("X", 1, 1)}),
    ("B-X I-Y", {("X", 0, 0), ("Y", 1, 1)}),
    ("I-X I-X O I-Y", {("X", 0, 1), ("Y", 3, 3)}),
    ("O O", set()),
    ("B-a-b I-a-b", {("a-b", 0, 1)}),
  )
  def test_entities(self, tags, expected):
    self.assertEqual(metrics.entities(tags.split()), expected)

  def test_entity_scores(self):
    gold = [["B-X", "I-X", "O", "B-Y"], ["B-X"]]
    guess = [["B-X", "O", "O", "B-Y"], ["B-X"]]
    found = metrics.entity_scores(gold, guess)
    self.assertAlmostEqual(found["entity_f1"], 2 / 3)


if __name__ == "__main__":
  absltest.main()
