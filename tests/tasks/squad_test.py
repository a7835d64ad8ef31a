"""Answers survive the way into windows of tokens and back."""

import functools

import numpy as np
from absl.testing import absltest, parameterized

from bertjax.data.tokenizers import training
from bertjax.data.tokenizers.words import WordTokenizer
from bertjax.tasks import kinds, squad
from bertjax.tasks.inputs import PAIR_STYLES

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PIECES = [
  *SPECIALS,
  *LETTERS,
  *(f"##{c}" for c in LETTERS),
  *".,()$-'!?%",
  "the",
  "tower",
  "19",
  "##80",
]
CONTEXT = (
  "The Tower (built 1980s) cost $5.6 million, e.g. for caf\u00e9 M\u00fcnchen"
  " \u2014 and it's 330-metre high!  Nobody   knows  why; see"
  " note 12 of the guide. " * 3
)
ANSWERS = ("1980", "$5.6 million", "caf\u00e9", "M\u00fcnchen", "330",
           "330-metre", "Tower (built 1980s)", "why", "it's")  # fmt: skip


def tokenizer():
  return WordTokenizer(PIECES, lowercase=True)


@functools.cache
def vocabulary(kind):
  sizes = {"wordpiece": 140, "bpe": 140, "byte_bpe": 330, "unigram": 60}
  options = {"vocab_size": sizes[kind]} if kind in sizes else {}
  return training.train_tokenizer(
    kind, [CONTEXT] * 9, user_tokens=("[ENT]",), **options
  )


def record(answer, start, question="what is it ?"):
  return {
    "id": answer,
    "question": question,
    "context": CONTEXT,
    "answers": {"text": [answer], "answer_start": [start]},
  }


