import gzip
import json
import lzma
import pathlib
import tempfile

import ml_collections
import numpy as np
import pyarrow
import pyarrow.parquet
from absl.testing import absltest, parameterized

from bertjax import registry
from bertjax.data import cache_build
from bertjax.data.sources import CORPORA, PREPROCESSORS, SOURCES
from bertjax.data.sources import mixture as mixture_lib
from bertjax.data.text import TextData


class _Words:
  """A tokenizer of numbered words: "w17" is 17."""

  def encode_batch(self, texts):
    return [np.array([int(w[1:]) for w in t.split()], np.int32) for t in texts]

  def fingerprint(self):
    return "words"


class SourceTestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def jsonl(self, name, texts, **options):
    path = self.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    return {"name": "jsonl", "paths": str(path), **options}

  def build(self, **spec):
    return registry.build(SOURCES, spec, "data.source")


class MixtureTest(SourceTestCase):
  def setUp(self):
    super().setUp()
    self.a = self.jsonl("a.jsonl", [f"w{i}" for i in range(1000)])
    self.b = self.jsonl("b.jsonl", [f"w{i} w1" for i in range(5000, 5200)])

  def counts(self, source, split="train"):
    texts = [e["text"] for e in source.examples(split)]
    first = [t for t in texts if " " not in t]
    return len(first), len(texts) - len(first)

  def test_without_factors_it_concatenates(self):
    source = self.build(name="mixture", sources=[self.a, self.b])
    texts = [e["text"] for e in source.examples("train")]
    self.assertLen(texts, 1200)
    self.assertEqual((texts[0], texts[1000]), ("w0", "w5000 w1"))

  def test_factors_repeat_and_subsample(self):
    source = self.build(
      name="mixture", sources=[self.a, self.b], dupe_factors=[0.3, 2]
    )
    a, b = self.counts(source)
    # Binomial of 1000 at 0.3: standard deviation 14.5; four of them.
    self.assertBetween(a, 240, 360)
    self.assertEqual(b, 400)
    self.assertEqual(list(source.examples("train")),
                     list(source.examples("train")))  # fmt: skip

  def test_a_smaller_factor_keeps_a_subset(self):
    kept = [
      {k for k in map(str, range(500)) if mixture_lib.copies(f, k)}
      for f in (0.2, 0.5, 1.0)
    ]
    self.assertLess(kept[0], kept[1])
    self.assertLess(kept[1], kept[2])
    self.assertLen(kept[2], 500)

  @parameterized.parameters("documents", "characters")
  def test_weights_are_the_shares_that_result(self, unit):
    source = self.build(
      name="mixture", sources=[self.a, self.b], weights=[1, 3], unit=unit
    )
    sizes = [0, 0]
    for example in source.examples("train"):
      size = 1 if unit == "documents" else len(example["text"])
      sizes[" " in example["text"]] += size
    # About 67 of 1000 documents are kept: standard deviation 8 of them.
    self.assertAlmostEqual(sizes[1] / sum(sizes), 0.75, delta=0.09)
    self.assertEqual(max(source.factors()), 1)

  @parameterized.parameters(0.0, 0.7, 1.0)
  def test_alpha_flattens_the_shares(self, alpha):
    source = self.build(
      name="mixture", sources=[self.a, self.b], alpha=alpha, unit="documents"
    )
    a, b = self.counts(source)
    self.assertEqual(b, 200)  # the scarcer one stays whole
    # 5 times as many documents become 5^alpha times as many; the standard
    # deviation of their number is 16 at most.
    self.assertAlmostEqual(a / 200, 5**alpha, delta=0.3 * (alpha < 1))

  @parameterized.parameters(
    dict(alpha=0.7), dict(weights=[1, 1]), dict(targets=[9, 9])
  )
  def test_a_source_without_a_character_has_no_share(self, **way):
    empty = self.jsonl("empty.jsonl", ["", ""])
    source = self.build(name="mixture", sources=[self.a, empty], **way)
    with self.assertRaisesRegex(
      ValueError, r"sources\[1\] of .*'jsonl', has 0 characters"
    ):
      list(source.examples("train"))

  def test_components_reach_the_cache(self):
    nested = dict(name="mixture", sources=[self.a, self.b])
    source = self.build(name="mixture", sources=[self.b, nested])
    cache = cache_build.build_cache(
      source, "train", _Words(), "none", self.folder / "cache"
    )
    # The nested copy of b is all duplicates; the outermost position counts.
    np.testing.assert_array_equal(
      cache.document_sources, [0] * 200 + [1] * 1000
    )

  def test_copies_survive_the_removal_of_duplicates(self):
    source = self.build(name="mixture", sources=[self.b], dupe_factors=[3])
    cache = cache_build.build_cache(
      source, "train", _Words(), "none", self.folder / "cache"
    )
    self.assertEqual((cache.num_documents, cache.duplicates), (600, 0))

  def test_copies_of_a_nested_mixture_survive_as_well(self):
    inner = dict(name="mixture", sources=[self.b], dupe_factors=[3])
    source = self.build(
      name="mixture", sources=[inner, self.a], dupe_factors=[2, 1]
    )
    cache = cache_build.build_cache(
      source, "train", _Words(), "none", self.folder / "cache"
    )
    self.assertEqual(cache.duplicates, 0)
    self.assertEqual(np.bincount(cache.document_sources).tolist(), [1200, 1000])

  def test_held_out_splits_are_not_reweighted(self):
    shares = {"train": 0.5, "test": 0.5}
    parts = [{**self.a, "fractions": shares}, self.b]
    source = self.build(name="mixture", sources=parts, dupe_factors=[0.1, 1])
    plain = self.build(**parts[0])
    self.assertEqual(source.splits, ("train", "test"))
    self.assertEqual(self.counts(source, "test"), self.counts(plain, "test"))
    self.assertEqual(self.counts(source, "test")[1], 0)

  def test_targets_repeat_and_subsample(self):
    source = self.build(
      name="mixture",
      sources=[self.a, self.b],
      targets=[300, 500],
      unit="documents",
    )
    a, b = self.counts(source)
    # Binomials: standard deviations 14.5 and 7; four of them.
    self.assertAlmostEqual(a, 300, delta=58)
    self.assertAlmostEqual(b, 500, delta=28)

  def test_fingerprint_follows_parts_and_factors(self):
    prints = {
      self.build(name="mixture", **spec).fingerprint()
      for spec in (
        dict(sources=[self.a, self.b]),
        dict(sources=[self.b, self.a]),
        dict(sources=[self.a]),
        dict(sources=[self.a, self.b], dupe_factors=[1, 2]),
        dict(sources=[self.a, self.b], weights=[1, 2]),
        dict(sources=[self.a, self.b], weights=[1, 2], unit="documents"),
        dict(sources=[self.a, self.b], alpha=0.5),
        dict(sources=[self.a, self.b], alpha=0.7),
        dict(sources=[self.a, self.b], targets=[1, 2]),
        dict(sources=[self.a, self.b], targets=[1, 2], unit="tokens"),
      )
    }
    self.assertLen(prints, 10)

  def test_config_dict_builds_it(self):
    config = ml_collections.ConfigDict(
      dict(
        name="mixture",
        sources=[self.a, {**self.b, "fractions": {"train": 0.9}}],
      )
    )
    source = registry.build(SOURCES, config, "data.source")
    self.assertEqual(self.counts(source)[0], 1000)
    self.assertBetween(self.counts(source)[1], 160, 199)

  @parameterized.named_parameters(
    ("both", dict(weights=[1], dupe_factors=[1]), "takes one of dupe_f"),
    ("alpha", dict(alpha=1.5), "alpha=1.5 of source 'mixture' must lie in"),
    ("length", dict(weights=[1, 2]), "each of its 1 sources"),
    ("targets", dict(targets=[1, 2]), "targets=.*each of its 1 sources"),
    ("sign", dict(dupe_factors=[-1]), "positive"),
    ("unit", dict(unit="bytes"), "unit='bytes'.*documents, characters"),
    ("none", dict(sources=[]), "at least one"),
    ("inner", dict(sources=[{"name": "jsonlines"}]),
     r"sources\[0\].name='jsonlines'.*mean 'jsonl'"),
    ("option", dict(sources=[{"name": "jsonl", "path": "x"}]),
     r"sources\[0\].path.*mean 'paths'"),
  )  # fmt: skip
  def test_bad_options(self, spec, message):
    with self.assertRaisesRegex(ValueError, message):
      self.build(name="mixture", **{"sources": [self.a], **spec})


