"""The one door to TensorFlow, TFDS and SeqIO: imported late, kept off GPUs."""

import contextlib
import importlib
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_EXTRA = {
  "tensorflow": "tfds",
  "tensorflow_datasets": "tfds",
  "seqio": "tfds",
}


def load(name: str) -> ModuleType:
  """Imports `tensorflow`, `tensorflow_datasets` or `seqio`.

  TensorFlow is told first to leave accelerators to JAX.

  Raises:
    ImportError: names the extra to install.
  """
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  try:
    tf = importlib.import_module("tensorflow")
    module = importlib.import_module(name)
  except ImportError as err:
    raise ImportError(
      f"this source needs {name}, which cannot be imported ({err}):"
      f" pip install 'bertjax[{_EXTRA[name]}]'"
    ) from err
  with contextlib.suppress(RuntimeError):  # the program has used TF already
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_visible_devices([], "TPU")
  return module


def read_records(path: str, batch_size: int | None = None) -> Iterator[Any]:
  """Bytes of each record of a TFRecord file (.gz: compressed).

  Args:
    path: of the file.
    batch_size: give arrays of so many records.

  Raises:
    ValueError: the file is cut, damaged, or no TFRecord file.
  """
  tf = load("tensorflow")
  compression = "GZIP" if path.endswith(".gz") else ""
  records = tf.data.TFRecordDataset(path, compression_type=compression)
  if batch_size is not None:
    records = records.batch(batch_size)
  try:
    yield from records.as_numpy_iterator()
  except tf.errors.DataLossError as err:
    raise ValueError(f"{path} is no whole TFRecord file: {err}.") from err


def read_examples(path: str) -> Iterator[dict[str, Any]]:
  """Features of each tf.Example of a TFRecord file (.gz: compressed).

  A feature of one value is that value, others are lists.

  Raises:
    ValueError: the file is cut, damaged, or holds something else.
  """
  tf = load("tensorflow")
  try:
    for record in read_records(path):
      features = {}
      for name, value in tf.train.Example.FromString(
        record
      ).features.feature.items():
        kind = value.WhichOneof("kind")
        values = list(getattr(value, kind).value) if kind else []
        features[name] = values[0] if len(values) == 1 else values
      yield features
  except Exception as err:
    # protobuf's DecodeError lives in a private module in some versions.
    if type(err).__name__ != "DecodeError":
      raise
    raise ValueError(f"{path} does not hold tf.Example records.") from err
