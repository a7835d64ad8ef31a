"""Parts of sources: together they are the split, apart they open no others."""

import json
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from bertjax import registry
from bertjax.data.sources import SOURCES, base, files

_SHARES = dict(train=0.6, test=0.4)
_COUNTS = (7, 0, 5, 9)  # documents of each file


class PartsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.folder = pathlib.Path(folder)
    for number, count in enumerate(_COUNTS):
      lines = [
        json.dumps({"text": f"Text {i % 6} of <b>{number}</b>.", "author": i})
        for i in range(count)
      ]
      (cls.folder / f"{number}.jsonl").write_text("\n".join(lines))

  def build(self, **changes):
    spec = dict(name="jsonl", paths=f"{self.folder}/*", features=["author"])
    return registry.build(SOURCES, spec | changes, "data.source")

  def mixture(self, **changes):
    here = dict(name="jsonl", paths=f"{self.folder}/*", fractions=_SHARES)
    sources = [here, dict(name="grammar", seed=3), here]
    spec = dict(name="mixture", sources=sources)
    return registry.build(SOURCES, spec | changes, "data.source")

  def check(self, source, parts):
    self.assertNotEmpty(source.splits)
    for split in source.splits:
      found = base.parts(source, split)
      self.assertLen(found, parts)
      # Backwards: none needs that another one was read before it.
      read = [list(part()) for part in reversed(found)][::-1]
      together = [example for part in read for example in part]
      self.assertEqual(together, list(source.examples(split)))

  @parameterized.named_parameters(
    ("files", {}),
    ("preprocess", dict(preprocess=["strip_html"])),
    ("filters", dict(filters=[dict(name="matches", pattern="[135] of")])),
    ("hash", dict(split=dict(name="random", fractions=_SHARES))),
    (
      "fields",
      dict(split=dict(name="by_value", field="author", values=dict(train=[1]))),
    ),
    ("folds", dict(split=dict(name="k_fold", k=3, fold=1))),
    (
      "all_of_it",
      dict(
        preprocess=["strip_html"],
        filters=[dict(name="length", max_words=9)],
        split=dict(name="random", fractions=_SHARES),
      ),
    ),
  )
  def test_one_a_file(self, changes):
    self.check(self.build(**changes), len(_COUNTS))

  @parameterized.named_parameters(
    # What they keep depends on all that came before.
    ("dedupe", dict(filters=["dedupe", "letters"])),
    ("select", dict(select=dict(keep="random", count=8))),
  )
  def test_what_looks_at_all_is_one_part(self, changes):
    self.check(self.build(**changes), 1)

  def test_joined_splits_have_the_parts_of_both(self):
    paths = {"a": [f"{self.folder}/[01]*", f"{self.folder}/2*"],
             "b": f"{self.folder}/3*"}  # fmt: skip
    source = self.build(
      paths=paths, split=dict(name="given", names=dict(train=["b", "a"]))
    )
    self.check(source, 4)

  def test_a_mixture_has_those_of_its_sources(self):
    source = self.mixture(dupe_factors=[2.5, 0.01, 0.5])
    found = base.parts(source, "train")
    self.assertLen(found, 2 * len(_COUNTS) + 1)  # a grammar is one
    read = [list(part()) for part in reversed(found)][::-1]
    together = [example for part in read for example in part]
    self.assertEqual(together, list(source.examples("train")))
    self.assertEqual({e["component"] for e in together}, {0, 1, 2})
    self.assertEqual({e["copy"] for e in together}, {0, 1, 2})

  def test_a_part_opens_its_file_alone(self):
    source = self.build(preprocess=["strip_html"])
    with mock.patch.object(
      files, "open_binary", wraps=files.open_binary
    ) as opened:
      self.assertLen(list(base.parts(source, "train")[2]()), 5)
    self.assertEqual(
      [call.args for call in opened.call_args_list],
      [(f"{self.folder}/2.jsonl",)],
    )

  def test_an_unknown_split_is_refused(self):
    for source in (self.build(), self.mixture()):
      with self.assertRaisesRegex(ValueError, "split='dev' is unknown"):
        base.parts(source, "dev")


if __name__ == "__main__":
  absltest.main()