class MeasuredMixtureTest(SourceTestCase):
  """Units that only a tokenizer and the way of making rows can tell."""

  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)

    def texts(count, words, length):
      return [
        " ".join(rng.choice(words, length)) + f" {number}."
        for number in range(count)
      ]

    # Long words that the vocabulary must spell in pieces, and short ones.
    self.rich = self.jsonl("rich.jsonl", texts(400, ["cat", "dog", "ox"], 40))
    rare = ["internationalisation", "thermodynamically", "electroencephalogram"]
    self.poor = self.jsonl("poor.jsonl", texts(100, rare, 9))

  def data(self, **mixture):
    parts = [self.rich, self.poor]
    source = dict(name="mixture", sources=parts) | mixture
    # Wrapped, so that the measure has to find its way in.
    source |= dict(filters=[dict(name="length", min_words=2)])
    spec = dict(
      source=source,
      tokenizer=dict(name="train", kind="wordpiece", vocab_size=60),
      seq_len=32,
      batch_size=4,
      instances=dict(name="packed"),
      masking=dict(rate=0.15),
    )
    cache = self.folder / "cache"
    return registry.call(TextData, spec, "data", seed=0, cache_dir=cache)

  def test_weights_by_tokens(self):
    cache = self.data(weights=[1, 1], unit="tokens").cache("train")
    lengths, origin = cache.document_lengths, cache.document_sources
    tokens = [lengths[origin == i].sum() for i in range(2)]
    # One source is subsampled at random, by documents of nearly one length.
    self.assertAlmostEqual(tokens[0] / sum(tokens), 0.5, delta=0.06)
    self.assertGreater(cache.num_documents, 100)

  def test_targets_in_instances(self):
    data = self.data(targets=[200, 1200], unit="instances")
    rows = data.dataset().rows_per_epoch(0)
    self.assertAlmostEqual(rows, 1400, delta=80)  # five standard deviations
    origin = data.cache("train").document_sources
    self.assertGreater((origin == 1).sum(), 100)  # the poor one is repeated

  def test_the_cache_depends_on_how_rows_are_made(self):
    prints = {
      self.data(targets=[200, 300], unit=unit).source.fingerprint()
      for unit in ("instances", "tokens", "documents")
    }
    self.assertLen(prints, 3)


