import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import pathlib
import tempfile
from unittest import mock

import pyarrow
import pyarrow.parquet
from absl.testing import absltest, parameterized

from bertjax import registry
from bertjax.data.sources import SOURCES, base, files, preprocess


def _zstd(content):
  out = pyarrow.BufferOutputStream()
  with pyarrow.CompressedOutputStream(out, "zstd") as stream:
    stream.write(content)
  return out.getvalue().to_pybytes()


_COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress,
             ".xz": lzma.compress, ".zst": _zstd}  # fmt: skip
# Texts that every format must carry unharmed: quotes, line ends, scripts.
_TEXTS = ['He said "no",\nthen left.', "a\tb, c\r\nd", "भाषा 語 é", " spaced "]
_RECORDS = [
  {"text": text, "key": f"k{i}", "year": str(1990 + i)}
  for i, text in enumerate(_TEXTS)
]

_ARTICLE = """
<PubmedArticle><MedlineCitation><PMID Version="1">{pmid}</PMID>
  <Article><ArticleTitle>Effects of <i>E. coli</i> {pmid}.</ArticleTitle>
  {abstract}</Article>
  <MeshHeadingList><MeshHeading><DescriptorName UI="D1">Humans</DescriptorName>
    <QualifierName>x</QualifierName></MeshHeading>
  <MeshHeading><DescriptorName>Mice</DescriptorName></MeshHeading>
  </MeshHeadingList></MedlineCitation></PubmedArticle>"""
_ABSTRACTS = [
  "<Abstract><AbstractText>One H<sub>2</sub>O &amp; more.</AbstractText>"
  "</Abstract>",
  "",
  '<Abstract><AbstractText Label="METHODS">We did.</AbstractText>'
  '<AbstractText Label="RESULTS">It\n  worked.</AbstractText></Abstract>',
]
_PUBMED = (
  '<?xml version="1.0" encoding="utf-8"?>\n<PubmedArticleSet>'
  + "".join(
    _ARTICLE.format(pmid=11 + i, abstract=a) for i, a in enumerate(_ABSTRACTS)
  )
  + "</PubmedArticleSet>"
)


def as_csv(delimiter):
  out = io.StringIO(newline="")
  writer = csv.DictWriter(out, ["key", "text", "year"], delimiter=delimiter)
  writer.writeheader()
  writer.writerows(_RECORDS)
  return out.getvalue()


class FilesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def write(self, name, content):
    path = self.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    compress = _COMPRESS.get(path.suffix, _COMPRESS[""])
    path.write_bytes(compress(content))
    return str(path)

  def source(self, name, paths, **options):
    spec = {"name": name, "paths": paths, **options}
    return registry.build(SOURCES, spec, "data.source")

  def read(self, *args, split="train", **options):
    return list(self.source(*args, **options).examples(split))

  @parameterized.product(
    format=["jsonl", "csv", "tsv", "text_files"], suffix=sorted(_COMPRESS)
  )
  def test_plain_and_compressed_files_give_the_texts(self, format, suffix):
    if format == "jsonl":
      content = "\n\n".join(json.dumps(r) for r in _RECORDS)
      path = self.write(f"a.jsonl{suffix}", content)
    elif format == "text_files":
      for i, text in enumerate(_TEXTS):
        path = self.write(f"{i}.txt{suffix}", text)
      path = str(self.folder / "*.txt*")
    else:
      content = as_csv("\t" if format == "tsv" else ",")
      path = self.write(f"a.{format}{suffix}", content)
    options = {"quotes": True} if format == "tsv" else {}
    found = self.read(format.replace("tsv", "csv"), path, **options)
    self.assertEqual([e["text"] for e in found], _TEXTS)
    self.assertLen({e["id"] for e in found}, len(_TEXTS))

  def test_parquet_gives_the_texts_over_row_groups(self):
    path = str(self.folder / "a.parquet")
    pyarrow.parquet.write_table(
      pyarrow.Table.from_pylist(_RECORDS), path, row_group_size=3
    )
    found = self.read("parquet", path, id_field="key", features=["year"])
    self.assertEqual(
      found,
      [
        {"id": r["key"], "text": r["text"], "year": r["year"]} for r in _RECORDS
      ],
    )

  def test_fields_can_be_chosen(self):
    records = [{**r, "month": "5"} for r in _RECORDS]
    path = self.write("a.jsonl", "\n".join(map(json.dumps, records)))
    found = self.read(
      "jsonl", path, text_field="year", id_field="key", features=["month"]
    )
    self.assertEqual([e["id"] for e in found], ["k0", "k1", "k2", "k3"])
    self.assertEqual(found[2]["text"], "1992")
    self.assertEqual(found[2]["month"], "5")

  def test_csv_without_header(self):
    path = self.write("a.csv", "k1;one text\nk2;two texts\n")
    found = self.read(
      "csv", path, columns=["key", "text"], delimiter=";", id_field="key"
    )
    self.assertEqual(
      found,
      [{"id": "k1", "text": "one text"}, {"id": "k2", "text": "two texts"}],
    )

  def test_a_quotation_mark_swallows_no_rows_of_a_table_with_tabs(self):
    path = self.write("a.tsv", 'id\ttext\n1\t"one\n2\ttwo\n3\ta" b\n')
    found = self.read("csv", path)
    self.assertEqual([e["text"] for e in found], ['"one', "two", 'a" b'])

  def test_csv_cell_may_be_longer_than_the_library_allows(self):
    text = "word " * 100_000
    path = self.write("a.csv", f"text\n{text}\n")
    self.assertEqual(self.read("csv", path)[0]["text"], text)

  def test_blank_lines_part_documents_of_one_sentence_a_line(self):
    path = self.write("a.txt", "\nA one.\r\nA two.\r\n \n\nB one.\n\nC")
    found = self.read("text_files", path, documents="blank_line")
    self.assertEqual(
      found,
      [
        {"id": "a.txt:2", "text": "A one.\nA two."},
        {"id": "a.txt:6", "text": "B one."},
        {"id": "a.txt:8", "text": "C"},
      ],
    )

  def test_pubmed_articles(self):
    path = self.write("pubmed26n0001.xml.gz", _PUBMED)
    first, second = self.read("pubmed_xml", path)
    self.assertEqual(
      first,
      {
        "id": "11",
        "title": "Effects of E. coli 11.",
        "text": "Effects of E. coli 11.\n\nOne H2O & more.",
        "mesh": ["Humans", "Mice"],
      },
    )
    self.assertEqual(
      second["text"],
      "Effects of E. coli 13.\n\nMETHODS: We did.\n\nRESULTS: It worked.",
    )
    bare = self.read("pubmed_xml", path, with_title=False)
    self.assertEqual(bare[0]["text"], "One H2O & more.")

  def test_pubmed_is_read_as_a_stream(self):
    def bytes_of_articles():
      yield b"<PubmedArticleSet>"
      for i in range(10**9):
        yield _ARTICLE.format(pmid=i, abstract=_ABSTRACTS[0]).encode()

    class Endless(io.RawIOBase):
      parts = bytes_of_articles()

      def read(self, size=-1):
        return next(self.parts)

    with mock.patch.object(files, "open_binary", lambda path: Endless()):
      from bertjax.data.sources import pubmed

      records = pubmed.read_pubmed("endless.xml", True)
      keys = [r.key for r in itertools.islice(records, 300)]
    self.assertEqual(keys, [str(i) for i in range(300)])

  def test_order_and_ids_do_not_depend_on_where_the_files_lie(self):
    for root in ("one", "two/deeper"):
      for name in ("b/y.txt", "a/x.txt", "b/x.txt"):
        self.write(f"{root}/{name}", name)
    one, two = (
      self.source("text_files", str(self.folder / root / "**/*.txt"))
      for root in ("one", "two/deeper")
    )
    self.assertEqual(list(one.examples("train")), list(two.examples("train")))
    self.assertEqual(
      [e["id"] for e in one.examples("train")],
      ["a/x.txt:0", "b/x.txt:0", "b/y.txt:0"],
    )
    self.assertEqual(one.fingerprint(), two.fingerprint())

  def test_fingerprint_follows_content_and_options(self):
    path = self.write("a.jsonl", '{"text": "One two.", "b": "x"}')
    prints = {self.source("jsonl", path).fingerprint()}
    prints.add(self.source("jsonl", path, text_field="b").fingerprint())
    prints.add(self.source("jsonl", path, fractions={"a": 1}).fingerprint())
    prints.add(self.source("jsonl", {"test": path}).fingerprint())
    prints.add(self.source("csv", path).fingerprint())
    stat = os.stat(path)
    self.write("a.jsonl", '{"text": "One owt.", "b": "x"}')  # same size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    prints.add(self.source("jsonl", path).fingerprint())
    self.assertLen(prints, 6)

  def test_large_files_are_sampled_and_edits_still_show(self):
    path = self.write("a.txt", "x" * 5000)
    with (
      mock.patch.object(files, "_WHOLE", 1000),
      mock.patch.object(files, "_SAMPLE", 10),
    ):
      before = self.source("text_files", path).fingerprint()
      self.assertEqual(before, self.source("text_files", path).fingerprint())
      stat = os.stat(path)
      self.write("a.txt", "x" * 2500 + "y" + "x" * 2499)
      os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
      self.assertNotEqual(before, self.source("text_files", path).fingerprint())

  def test_splits_by_pattern(self):
    a, b, c = (self.write(f"{n}.txt", n) for n in "abc")
    source = self.source("text_files", {"train": [b, a], "test": c})
    self.assertEqual(source.splits, ("train", "test"))
    self.assertEqual([e["text"] for e in source.examples("train")], ["a", "b"])
    self.assertEqual([e["text"] for e in source.examples("test")], ["c"])
    with self.assertRaisesRegex(ValueError, "split='dev'.*train, test"):
      source.examples("dev").__next__()

  def test_a_file_is_in_one_split_and_once(self):
    path = self.write("a.txt", "a")
    os.symlink(path, self.folder / "b.txt")
    again = f"{self.folder}/../{self.folder.name}/a.txt"
    self.assertLen(self.read("text_files", [f"{self.folder}/*", again]), 1)
    for test in (path, again, f"{self.folder}/b.*"):
      with self.assertRaisesRegex(
        ValueError, r"[ab]\.txt' of .* is in split 'train' and in 'test'"
      ):
        self.source("text_files", {"train": path, "test": test})

  def test_splits_by_hash_cover_the_shares_and_share_no_text(self):
    texts = [f"Text number {i % 700}." for i in range(1400)]
    texts = [t.upper() if i % 2 else f" {t}" for i, t in enumerate(texts)]
    path = self.write(
      "a.jsonl", "\n".join(json.dumps({"text": t}) for t in texts)
    )
    source = self.source(
      "jsonl", path, fractions={"train": 0.7, "validation": 0.1, "test": 0.2}
    )
    found = {
      s: [e["text"].strip().lower() for e in source.examples(s)]
      for s in source.splits
    }
    self.assertEqual(sum(map(len, found.values())), 1400)
    self.assertEqual(sum(len(set(v)) for v in found.values()), 700)
    for split, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
      # Binomial of 700 texts: standard deviation 0.017 at most; four of them.
      self.assertAlmostEqual(len(found[split]) / 1400, share, delta=0.07)

  def test_a_text_keeps_its_split_when_the_corpus_grows(self):
    lines = [json.dumps({"text": f"t{i}"}) for i in range(200)]
    path = self.write("a.jsonl", "\n".join(lines[:100]))
    more = self.write("b.jsonl", "\n".join(lines))
    shares = {"train": 0.5, "test": 0.5}
    small, large = (
      {
        e["text"]
        for e in self.source("jsonl", p, fractions=shares).examples("test")
      }
      for p in (path, more)
    )
    self.assertEqual(small, {t for t in large if int(t[1:]) < 100})

  @parameterized.named_parameters(
    ("sum", {"a": 0.7, "b": 0.6}, "sum to 1.3"),
    ("zero", {"a": 0.0}, "fractions.a=0.0"),
  )
  def test_bad_fractions(self, fractions, message):
    path = self.write("a.txt", "a")
    with self.assertRaisesRegex(ValueError, message):
      self.source("text_files", path, fractions=fractions)

  @parameterized.named_parameters(
    ("jsonl", "jsonl", '{"text": "a", "b": 1}\n{"txt": "a", "b": 2}',
     r"a\.jsonl, line 2 has no field 'text'; it has b, txt"),
    ("jsonl_number", "jsonl", '{"text": 5}', "line 1: field 'text' holds int"),
    ("jsonl_broken", "jsonl", '{"text": "a"}\n{"te', "line 2 is not JSON"),
    ("jsonl_list", "jsonl", "[1]", "line 1 holds no JSON object"),
    ("csv", "csv", "a,b\n1,2\n", "line 2 has no field 'text'; it has a, b"),
    ("csv_cells", "csv", "text,b\n1,2\n1,2,3\n", "line 3 has 3 cells, not 2"),
    ("csv_open", "csv", 'text,b\n"a\nb",1\n\n"c,2\nd,3\n',
     r"a\.csv, line 5 begins no whole row \(.*delimiter=',' and quotes=True r"),
    ("csv_header", "csv", 'text,"b\n1,2\n', "line 1 begins no whole row"),
    ("latin", "text_files", b"caf\xe9", r"line 1 is not utf-8 text.*b'.xe9'"),
    ("latin_line", "jsonl", b'{"text": "a"}\r\n' * 9999 + b'{"text": "\xff"}',
     r"a\.jsonl, line 10000 is not utf-8 text.*set `encoding`"),
    ("no_parquet", "parquet", "text", r"a\.parquet is not a whole Parquet"),
    ("empty_jsonl", "jsonl", "\n", "'jsonl' has no example.*'train'.*empty"),
    ("empty_csv", "csv", "", "'csv' has no example.*'train'.*empty"),
    ("xml", "pubmed_xml", "<a><b></a>", "is not well-formed XML"),
    ("no_pmid", "pubmed_xml",
     "<a><PubmedArticle></PubmedArticle></a>", "article without a PMID"),
  )  # fmt: skip
  def test_bad_files_are_named(self, name, content, message):
    path = self.write(f"a.{name}", content)
    with self.assertRaisesRegex(ValueError, message):
      self.read(name, path)

  def test_parquet_without_the_column_names_those_it_has(self):
    path = str(self.folder / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(_RECORDS), path)
    with self.assertRaisesRegex(
      ValueError, r"a\.parquet has no column 'body'; it has key, text, year"
    ):
      self.read("parquet", path, text_field="body")

  @parameterized.parameters(
    *itertools.product([".gz", ".bz2", ".xz", ".zst"], ["cut", "plain"]),
    *itertools.product([".gz", ".bz2", ".xz"], ["flip"]),  # zst: no checksum
  )
  def test_damaged_compressed_file_is_named(self, suffix, damage):
    path = self.write(f"a.txt{suffix}", os.urandom(999).hex())
    content = bytearray(pathlib.Path(path).read_bytes())
    if damage == "flip":
      content[len(content) // 2] ^= 0x55
    elif damage == "cut":
      del content[-9:]
    else:
      content = b"text " * 99
    pathlib.Path(path).write_bytes(content)
    with self.assertRaisesRegex(
      ValueError, rf"a\.txt\{suffix} is not a whole compressed"
    ):
      self.read("text_files", path)

  @parameterized.parameters(".gz", ".zst")
  def test_files_joined_while_compressed_are_read_to_the_end(self, suffix):
    path = self.write(f"a.jsonl{suffix}", '{"text": "one"}\n')
    first = pathlib.Path(path).read_bytes()
    self.write(f"a.jsonl{suffix}", '{"text": "two"}\n')
    with open(path, "ab") as f:
      f.write(first)
    found = [e["text"] for e in self.read("jsonl", path)]
    self.assertEqual(found, ["two", "one"])

  @parameterized.parameters("jsonl", "csv", "text_files")
  def test_byte_order_mark_and_carriage_returns_are_no_text(self, format):
    lines = {
      "jsonl": b'{"text": "one"}\r\n{"text": "two"}\r\n',
      "csv": b"text\r\none\r\ntwo\r\n",
      "text_files": b"one\r\n\r\ntwo\r\n",
    }
    path = self.write(f"a.{format}", b"\xef\xbb\xbf" + lines[format])
    options = {"documents": "blank_line"} if format == "text_files" else {}
    found = [e["text"] for e in self.read(format, path, **options)]
    self.assertEqual(found, ["one", "two"])

  def test_a_folder_is_no_file(self):
    self.write("part/a.parquet", b"")
    with self.assertRaisesRegex(
      ValueError, r"part' of.*is a folder; write '.*part/\*' for its files"
    ):
      self.source("parquet", str(self.folder / "part"))

  def test_unknown_encoding(self):
    path = self.write("a.txt", "a")
    with self.assertRaisesRegex(ValueError, "encoding='utf9' is unknown to"):
      self.source("text_files", path, encoding="utf9")

  @parameterized.parameters("||", "")
  def test_a_delimiter_is_one_character(self, delimiter):
    path = self.write("a.csv", "a")
    with self.assertRaisesRegex(ValueError, "delimiter=.* must be one char"):
      self.source("csv", path, delimiter=delimiter)

  def test_bytes_of_another_encoding_are_named_without_a_line(self):
    path = self.write("a.txt", "a\n" * 9 + "b")
    with self.assertRaisesRegex(ValueError, r"a\.txt is not utf-16"):
      self.read("text_files", path, encoding="utf-16")

  def test_pattern_without_files_is_named(self):
    with self.assertRaisesRegex(
      ValueError, r"'.*nothing\*\.txt' of source 'text_files', split 'test'"
    ):
      self.source("text_files", {"test": str(self.folder / "nothing*.txt")})

  def test_splits_given_twice_are_refused(self):
    path = self.write("a.txt", "a")
    with self.assertRaisesRegex(ValueError, "already names splits"):
      self.source("text_files", {"test": path}, fractions={"test": 1.0})

  @parameterized.parameters(
    (dict(), "of the 1 in 'train', .*; documents=\"blank_line\" divides"),
    (dict(documents="blank_line"), "of the 2 in 'train', .*other shares.$"),
  )
  def test_a_split_that_nothing_falls_into_says_of_how_many(
    self, options, message
  ):
    path = self.write("a.txt", "one\n\ntwo\n")
    shares = {"train": 1 - 1e-9, "test": 1e-9}
    source = self.source("text_files", path, fractions=shares, **options)
    source = preprocess.Preprocessed(source, ["lowercase"])
    with self.assertRaisesRegex(ValueError, f"split 'test': {message}"):
      list(source.examples("test"))

  @parameterized.parameters(
    (dict(), "choose from train. Its option fractions, such as"),
    (dict(fractions={"train": 1.0}), "choose from train.$"),
  )
  def test_an_unknown_split_of_what_could_be_divided(self, options, message):
    source = self.source("text_files", self.write("a.txt", "a"), **options)
    source = preprocess.Preprocessed(source, ["lowercase"])
    with self.assertRaisesRegex(ValueError, message):
      base.check_split(source, "test")

  def test_features_that_mean_something_else_are_refused(self):
    path = self.write("a.jsonl", '{"text": "a", "copy": 7}')
    with self.assertRaisesRegex(ValueError, "features may not hold 'copy'"):
      self.source("jsonl", path, features=["copy"])

  def test_unknown_document_unit(self):
    with self.assertRaisesRegex(ValueError, "'file' or 'blank_line'"):
      self.source("text_files", self.write("a.txt", "a"), documents="page")


if __name__ == "__main__":
  absltest.main()
