"""TensorFlow Datasets as sources. Data must have been prepared: none is
downloaded here."""

import functools
from collections.abc import Iterator, Mapping, Sequence

from bertjax.data.sources import base, files, tensorflow_io


class TfdsSource:
  """A prepared TFDS dataset, read in the order of its files."""

  def __init__(
    self,
    builder: str,
    text_field: str = "text",
    features: Sequence[str] = (),
    data_dir: str | None = None,
    splits: Mapping[str, str] | None = None,
    licence: str = "unknown",
  ):
    """Args:
    builder: `dataset`, `dataset/config` or `dataset/config:version`.
    text_field: the feature that holds the document.
    features: further features to keep.
    data_dir: TFDS's data folder; None takes TFDS's own default.
    splits: our split -> TFDS split, slices allowed ("train[:99%]"); None takes
      the dataset's splits.
    licence: of the texts.

    Raises:
      ValueError: no such dataset, nothing prepared, or no such feature.
    """
    self._tfds = tensorflow_io.load("tensorflow_datasets")
    self.name, self.licence = builder, licence
    self._text_field, self._features = text_field, tuple(features)
    try:
      self._builder = self._tfds.builder(builder, data_dir=data_dir)
    except (ValueError, RuntimeError) as err:
      reason = str(err).partition("\n")[0]
      raise ValueError(
        f"builder={builder!r} cannot be opened by TFDS in"
        f" data_dir={data_dir!r}: {reason}"
      ) from err
    info = self._builder.info
    names = list(info.features) if hasattr(info.features, "keys") else []
    for field in (text_field, *self._features):
      if field not in names:
        raise ValueError(
          f"builder={builder!r} has no feature {field!r}; it has"
          f" {', '.join(sorted(names))}."
        )
    self._splits = (
      {name: name for name in info.splits} if splits is None else dict(splits)
    )
    if not self._splits:
      raise ValueError(self._unprepared())
    self.splits = tuple(self._splits)

  def _unprepared(self) -> str:
    return (
      f"builder={self.name!r} has no prepared data in"
      f" {self._builder.data_dir}: run `tfds build {self.name}` where there is"
      " a network, or point data_dir at it."
    )

  def fingerprint(self) -> str:
    info = self._builder.info
    shards = {
      name: (split.num_bytes, list(split.shard_lengths or ()))
      for name, split in info.splits.items()
    }
    return base.fingerprint_of(
      "tfds",
      info.full_name,
      shards,
      self._text_field,
      self._features,
      sorted(self._splits.items()),
      *([files.BYTES] if self._features else []),
    )

  def examples(self, split: str) -> Iterator[base.Example]:
    """`id` is TFDS's own: file and position."""
    base.check_split(self, split)
    return base.nonempty(self._read(self._splits[split]), self.name, split)

  def parts(self, split: str) -> Sequence[base.Part]:
    """One a file; a slice of a split is a single part."""
    base.check_split(self, split)
    name, known = self._splits[split], self._builder.info.splits
    if name not in list(known) or known[name].num_shards < 2:
      return [functools.partial(self.examples, split)]
    return [
      functools.partial(self._read, f"{name}[{i}shard:{i + 1}shard]")
      for i in range(known[name].num_shards)
    ]

  def _read(self, split: str) -> Iterator[base.Example]:
    """A split of TFDS, or a slice of one."""
    config = self._tfds.ReadConfig(
      interleave_cycle_length=1, add_tfds_id=True, try_autocache=False
    )
    try:
      dataset = self._builder.as_dataset(
        split=split, shuffle_files=False, read_config=config
      )
    except AssertionError as err:
      raise ValueError(self._unprepared()) from err
    for record in self._tfds.as_numpy(dataset):
      text, key, features = files.pick(
        record, self.name, self._text_field, "tfds_id", self._features
      )
      yield {"id": key, "text": text, **features}


def tfds(
  builder: str,
  text_field: str = "text",
  features: Sequence[str] = (),
  data_dir: str | None = None,
  splits: Mapping[str, str] | None = None,
  fractions: Mapping[str, float] | None = None,
  licence: str = "unknown",
) -> base.Source:
  """`TfdsSource`; `fractions` divides its training split by hash."""
  source = TfdsSource(builder, text_field, features, data_dir, splits, licence)
  return source if fractions is None else base.HashSplit(source, fractions)
