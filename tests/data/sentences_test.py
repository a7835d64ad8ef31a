# ruff: noqa: RUF001 - texts of many scripts
import hypothesis
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from bertjax.data import sentences

# Texts made of what the rules look at, so that every rule meets every other.
_ATOMS = st.sampled_from(
  ["Dr.", "e.g.", "etc.", "J.", "3.14", "1.", "The", "cat", "U.S.", "…", "\n"]  # noqa: RUF005
  + ["\n\n", "- ", " ", "!", "?", '."', ").", "。", "一", "।", "है", "Args:\n"]
)
_TEXTS = st.lists(_ATOMS, max_size=30).map(" ".join) | st.text(max_size=80)


def _visible(text):
  return "".join(text.split())


class SplittersTest(parameterized.TestCase):
  @parameterized.parameters(sorted(sentences.SPLITTERS))
  def test_keeps_every_visible_character_in_order(self, name):
    splitter = sentences.SPLITTERS[name]

    @hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
    @hypothesis.given(_TEXTS)
    def check(text):
      parts = splitter(text)
      self.assertEqual(_visible("".join(parts)), _visible(text))
      for part in parts:
        self.assertTrue(part)
        self.assertEqual(part, " ".join(part.split()))

    check()

  @parameterized.parameters(sorted(sentences.SPLITTERS))
  def test_blank_text_has_no_sentence(self, name):
    self.assertEqual(sentences.SPLITTERS[name](" \n\t \r\n "), [])

  def test_units(self):
    text = "One. Two.\nThree.\n \nFour."
    self.assertEqual(sentences.lines(text), ["One. Two.", "Three.", "Four."])
    self.assertEqual(sentences.paragraphs(text), ["One. Two. Three.", "Four."])
    self.assertEqual(
      sentences.sentences(text), ["One.", "Two.", "Three.", "Four."]
    )
    self.assertEqual(sentences.whole(text), ["One. Two. Three. Four."])

  @parameterized.parameters(
    ("Dr. Smith met J. R. R. Tolkien. They talked.",),
    ("Pi is 3.14 in version 1.2.3 here. Use it.",),
    ("See Fig. 3, eq. 2 and e.g. Table 4. Then go on.",),
    ('"Really?" he asked. "Yes!"',),
    ("Acme Inc. (1990) was founded. It grew.",),
    ("It ended at 5 p.m. We left.",),
    ("He said (in brackets.) Then he left.",),
    ("Wait... what is it? Nothing.",),
  )
  def test_two_sentences(self, text):
    self.assertLen(sentences.sentences(text), 2, sentences.sentences(text))

  @parameterized.named_parameters(
    ("chinese", "他来了。她走了！真的？", ["他来了。", "她走了！", "真的？"]),
    ("quoted_japanese", "「はい。」と言った。", ["「はい。」", "と言った。"]),
    ("hindi", "यह एक वाक्य है। यह दूसरा है।", ["यह एक वाक्य है।", "यह दूसरा है।"]),
    ("urdu", "یہ ایک ہے۔ یہ دو ہے۔", ["یہ ایک ہے۔", "یہ دو ہے۔"]),
  )
  def test_terminators_of_other_scripts(self, text, expected):
    self.assertEqual(sentences.sentences(text), expected)

  def test_wrapped_lines_join_and_list_items_part(self):
    text = "A sentence over\ntwo lines.\nItems:\n- first thing\n- second thing"
    self.assertEqual(
      sentences.sentences(text),
      [
        "A sentence over two lines.",
        "Items:",
        "- first thing",
        "- second thing",
      ],
    )

  def test_line_ends_of_other_systems_make_no_difference(self):
    text = "One is here.\n\nTwo\nis here. Three."
    for end in ("\r\n", "\r"):
      self.assertEqual(
        sentences.sentences(text.replace("\n", end)), sentences.sentences(text)
      )


if __name__ == "__main__":
  absltest.main()
