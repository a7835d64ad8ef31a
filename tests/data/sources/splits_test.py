"""Splits, filters and selections of a source, on small files."""

import collections
import json
import pathlib
import tempfile

from absl.testing import absltest, parameterized

from bertjax import registry
from bertjax.data.sources import SOURCES, SPLITS, splits
from bertjax.tasks.records import READERS

_SHARES = dict(train=0.6, validation=0.2, test=0.2)
RULES = {
  "random": dict(fractions=_SHARES),
  "by_field": dict(field="author", fractions=_SHARES),
  "by_document": dict(fractions=_SHARES),
  "by_host": dict(fractions=_SHARES),
  "by_year": dict(until=dict(train=2012, validation=2015, test=2019)),
  "by_value": dict(
    field="author", values=dict(test=["a1", "a2"]), rest="train"
  ),
  "k_fold": dict(k=4, fold=1, validation=True),
}


def _record(i):
  return {
    "text": f"Text {i % 290} of all.",  # the last ten repeat the first
    "author": f"a{i % 30}",
    "document": f"d{i // 3}",
    "url": f"https://www.host{i % 40}.org/page/{i}",
    "date": f"{2005 + i % 16}-03-01",
    "link": "http://[b/2",
  }


class SourceTestCase(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.folder = pathlib.Path(folder)
    cls.records = [_record(i) for i in range(300)]
    cls.path = cls.folder / "a.jsonl"
    cls.path.write_text("\n".join(map(json.dumps, cls.records)))

  def build(self, **changes):
    features = ["author", "document", "url", "date", "link"]
    spec = dict(name="jsonl", paths=str(self.path), features=features)
    return registry.build(SOURCES, spec | changes, "data.source")

  def texts(self, source, split="train"):
    return [e["text"] for e in source.examples(split)]


class SplitTest(SourceTestCase):
  def test_every_rule_is_tested_here(self):
    self.assertEqual({*RULES, "given"}, set(SPLITS))

  @parameterized.parameters(*RULES)
  def test_splits_share_no_example_and_never_change(self, name):
    found = []
    for _ in range(2):
      source = self.build(split=dict(name=name, **RULES[name]))
      self.assertIn("train", source.splits)
      found.append({s: [e["id"] for e in source.examples(s)]
                    for s in source.splits})  # fmt: skip
    self.assertEqual(*found)
    ids = [i for part in found[0].values() for i in part]
    self.assertLen(set(ids), len(ids))
    if name != "by_year":  # which leaves the last year out
      self.assertLen(ids, 300)
    prints = {self.build().fingerprint(), source.fingerprint()}
    self.assertLen(prints, 2)

  @parameterized.parameters(
    ("by_field", "author", str),
    ("by_document", "document", str),
    ("by_host", "url", splits.host),
    ("k_fold", "author", str),
    ("random", "text", str),
  )
  def test_groups_stay_together(self, name, field, group):
    rule = dict(RULES[name])
    if name == "k_fold":
      rule["field"] = field
    source = self.build(split=dict(name=name, **rule))
    where = collections.defaultdict(set)
    for split in source.splits:
      for example in source.examples(split):
        where[group(example[field])].add(split)
    self.assertTrue(all(len(s) == 1 for s in where.values()), where)
    self.assertGreater(len(where), 20)

  def test_a_seed_deals_out_otherwise(self):
    rule = dict(name="random", fractions=_SHARES)
    a, b = (
      self.texts(self.build(split=rule | dict(seed=seed))) for seed in (0, 1)
    )
    self.assertNotEqual(a, b)
    # Fractions of a file source are the same rule under a shorter name.
    self.assertEqual(a, self.texts(self.build(fractions=_SHARES)))

  @parameterized.parameters(
    (dict(name="random"), "text"), (dict(name="by_host"), "url")
  )
  def test_what_is_divided_is_divided_again_independently(self, rule, field):
    rule = rule | dict(fractions=dict(train=0.5, test=0.5))
    spec = dict(name="jsonl", paths=str(self.path), features=["url"])
    part = spec | dict(split=rule)
    for seed in (0, 1):
      mixture = dict(
        name="mixture",
        sources=[part],
        filters=["letters"],
        split=rule | dict(seed=seed),
      )
      twice = registry.build(SOURCES, mixture, "data.source")
      kept = [{e[field] for e in twice.examples(s)} for s in twice.splits]
      # Near a half; the same hash would leave nothing for the test.
      self.assertBetween(len(kept[0]) / len(kept[0] | kept[1]), 0.25, 0.75)
      if seed:  # another seed is independent without more ado, as it was
        once = self.build(split=rule | dict(seed=seed))
        self.assertLess(kept[0], {e[field] for e in once.examples("train")})

  def test_by_year_tests_what_came_later(self):
    source = self.build(split=dict(name="by_year", **RULES["by_year"]))
    years = {
      s: {splits.year(e["date"]) for e in source.examples(s)}
      for s in source.splits
    }
    self.assertEqual(years["train"], set(range(2005, 2013)))
    self.assertEqual(years["validation"], {2013, 2014, 2015})
    self.assertEqual(years["test"], {2016, 2017, 2018, 2019})

  def test_one_value_is_a_list_of_one(self):
    one, several = (
      self.build(split=dict(name="by_value", field="author", values=values))
      for values in (dict(test="a1"), dict(test=["a1"]))
    )
    self.assertEqual(self.texts(one, "test"), self.texts(several, "test"))

  def test_folds_cover_everything_once_and_are_of_one_size(self):
    folds = [
      self.build(split=dict(name="k_fold", k=4, fold=i)) for i in range(4)
    ]
    tested = [set(self.texts(fold, "test")) for fold in folds]
    self.assertEqual(sorted(map(len, tested)), [72, 72, 73, 73])  # of 290
    self.assertLen(set.union(*tested), 290)
    for fold, mine in zip(folds, tested):
      self.assertFalse(mine & set(self.texts(fold)))

  def test_given_splits_are_renamed_and_joined(self):
    split = dict(name="k_fold", k=4, fold=0, validation=True)
    parts = self.build(split=split)
    names = dict(train=["train", "test"], test="validation")
    source = splits.build_split(parts, dict(name="given", names=names), "split")
    self.assertEqual(source.splits, ("train", "test"))
    self.assertEqual(self.texts(source, "test"),
                     self.texts(parts, "validation"))  # fmt: skip
    both = self.texts(parts) + self.texts(parts, "test")
    self.assertEqual(self.texts(source), both)

  def test_tasks_take_them_too(self):
    spec = dict(name="jsonl", paths=str(self.path))
    spec["split"] = dict(name="k_fold", k=3, fold=2, field="author")
    source = registry.build(READERS, spec, "data.task.source")
    authors = [{e["author"] for e in source.examples(s)} for s in source.splits]
    self.assertFalse(authors[0] & authors[1])

  @parameterized.named_parameters(
    ("name", dict(name="by_yaer"), "split.name='by_yaer'.*'by_year'"),
    ("fold", dict(name="k_fold", k=3, fold=3), r"fold=3 must lie in 0\.\.2"),
    ("k", dict(name="k_fold", k=2, fold=0, validation=True), "at least 3"),
    ("years", dict(name="by_year", until=dict(a=2012, b=2011)), "ascending"),
    (
      "twice",
      dict(name="by_value", field="author", values=dict(a=["x"], b=["x"])),
      "'x' is in 'a' and in 'b'",
    ),
    ("sum", dict(name="random", fractions=dict(a=0.8, b=0.4)), "sum to 1.2"),
    ("given", dict(name="given", names=dict(a="dev")), "'dev' is unknown"),
    (
      "given_twice",
      dict(name="given", names=dict(a="train", b="train")),
      "'train' is in 'a' and in 'b'",
    ),
  )
  def test_bad_options(self, split, message):
    with self.assertRaisesRegex(ValueError, message):
      self.build(split=split)

  @parameterized.named_parameters(
    ("field", dict(name="by_field", field="site", fractions=_SHARES),
     "no field 'site'; it has author"),
    ("year", dict(name="by_year", field="author", until=dict(train=2000)),
     "author of example .*'a0' names no year"),
    ("host", dict(name="by_host", field="link", fractions=_SHARES),
     r"link of example .*'http://\[b/2' names no host \(Invalid IPv6"),
    ("folds", dict(name="k_fold", k=31, fold=0, field="author"),
     "k=31 exceeds the 30 distinct values of 'author'"),
    ("empty", dict(name="by_value", field="author", values=dict(train=["z"])),
     "no example in split 'train'"),
  )  # fmt: skip
  def test_what_the_examples_lack(self, split, message):
    source = self.build(split=split)
    with self.assertRaisesRegex(ValueError, message):
      list(source.examples("train"))

  @parameterized.parameters(
    ("https://www.a.org/x?y", "a.org"),
    ("http://b.c.org:80", "b.c.org"),
    ("a.org/page", "a.org"),
    ("a.org:80/go?to=http://b.org/1", "a.org"),
    ("//a.org/page", "a.org"),
  )
  def test_host(self, url, expected):
    self.assertEqual(splits.host(url), expected)


class FilterTest(SourceTestCase):
  def kept(self, texts, *filters):
    path = self.folder / "texts.jsonl"
    lines = [json.dumps({"text": t, "kind": t[:1]}) for t in texts]
    path.write_text("\n".join(lines))
    source = self.build(paths=str(path), features=["kind"], filters=filters)
    self.assertEqual(self.texts(source), self.texts(source))
    return self.texts(source)

  @parameterized.named_parameters(
    ("short", dict(name="length", min_words=3), ["a b c", "a b c d"]),
    ("long", dict(name="length", max_chars=3), ["a", "λ δ", "1 2"]),
    ("script", dict(name="script", scripts="Greek"), ["λ δ"]),
    ("letters", dict(name="letters", min_share=0.5, min_count=2),
     ["a b c", "λ δ", "a b c d"]),
    ("found", dict(name="matches", pattern=r"b\b"), ["a b c", "a b c d"]),
    ("not", dict(name="matches", pattern=r"b\b", keep=False),
     ["a", "λ δ", "1 2"]),
    ("field", dict(name="field", field="kind", values=["1", "λ"]),
     ["λ δ", "1 2"]),
    ("number", dict(name="field", field="kind", values=1), ["1 2"]),
  )  # fmt: skip
  def test_rules(self, rule, expected):
    texts = ["a", "a b c", "λ δ", "1 2", "a b c d"]
    self.assertEqual(self.kept(texts, rule), expected)

  def test_dedupe_ignores_case_and_spaces(self):
    self.assertEqual(self.kept(["A b", "c", "a  B", "c d"], "dedupe"),
                     ["A b", "c", "c d"])  # fmt: skip

  @parameterized.named_parameters(
    ("name", "lenght", r"filters\[0\].name='lenght'.*'length'"),
    ("bounds", dict(name="length", min_words=3, max_words=2), "leave nothing"),
    ("share", dict(name="script", scripts="latin", min_share=2), "in 0..1"),
    ("pattern", dict(name="matches", pattern="("), "no regular expression"),
    ("option", dict(name="length", min=3), r"filters\[0\].min is not an opt"),
  )
  def test_bad_options(self, rule, message):
    with self.assertRaisesRegex(ValueError, message):
      self.build(filters=[rule])

  def test_nothing_left_is_said(self):
    with self.assertRaisesRegex(ValueError, "Check its paths, filters"):
      self.kept(["a"], dict(name="length", min_words=5))


class SelectTest(SourceTestCase):
  def chosen(self, **select):
    return self.texts(self.build(select=select))

  def test_top_and_bottom_by_length(self):
    path = self.folder / "words.jsonl"
    texts = [" ".join(["w"] * n) for n in (3, 9, 1, 7, 5)]
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    for keep, expected in (("top", [9, 7]), ("bottom", [3, 1])):
      source = self.build(
        paths=str(path),
        features=[],
        select=dict(keep=keep, count=2, scorer=dict(name="length")),
      )
      found = [len(t.split()) for t in self.texts(source)]
      self.assertEqual(found, expected)  # in the order of the source

  def test_a_word_list_scores_its_share(self):
    path = self.folder / "words.txt"
    path.write_text("7\n17\n")
    for given in (dict(words=["7", "17"]), dict(path=str(path))):
      scorer = dict(name="word_list", **given)
      found = self.chosen(keep="top", count=3, scorer=scorer)
      # These two; the first of them again among the repeated ones.
      self.assertEqual(found, [f"Text {i} of all." for i in (7, 17, 7)])

  def test_random_depends_on_the_seed_alone_and_shares_count(self):
    a = self.chosen(keep="random", share=0.1)
    self.assertLen(a, 30)
    self.assertEqual(a, self.chosen(keep="random", share=0.1))
    self.assertNotEqual(a, self.chosen(keep="random", share=0.1, seed=1))
    # A smaller choice is part of a larger one.
    few = self.chosen(keep="random", count=5)
    self.assertLessEqual(set(few), set(a))

  def test_it_sees_filtered_texts_and_comes_before_the_split(self):
    source = self.build(
      preprocess=[dict(name="replace", pattern=" of all")],
      filters=["dedupe", dict(name="matches", pattern="^Text .[05]")],
      select=dict(keep="random", count=20),
      split=dict(name="random", fractions=dict(train=0.5, test=0.5)),
    )
    parts = [self.texts(source, s) for s in ("train", "test")]
    self.assertEqual(sum(map(len, parts)), 20)
    for text in parts[0] + parts[1]:
      self.assertRegex(text, r"^Text .[05]\d?\.$")

  @parameterized.named_parameters(
    ("keep", dict(keep="best", count=1), "select.keep='best' is unknown"),
    ("both", dict(keep="random", count=1, share=0.1), "one of count and share"),
    ("share", dict(keep="random", share=1.5), "share=1.5 must be above 0"),
    ("count", dict(keep="random", count=0), "count=0 must be at least 1"),
    ("scorer", dict(keep="top", count=1), "select.scorer .*'top'"),
    (
      "row",
      dict(keep="top", count=1, scorer=dict(name="lenght")),
      "select.scorer.name='lenght'.*'length'",
    ),
    (
      "words",
      dict(keep="top", count=1, scorer=dict(name="word_list")),
      "one of words and path",
    ),
  )
  def test_bad_options(self, select, message):
    with self.assertRaisesRegex(ValueError, message):
      self.build(select=select)


if __name__ == "__main__":
  absltest.main()
