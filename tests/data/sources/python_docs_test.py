import gzip
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import textwrap
from unittest import mock

from absl.testing import absltest, parameterized

from bertjax import registry
from bertjax.data.sources import SOURCES, PythonDocs, base, docstrings
from bertjax.data.sources.python_docs import assign_splits

_REPOSITORY = pathlib.Path(__file__).parents[3]
_SHARED = "A helper that several packages carry as a copy of their own."


def module(package, number):
  """Code with docstrings at every level, and with one that is shared."""
  return textwrap.dedent(f'''
    """Module {number} of the package {package} explains itself in a line."""
    if True:
      def inside():
        """The function inside {package} {number} stands under a condition."""
        class Deep:
          """A class deep in {package} {number} is found as well."""
    def shared():
      """{_SHARED}"""
    async def wait():
      """Waits for {package} {number} in a coroutine, without blocking."""
    def code():
      "A string {number} in plain quotes."
      return """not a docstring"""
  ''')


def install(site, package, version="1.0", modules=2, contents=module):
  """Writes a package as pip does, with a RECORD of its files."""
  folder = pathlib.Path(site) / package
  folder.mkdir(parents=True, exist_ok=True)
  rows = []
  for number in range(modules):
    content = contents(package, number).encode()
    (folder / f"m{number}.py").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    rows.append(f"{package}/m{number}.py,sha256={digest},{len(content)}")
  info = pathlib.Path(site) / f"{package}-{version}.dist-info"
  info.mkdir()
  (info / "METADATA").write_text(
    f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
  )
  (info / "RECORD").write_text("\n".join(rows) + "\n")


class DocstringsTest(parameterized.TestCase):
  def test_order_is_that_of_the_lines(self):
    import ast

    found = list(docstrings.in_order(ast.parse(module("p", 3))))
    self.assertEqual(
      [text.split()[0] for text in found],
      ["Module", "The", "A", "A", "Waits", "A"],
    )
    self.assertNotIn("not a docstring", found)

  def test_doctests_and_rulers_go_and_prose_stays(self):
    raw = """Adds numbers.

    Parameters
    ----------
    x : int
        The *first* number.

    >>> add(1,
    ...     2)
    3

    Only integers work.
    """
    self.assertEqual(
      docstrings.clean(raw),
      "Adds numbers.\n\nParameters\nx : int\n    The *first* number.\n\n"
      "Only integers work.",
    )

  @parameterized.parameters("", "Two words", "-----", ">>> f(a, b, c)\n1")
  def test_noise_is_empty(self, raw):
    self.assertEqual(docstrings.clean(raw), "")

  def test_result_can_always_be_written(self):
    text = docstrings.clean("A lone \ud800 half and \0 a null are not text.")
    self.assertNotIn("\0", text)
    text.encode("utf-8")

  @parameterized.named_parameters(
    ("syntax", b'"""Python two docs here."""\nprint "x"\n'),
    ("null", b'"""Three whole words."""\0'),
    ("encoding", b'# coding: nonsense\n"""Three whole words."""'),
    ("deep", b'"""Three whole words."""\nx = ' + b"(" * 5000 + b")" * 5000),
  )
  def test_files_that_do_not_parse_are_passed_over(self, content):
    with tempfile.NamedTemporaryFile(suffix=".py") as f:
      f.write(content)
      f.flush()
      self.assertEqual(docstrings.of_file(f.name), [])

  def test_nothing_is_imported_or_run(self):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "m.py"
      path.write_text('"""A module that fails."""\nraise SystemExit(3)\n')
      self.assertEqual(docstrings.of_file(str(path)), ["A module that fails."])


class PythonDocsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.site = self.folder / "site-packages"
    self.packages = [f"pkg{i}" for i in range(30)]
    for package in self.packages:
      install(self.site, package)

  def source(self, **options):
    options = {
      "site_folders": [str(self.site)],
      "cache_dir": str(self.folder / "cache"),
      "packages": self.packages,
      "min_chars": 10,
      "validation_rate": 0.2,
      "test_rate": 0.2,
      **options,
    }
    return PythonDocs(**options)

  def test_splits_are_by_package_and_share_no_text(self):
    source = self.source()
    packages, texts = {}, {}
    for split in source.splits:
      examples = list(source.examples(split))
      packages[split] = {e["id"].split("/")[0] for e in examples}
      texts[split] = [p for e in examples for p in e["text"].split("\n\n")]
      self.assertGreater(len(packages[split]), 1)
    self.assertEqual(
      sum(map(len, packages.values())), len(set().union(*packages.values()))
    )
    self.assertEqual(set().union(*packages.values()), set(self.packages))
    together = [base.normalise(t) for part in texts.values() for t in part]
    self.assertLen(together, len(set(together)))
    # The shared text stays once, where it cannot leak into an evaluation.
    self.assertEqual(texts["train"].count(_SHARED), 1)

  def test_a_document_is_a_module_in_the_order_of_its_lines(self):
    first = next(self.source().examples("train"))
    package, _, file = first["id"].split("/")
    self.assertEqual(file, "m0.py")
    self.assertEqual(
      [p.split()[0] for p in first["text"].split("\n\n")],
      ["Module", "The", "A", "A", "Waits", "A"],
    )
    self.assertIn(package, first["text"])

  def test_packages_keep_their_split_when_others_come_and_go(self):
    both = assign_splits([f"p{i}" for i in range(200)], 0.1, 0.1)
    half = assign_splits([f"p{i}" for i in range(0, 200, 2)], 0.1, 0.1)
    self.assertEqual({name: both[name] for name in half}, half)
    for split, low, high in (("test", 8, 40), ("validation", 8, 40)):
      # 200 draws at 0.1: 20 expected, standard deviation 4.2.
      self.assertBetween(list(both.values()).count(split), low, high)

  @parameterized.parameters(3, 4, 10)
  def test_no_split_stays_without_a_package(self, count):
    splits = assign_splits([f"x{i}" for i in range(count)], 1e-9, 1e-9)
    self.assertEqual(set(splits.values()), {"train", "validation", "test"})

  def test_standard_library_is_always_trained_on(self):
    source = self.source(packages=["python", *self.packages], min_chars=200)
    held_out = [
      e["id"] for s in ("validation", "test") for e in source.examples(s)
    ]
    self.assertFalse([i for i in held_out if i.startswith("python/")])
    names = [e["id"] for e in source.examples("train")]
    self.assertIn("python/topics/lambda", names)
    self.assertIn("python/argparse.py", names)
    self.assertFalse([n for n in names if "site-packages" in n])

  def test_order_does_not_depend_on_hash_seed_or_file_system(self):
    # A second folder, filled in the other order, is another file system's.
    other = self.folder / "other" / "site-packages"
    for package in reversed(self.packages):
      install(other, package)
    program = textwrap.dedent("""
        import json, sys
        sys.path.insert(0, sys.argv[1])
        from bertjax.data.sources import PythonDocs
        s = PythonDocs(json.loads(sys.argv[4]), site_folders=[sys.argv[2]],
                       cache_dir=sys.argv[3], min_chars=10)
        found = [list(s.examples(split)) for split in s.splits]
        print(json.dumps([s.fingerprint(), found]))
    """)
    outputs = set()
    for seed, site in (("0", self.site), ("1", self.site), ("2", other)):
      outputs.add(
        subprocess.run(
          [
            *(sys.executable, "-c", program, _REPOSITORY, site),
            *(self.folder / seed, json.dumps(self.packages[::-1])),
          ],
          env={**os.environ, "PYTHONHASHSEED": seed},
          stdout=subprocess.PIPE,
          check=True,
        ).stdout
      )
    self.assertLen(outputs, 1)

  def test_parallel_scan_equals_scan_in_this_process(self):
    one = list(self.source().examples("train"))
    many = self.source(cache_dir=str(self.folder / "other"))
    with mock.patch.object(os, "cpu_count", lambda: 3):
      for i in range(20):  # enough files for several interpreters
        install(self.site, f"more{i}", modules=25)
      more = self.source(packages=None, cache_dir=str(self.folder / "more"))
      found = {e["id"]: e for s in more.splits for e in more.examples(s)}
    self.assertEqual(list(many.examples("train")), one)
    self.assertContainsSubset(
      [f"more{i}/more{i}/m24.py" for i in range(20)], found
    )
    self.assertIn(
      "more7 24 in a coroutine", found["more7/more7/m24.py"]["text"]
    )

  def test_fingerprint_follows_what_is_installed_and_the_options(self):
    before = self.source(packages=None).fingerprint()
    self.assertEqual(before, self.source(packages=None).fingerprint())
    prints = {before, self.source(packages=None, min_chars=11).fingerprint()}
    prints.add(self.source(packages=None, max_documents=3).fingerprint())
    prints.add(self.source(packages=None, test_rate=0.3).fingerprint())
    install(self.site, "new")
    prints.add(self.source(packages=None).fingerprint())
    self.assertLen(prints, 5)

  def test_another_version_or_edited_build_changes_the_fingerprint(self):
    prints = {self.source(packages=["pkg3"]).fingerprint()}
    for version, contents in (
      ("1.1", module),
      ("1.0", lambda p, n: module(p, n).replace("explains", "describes")),
    ):
      site = self.folder / f"v{len(prints)}" / "site-packages"
      install(site, "pkg3", version, contents=contents)
      source = self.source(packages=["pkg3"], site_folders=[str(site)])
      prints.add(source.fingerprint())
    self.assertLen(prints, 3)

  def test_extracted_text_is_kept_and_rebuilt_when_damaged(self):
    expected = list(self.source().examples("test"))
    (kept,) = (self.folder / "cache").iterdir()
    whole = gzip.decompress(kept.read_bytes())
    for damage in (
      lambda b: b[: len(b) // 2],
      lambda b: b"x" + b[1:],
      lambda b: b[:100] + bytes([b[100] ^ 8]) + b[101:],
    ):
      kept.write_bytes(damage(kept.read_bytes()))
      with self.assertLogs(level="WARNING") as logs:
        self.assertEqual(list(self.source().examples("test")), expected)
      self.assertIn(str(kept), logs.output[0])
      self.assertEqual(gzip.decompress(kept.read_bytes()), whole)
    self.assertLen(list((self.folder / "cache").iterdir()), 1)

  @parameterized.parameters(0o022, 0o077)
  def test_extracted_text_is_for_whom_the_umask_lets_read_it(self, umask):
    self.addCleanup(os.umask, os.umask(umask))
    list(self.source().examples("test"))
    (kept,) = (self.folder / "cache").iterdir()
    self.assertEqual(kept.stat().st_mode & 0o777, 0o666 & ~umask)

  def test_tests_generated_code_and_bertjax_are_left_out(self):
    install(self.site, "bertjax")
    for inside in ("tests/m.py", "test_m.py", "m_test.py", "m_pb2.py"):
      path = self.site / "extra" / inside
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(module("extra", 5))
    install(self.site, "extra", modules=1)
    record = self.site / "extra-1.0.dist-info" / "RECORD"
    with record.open("a") as f:
      f.write("extra/tests/m.py,,\nextra/test_m.py,,\nextra/m_test.py,,\n")
      f.write("extra/m_pb2.py,,\n../../outside.py,,\n")
    source = self.source(packages=None)
    names = [e["id"] for s in source.splits for e in source.examples(s)]
    self.assertEqual(
      [n for n in names if n.startswith("extra/")], ["extra/extra/m0.py"]
    )
    self.assertFalse([n for n in names if n.startswith("bertjax")])

  def test_max_documents_spreads_over_the_split(self):
    every = [e["id"] for e in self.source().examples("train")]
    some = [e["id"] for e in self.source(max_documents=4).examples("train")]
    self.assertLen(some, 4)
    self.assertEqual([i for i in every if i in some], some)
    self.assertGreater(every.index(some[-1]), len(every) // 2)

  def test_bad_options(self):
    with self.assertRaisesRegex(ValueError, "'pkg33' is not.*Close: pkg3"):
      self.source(packages=["pkg33"])
    with self.assertRaisesRegex(ValueError, "split='dev'.*train, validation"):
      list(self.source().examples("dev"))
    with self.assertRaisesRegex(ValueError, "sum to less than 1"):
      self.source(test_rate=0.9)
    with self.assertRaisesRegex(ValueError, "max_documents=0"):
      self.source(max_documents=0)
    with self.assertRaisesRegex(ValueError, "'python_docs'.*'test'.*empty"):
      list(self.source(min_chars=10**6).examples("test"))
    with self.assertRaisesRegex(ValueError, "mean 'min_chars'"):
      registry.build(
        SOURCES, {"name": "python_docs", "min_char": 3}, "data.source"
      )

  def test_what_bertjax_depends_on_fills_every_split(self):
    core = ["jax", "optax", "orbax-checkpoint", "grain", "protobuf", "absl-py"]
    source = PythonDocs(
      packages=["python", *core], cache_dir=str(self.folder / "real")
    )
    chars = {
      split: sum(len(e["text"]) for e in source.examples(split))
      for split in source.splits
    }
    self.assertGreater(sum(chars.values()), 3e6)
    for split in ("validation", "test"):
      self.assertGreater(chars[split], 5e4, chars)


if __name__ == "__main__":
  absltest.main()
