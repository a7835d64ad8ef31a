"""What the Dockerfiles copy and install exists; they are not built here."""

import pathlib
import re
from unittest import mock

from absl.testing import absltest, parameterized

_ROOT = pathlib.Path(__file__).parents[2]


def _extras():
  """Extras and core requirements of setup.py."""
  with (
    mock.patch("setuptools.setup") as setup,
    mock.patch.object(pathlib.Path, "read_text", return_value=""),
  ):
    exec((_ROOT / "setup.py").read_bytes(), {"__name__": "setup"})
  return setup.call_args.kwargs


class DockerfilesTest(parameterized.TestCase):
  @parameterized.parameters(("tpu", "tpu,cpu"), ("gpu", "cuda,cpu"))
  def test_copies_and_installs(self, kind, platforms):
    text = (_ROOT / "gcp" / f"Dockerfile.{kind}").read_text("utf-8")
    packaging = _extras()
    ignored = (_ROOT / ".dockerignore").read_text("utf-8").splitlines()
    copied = set()
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.M):
      for name in sources.split():
        self.assertTrue((_ROOT / name).exists(), name)
        self.assertIn(f"!{name}", ignored)
        copied.add(name)
    # What setup.py packs and reads, and what the commands name.
    self.assertContainsSubset(
      {"setup.py", "pyproject.toml", "README.md", "bertjax", "kernels",
       "configs"}, copied,
    )  # fmt: skip
    (extras,) = re.findall(
      r"pip install --no-cache-dir -e '\.\[([\w,]+)\]'", text
    )
    # With the readers of configs/bert.py's corpora, which the README runs.
    self.assertEqual(extras.split(","), [kind, "tfds"])
    self.assertContainsSubset(extras.split(","), packaging["extras_require"])
    (python,) = re.findall(r"^FROM python:([\d.]+)-slim$", text, re.M)
    self.assertEqual(packaging["python_requires"].split(",")[0], f">={python}")
    self.assertIn(f"ENV JAX_PLATFORMS={platforms}\n", text)


if __name__ == "__main__":
  absltest.main()