class WindowTest(parameterized.TestCase):
  @parameterized.product(
    answer=ANSWERS, seq_len=(48, 96, 400), style=("bert", "roberta")
  )
  def test_every_answer_comes_back_from_its_labels(
    self, answer, seq_len, style
  ):
    start = CONTEXT.index(answer, len(CONTEXT) // 3)
    kind = kinds.Questions(stride=17)
    features = kind.features(
      [record(answer, start)], tokenizer(), seq_len, PAIR_STYLES[style]
    )
    labels = features.arrays["labels"]
    shown = labels[:, 1] > 0
    self.assertTrue(shown.any())
    # A model that is sure of the labels, where the answer is shown.
    logits = np.zeros((*features.arrays["tokens"].shape, 2), np.float32)
    for row in np.flatnonzero(shown):
      logits[row, labels[row, 0], 0] = logits[row, labels[row, 1], 1] = 9.0
    (found,) = kind.answer(logits, features)
    self.assertEqual(found.text, answer)
    self.assertEqual(kind.score(logits, features)["exact"], 100.0)

  @parameterized.parameters(*training.TRAINERS)
  def test_answers_come_back_whatever_the_vocabulary(self, kind):
    trained = vocabulary(kind)
    context = CONTEXT.strip().replace("note 12", "note[ENT]12")
    pieces = squad.tokenize(context, trained)
    # As in a question, but for runs of spaces, which are one here.
    once = " ".join(context.split())
    np.testing.assert_array_equal(pieces.ids, trained.encode(once))
    self.assertIn(trained.piece_id("[ENT]"), pieces.ids)
    # Whole words: what is learned from so little joins their letters.
    for answer in (*ANSWERS[1:], "1980s", "[ENT]", "high"):
      start = context.index(answer)
      first, last = pieces.span(start, start + len(answer))
      found = context[pieces.starts[first] : pieces.ends[last]]
      self.assertEqual(found, answer)

  def test_of_a_context_without_tokens_there_is_no_score(self):
    empty = record("", 0) | {"context": " ", "answers": None}
    kind = kinds.Questions()
    features = kind.features([empty], tokenizer(), 32, PAIR_STYLES["bert"])
    logits = np.zeros((*features.arrays["tokens"].shape, 2), np.float32)
    (said,) = kind.predictions(logits, features)
    self.assertEqual(said, {"answer": "", "score": None, "null_score": 0.0})

  def test_windows_show_every_token_within_the_row(self):
    seq_len = 40
    words = tokenizer()
    features = kinds.Questions(stride=9).features(
      [record("why", CONTEXT.index("why"))], words, seq_len, PAIR_STYLES["bert"]
    )
    (pieces,), windows = features.facts[1:]
    covered = np.zeros(len(pieces.ids), bool)
    for row, w in enumerate(windows):
      covered[w.first : w.stop] = True
      place = slice(w.offset, w.offset + w.stop - w.first)
      tokens = features.arrays["tokens"][row]
      np.testing.assert_array_equal(tokens[place], pieces.ids[w.first : w.stop])
      self.assertEqual(tokens[place.stop], words.sep_id)
      self.assertTrue((features.arrays["type_ids"][row, place] == 1).all())
    self.assertTrue(covered.all())

  def test_tokens_are_those_of_the_whole_text(self):
    words = tokenizer()
    pieces = squad.tokenize(CONTEXT, words)
    np.testing.assert_array_equal(pieces.ids, words.encode(CONTEXT))

  def test_owner_has_most_context(self):
    ranges = squad.window_ranges(20, 10, 5)
    self.assertEqual(ranges, [(0, 10), (5, 15), (10, 20)])
    expected = [
      max(
        range(3),
        key=lambda i: (
          (a := ranges[i])[0] <= t < a[1] and 1 + min(t - a[0], a[1] - 1 - t)
        ),
      )
      for t in range(20)
    ]
    np.testing.assert_array_equal(squad.owners(ranges, 20), expected)

  def test_unanswerable_misplaced_and_unlabelled(self):
    start = CONTEXT.index("why")
    none = record("x", 0) | {"answers": {"text": [], "answer_start": []}}
    wrong = record("why", start + 1)
    unknown = record("why", start) | {"answers": None}
    with self.assertLogs(level="WARNING") as logs:
      features = kinds.Questions(null=True).features(
        [none, wrong, unknown], tokenizer(), 400, PAIR_STYLES["bert"]
      )
    np.testing.assert_array_equal(
      features.arrays["labels"], [[0, 0], [-1, -1], [-1, -1]]
    )
    self.assertIn("1 of 3 answers", logs.output[0])

  def test_long_answers_and_reversed_spans_are_never_given(self):
    text = " ".join("abcdefgh")
    pieces = squad.tokenize(text, tokenizer())
    window = squad.Window(0, 2, 0, 8)
    logits = np.zeros((1, 12, 2), np.float32)
    logits[0, 2, 0] = logits[0, 9, 1] = 5.0  # a .. h: eight tokens
    logits[0, 4, 1] = 4.0  # a .. c
    answer = squad.decode(text, pieces, [window], logits, max_answer_tokens=4)
    self.assertEqual(answer.text, "a b c")
    logits = np.zeros((1, 12, 2), np.float32)
    logits[0, 6, 0], logits[0, 4, 1] = 5.0, 4.0  # ends before it starts
    answer = squad.decode(text, pieces, [window], logits)
    self.assertTrue(answer.text.startswith("e"))

  @parameterized.parameters("question", "context")
  def test_what_is_no_text_is_refused(self, field):
    wrong = record("why", CONTEXT.index("why")) | {"id": "q7", field: None}
    with self.assertRaisesRegex(ValueError, f"'q7': {field} holds None"):
      kinds.Questions().features([wrong], tokenizer(), 32, PAIR_STYLES["bert"])

  def test_numbers_count_as_texts(self):
    answers = {"text": ["5"], "answer_start": [0]}
    asked = {"question": 4, "context": 5, "answers": answers}
    features = kinds.Questions().features(
      [asked], tokenizer(), 32, PAIR_STYLES["bert"]
    )
    self.assertTrue(features.labelled.all())
    shape = (*features.arrays["tokens"].shape, 2)
    (said,) = kinds.Questions().predictions(np.zeros(shape), features)
    self.assertEqual(said["answer"], "5")

  def test_too_short_rows_are_refused(self):
    with self.assertRaisesRegex(ValueError, "seq_len=9"):
      kinds.Questions().features(
        [record("why", CONTEXT.index("why"), "a b c d e f")],
        tokenizer(),
        9,
        PAIR_STYLES["bert"],
      )


class ScoreTest(parameterized.TestCase):
  @parameterized.parameters(
    ("The  Eiffel Tower!", "eiffel tower"),
    ("an apple a day", "apple day"),
    ("U.S.A.", "usa"),
    ("theatre, a", "theatre"),
    ("the", ""),
  )
  def test_normaliser(self, text, expected):
    self.assertEqual(squad.normalise(text), expected)

  def test_f1_counts_words_with_repetition(self):
    # 2 common of 3 and 4: precision 2/3, recall 1/2.
    self.assertAlmostEqual(squad.token_f1("to be to", "to be or not"), 4 / 7)
    self.assertEqual(squad.token_f1("", ""), 1.0)
    self.assertEqual(squad.token_f1("the", "word"), 0.0)

  def test_best_of_several_truths(self):
    answers = [squad.Answer("in Paris", 1.0, 0.0)]
    found = squad.score(answers, [["Paris", "in Paris"]], null=False)
    self.assertEqual(found, {"exact": 100.0, "f1": 100.0})

  def test_threshold_is_the_best_of_all(self):
    rng = np.random.default_rng(0)
    for _ in range(50):
      count = int(rng.integers(1, 9))
      margins = rng.integers(-3, 4, count).astype(float)  # with ties
      given, empty = rng.integers(0, 2, (2, count)).astype(float)
      best, threshold = squad.best_threshold(margins, given, empty)
      means = [
        np.where(margins > t, empty, given).mean()
        for t in np.arange(-4.5, 5, 0.5)
      ]
      self.assertAlmostEqual(best, max(means))
      self.assertAlmostEqual(
        np.where(margins > threshold, empty, given).mean(), best
      )

  def test_null_scores_decide(self):
    answers = [
      squad.Answer("wrong", score=1.0, null_score=2.0),
      squad.Answer("right", score=3.0, null_score=3.5),
    ]
    found = squad.score(answers, [[], ["right"]], null=True)
    self.assertEqual(found["exact"], 50.0)  # both are left unanswered
    self.assertEqual(found["best_exact"], 100.0)
    self.assertEqual(found["best_exact_threshold"], 0.5)


if __name__ == "__main__":
  absltest.main()