class PreprocessTest(SourceTestCase):
  @parameterized.named_parameters(
    (
      "tags",
      "<p>A <b>bold</b> word.</p><p>B &amp; C</p>",
      "A bold word. B & C",
    ),
    ("script", "x<script>if (a<b) {}</script><!-- <p> -->y", "xy"),
    ("no_tag", "if a < b and c > d", "if a < b and c > d"),
    ("break", "one<br/>two<li>three", "one two three"),
    (
      "table",
      "<table><caption>C</caption><thead><tr><th>a</th><th id=x>b</th></tr>"
      "</thead><tr><td>1<TD>2</table>",
      "C a b 1 2",
    ),
    ("terms", "<dl><dt>one<dd>two</dd><dt>three</dl>", "one two three"),
    ("rule", "one<hr>two", "one two"),
    (
      "page",
      "<title>a</title><header>b</header><nav>c</nav><main>d</main><form>e"
      "</form><figure>f<figcaption>g</figcaption></figure><aside>h</aside>"
      "<footer>i</footer>",
      "a b c d e f g h i",
    ),
    ("inline", "<thing>w</thing><b>or</b><tdx>d</tdx>s", "words"),
  )
  def test_strip_html(self, text, expected):
    found = PREPROCESSORS["strip_html"](text)
    self.assertEqual(" ".join(found.split()), expected)

  def test_rows_of_a_table_are_lines(self):
    table = "<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>"
    found = PREPROCESSORS["strip_html"](table).split("\n")
    self.assertEqual([x for x in found if x], ["\ta\tb", "\tc"])

  def test_collapse_whitespace_keeps_paragraphs(self):
    self.assertEqual(
      PREPROCESSORS["collapse_whitespace"](" a \t b \n\n\n\n c\u00a0d\n"),
      "a b\n\nc d",
    )

  def test_every_source_takes_named_functions_in_order(self):
    spec = self.jsonl("a.jsonl", ["<p>cafe\u0301   &lt;p&gt;</p>"])
    source = self.build(
      **spec, preprocess=["strip_html", "unicode_nfc", "collapse_whitespace"]
    )
    (example,) = source.examples("train")
    self.assertEqual(example["text"], "café <p>")
    other = self.build(**spec, preprocess=["unicode_nfc", "strip_html"])
    prints = {s.fingerprint() for s in (source, other, self.build(**spec))}
    self.assertLen(prints, 3)
    with self.assertRaisesRegex(ValueError, "preprocess='strip'.*mean"):
      self.build(**spec, preprocess=["strip"])


