"""The shapes of a run's batches from its config alone: no data is read."""

import abc
import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax

from bertjax import registry
from bertjax.data import instances as instances_lib
from bertjax.data import sentences, text_dataset, textual
from bertjax.data.text import TextData
from bertjax.data.tokenizers import TOKENIZERS, build_tokenizer, training

_NOMINAL_ROWS = 1_000_000
_ASK_SIZE = (
  "so the size of the vocabulary is unknown; give it with --vocab_size (BERT's"
  " uncased one has 30522 ids)."
)


def steps_of(epochs: float, rows: int, batch_size: int) -> int:
  """Steps of epochs of so many rows."""
  return max(1, math.ceil(epochs * rows / batch_size))


@dataclasses.dataclass(frozen=True)
class AbstractData(abc.ABC):
  """What `bertjax.experiment.build` asks of data, and nothing to read.

  Attributes:
    batch_size: rows of the global batch.
    row_spec: shapes of one row.
    unit: as of `RowDataset`.
  """

  batch_size: int
  row_spec: Mapping[str, jax.ShapeDtypeStruct]
  unit: ClassVar[str] = "tokens"

  def dataset(self) -> "AbstractData":
    """Itself: a dataset has a `batch_spec`, and so has it."""
    return self

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch."""
    return {
      name: jax.ShapeDtypeStruct((batch_size, *row.shape), row.dtype)
      for name, row in self.row_spec.items()
    }

  def objective(self, given: Mapping[str, Any]) -> dict[str, Any]:
    """`config.objective`; by default the data add nothing to it."""
    return dict(given)

  def model(self, given: Mapping[str, Any]) -> dict[str, Any]:
    """`config.model`; by default the data add nothing to it."""
    return dict(given)

  def check(self, objective: nn.Module) -> None:
    """Raises ValueError for a model or objective that cannot read the rows."""
    del objective

  def steps(self, epochs: float) -> int:
    """Steps of epochs of a million rows: how many there are the data know.

    A step is the same however many follow; only its schedule has other numbers.
    """
    return steps_of(epochs, _NOMINAL_ROWS, self.batch_size)

  @abc.abstractmethod
  def tokens_per_batch(self, batch_size: int) -> int:
    """Slots of a batch, padding included."""


@dataclasses.dataclass(frozen=True)
class AbstractText(AbstractData):
  """Rows of token ids.

  Attributes:
    vocab_size: number of ids.
    seq_len: length of a row.
  """

  vocab_size: int
  seq_len: int

  def model(self, given: Mapping[str, Any]) -> dict[str, Any]:
    """`config.model` with the size of the vocabulary."""
    return textual.with_vocabulary(given, self.vocab_size)

  def check(self, objective: nn.Module) -> None:
    textual.check_length(objective.encoder, self.seq_len)

  def tokens_per_batch(self, batch_size: int) -> int:
    return batch_size * self.seq_len


def abstract_text(
  spec: Mapping[str, Any], vocab_size: int | None = None
) -> AbstractText:
  """The batches of `config.data` of text.

  Args:
    spec: arguments of `TextData`.
    vocab_size: of the tokenizer; by default what its options, or its files if
      they are here, say.

  Raises:
    ValueError: an option that does not fit, or a vocabulary of unknown size.
  """
  check_options(TextData, {"tokenizer": None} | dict(spec))
  if "splitter" in spec:
    registry.lookup(sentences.SPLITTERS, spec["splitter"], "data.splitter")
  mode = registry.build(
    instances_lib.INSTANCES, spec["instances"], "data.instances"
  )
  masking = spec.get("masking")
  if masking is not None:
    masking = text_dataset.build_masking(masking)
  seq_len = spec["seq_len"]
  text_dataset.check_seq_len(seq_len, mode, spec["instances"]["name"])
  return AbstractText(
    batch_size=spec["batch_size"],
    row_spec=text_dataset.text_row_spec(mode, masking, seq_len),
    vocab_size=vocabulary_size(spec, vocab_size),
    seq_len=seq_len,
  )


def check_options(builder: Callable[..., Any], spec: Mapping[str, Any]) -> None:
  """Raises ValueError for what `config.data` lacks or has too much.

  Args:
    builder: of the real data.
    spec: its arguments, and its name.
  """
  options = {k: v for k, v in spec.items() if k != "name"}
  registry.check(builder, options, "data", ("seed", "mask_seed", "cache_dir"))


def vocabulary_size(spec: Mapping[str, Any], given: int | None) -> int:
  """How many ids the tokenizer of `config.data` has, without any text.

  Args:
    spec: the sub-dict, whose tokenizer may be left to `init_from`.
    given: the size, if it is known.

  Raises:
    ValueError: it is not, and the tokenizer is not here.
  """
  if given is not None:
    return given
  if spec.get("tokenizer") is None:
    raise ValueError(
      "data.tokenizer is not given, and no folder of init_from that has one is"
      f" here, {_ASK_SIZE}"
    )
  return tokenizer_size(spec["tokenizer"])


def tokenizer_size(spec: Mapping[str, Any]) -> int:
  """How many ids `config.data.tokenizer` has, without any text.

  Raises:
    ValueError: unknown name or option, or files that are not here.
  """
  options = dict(spec)
  name = options.pop("name", None)
  registry.lookup(TOKENIZERS, name, "data.tokenizer.name")
  if name == "train":
    kind = options.pop("kind", None)
    for key in ("source", "split"):
      options.pop(key, None)
    resolved = training.resolve(kind, options, "data.tokenizer")
    if "vocab_size" in resolved:
      multiple = resolved["pad_to_multiple"]
      return -(-resolved["vocab_size"] // multiple) * multiple
    return training.train_resolved(kind, (), resolved).vocab_size
  if name == "extended" and "of" in options:
    size = tokenizer_size(options["of"]) + len(options.get("append", ()))
    return size + -size % options.get("pad_to_multiple", 1)
  path = options.get("path")
  if path is not None and not pathlib.Path(path).exists():
    raise ValueError(
      f"data.tokenizer.path={str(path)!r} is not here, {_ASK_SIZE}"
    )
  return build_tokenizer(spec, tuple, "", "").vocab_size