class CorpusOfFilesTest(SourceTestCase):
  """Each corpus that comes as files, on a small file of the same format."""

  def _write(self, corpus, count):
    texts = [f"Text {i} of {corpus}." for i in range(count)]
    field = {"oscar": "content"}.get(corpus, "text")
    lines = "\n".join(
      json.dumps({field: t, "id": f"n{i}"}) for i, t in enumerate(texts)
    )
    if corpus == "books":
      for i, text in enumerate(texts):
        (self.folder / f"{i}.txt").write_text(text)
    elif corpus == "cc100":
      content = "\n\n".join(texts).encode()
      (self.folder / "tr.txt.xz").write_bytes(lzma.compress(content))
    elif corpus == "fineweb":
      rows = [{"text": t, "id": str(i)} for i, t in enumerate(texts)]
      pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), self.folder / "000.parquet"
      )
    elif corpus == "pubmed":
      articles = "".join(
        f"<PubmedArticle><MedlineCitation><PMID>{i}</PMID><Article>"
        f"<Abstract><AbstractText>{t}</AbstractText></Abstract></Article>"
        "</MedlineCitation></PubmedArticle>"
        for i, t in enumerate(texts)
      )
      (self.folder / "pubmed26n0001.xml.gz").write_bytes(
        gzip.compress(
          f"<PubmedArticleSet>{articles}</PubmedArticleSet>".encode()
        )
      )
    else:
      name = {"oscar": "tr_meta/tr_part_1.jsonl.gz", "dolma": "v1/a.json.gz",
              "openwebtext": "shard.jsonl.gz"}[corpus]  # fmt: skip
      path = self.folder / name
      path.parent.mkdir(exist_ok=True)
      path.write_bytes(gzip.compress(lines.encode()))
    return texts

  @parameterized.parameters(
    sorted(name for name, row in CORPORA.items() if row.reader != "tfds")
  )
  def test_reads_its_format(self, corpus):
    texts = self._write(corpus, 60)
    language = {} if CORPORA[corpus].language is None else {"language": "tr"}
    source = self.build(
      name="corpus",
      corpus=corpus,
      data_dir=str(self.folder),
      fractions={"train": 0.5, "test": 0.5},
      **language,
    )
    found = [e["text"] for s in source.splits for e in source.examples(s)]
    self.assertCountEqual(found, texts)
    self.assertEqual(source.licence, CORPORA[corpus].licence)

  def test_rows_say_licence_and_how_to_get_the_data(self):
    for row in CORPORA.values():
      self.assertTrue(row.licence)
      self.assertTrue(row.prepare)

  @parameterized.named_parameters(
    (
      "corpus",
      dict(corpus="wikipedea"),
      "corpus='wikipedea'.*mean 'wikipedia'",
    ),
    ("folder", dict(corpus="pubmed"), "data_dir is required.*baseline"),
    (
      "language",
      dict(corpus="pubmed", language="de"),
      "no choice of languages",
    ),
    (
      "shares",
      dict(corpus="pg19", fractions={"train": 1}),
      "splits of its own",
    ),
  )
  def test_bad_options(self, spec, message):
    with self.assertRaisesRegex(ValueError, message):
      self.build(name="corpus", **spec)


if __name__ == "__main__":
  absltest.main()
