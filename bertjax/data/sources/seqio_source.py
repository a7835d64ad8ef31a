"""SeqIO tasks and mixtures as sources, and our sources as SeqIO tasks."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bertjax.data.sources import base, tensorflow_io


class SeqioSource:
  """A registered Task or Mixture, read once in a fixed order."""

  def __init__(
    self,
    task: str,
    feature: str = "targets",
    module: str | None = None,
    splits: Mapping[str, str] | None = None,
    version: str = "",
    licence: str = "unknown",
  ):
    """Args:
    task: name of a Task or Mixture.
    feature: the feature that holds the document: a string, or ids that the
      task's own vocabulary decodes.
    module: what to import first, so that the task gets registered.
    splits: our split -> the task's split; None takes the task's splits.
    version: of the data. SeqIO cannot say whether a task's data changed: give
      another version when they did.
    licence: of the texts.

    Raises:
      ValueError: no such task or feature.
    """
    self._seqio = tensorflow_io.load("seqio")
    if module is not None:
      importlib.import_module(module)
    try:
      self._task = self._seqio.get_mixture_or_task(task)
    except ValueError as err:
      known = sorted(
        [
          *self._seqio.TaskRegistry.names(),
          *self._seqio.MixtureRegistry.names(),
        ]
      )
      raise ValueError(
        f"task={task!r} is not registered with SeqIO; there are"
        f" {', '.join(known) or 'none'}. Set `module` to what registers it."
      ) from err
    outputs = self._task.output_features
    if feature not in outputs:
      raise ValueError(
        f"feature={feature!r} is not an output of SeqIO's {task!r}; choose"
        f" from {', '.join(sorted(outputs))}."
      )
    self.name, self.licence = task, licence
    self._feature, self._version = feature, version
    self._splits = (
      {str(s): str(s) for s in self._task.splits}
      if splits is None
      else dict(splits)
    )
    self.splits = tuple(sorted(self._splits))

  def _parts(self) -> list[Any]:
    if isinstance(self._task, self._seqio.Mixture):
      return list(self._task.tasks)
    return [self._task]

  def fingerprint(self) -> str:
    return base.fingerprint_of(
      "seqio",
      self.name,
      self._feature,
      self._version,
      sorted(self._splits.items()),
      [(part.name, sorted(map(str, part.splits))) for part in self._parts()],
    )

  def examples(self, split: str) -> Iterator[base.Example]:
    """`id` = "<task>/<split>/<position>"."""
    base.check_split(self, split)
    dataset = self._task.get_dataset(
      sequence_length=None,
      split=self._splits[split],
      shuffle=False,
      seed=0,  # of a mixture's sampling
      num_epochs=1,
    )
    vocabulary = self._task.output_features[self._feature].vocabulary

    def read():
      for i, record in enumerate(dataset.as_numpy_iterator()):
        value = record[self._feature]
        if isinstance(value, bytes):
          text = value.decode("utf-8")
        elif np.issubdtype(np.asarray(value).dtype, np.integer):
          text = vocabulary.decode([int(token) for token in np.ravel(value)])
        else:
          raise ValueError(
            f"feature={self._feature!r} of SeqIO's {self.name!r} is neither a"
            " string nor a list of token ids."
          )
        yield {"id": f"{self.name}/{split}/{i}", "text": text}

    return base.nonempty(read(), self.name, split)


def seqio(
  task: str,
  feature: str = "targets",
  module: str | None = None,
  splits: Mapping[str, str] | None = None,
  version: str = "",
  fractions: Mapping[str, float] | None = None,
  licence: str = "unknown",
) -> base.Source:
  """`SeqioSource`; `fractions` divides its training split by hash."""
  source = SeqioSource(task, feature, module, splits, version, licence)
  return source if fractions is None else base.HashSplit(source, fractions)


def to_seqio_task(
  name: str,
  source: base.Source,
  *,
  text_feature: str = "text",
  preprocessors: Sequence[Any] = (),
  output_features: Mapping[str, Any] | None = None,
) -> Any:
  """Registers a source as a SeqIO Task, so that SeqIO mixtures can use it.

  Args:
    name: of the new task.
    source: any source of texts; its splits become the task's.
    text_feature: the feature that gets the text, beside `id`.
    preprocessors: SeqIO preprocessors, such as tokenisation.
    output_features: of the task; None declares the raw text as a string.

  Returns:
    The registered `seqio.Task`.
  """
  tf = tensorflow_io.load("tensorflow")
  lib = tensorflow_io.load("seqio")
  signature = {
    "id": tf.TensorSpec((), tf.string),
    text_feature: tf.TensorSpec((), tf.string),
  }

  def dataset_fn(split, shuffle_files=False, seed=None):
    del shuffle_files, seed  # one stream: SeqIO shuffles with its buffer

    def read():
      for example in source.examples(split):
        yield {"id": example["id"], text_feature: example["text"]}

    return tf.data.Dataset.from_generator(read, output_signature=signature)

  if output_features is None:
    output_features = {
      text_feature: lib.Feature(
        lib.PassThroughVocabulary(size=0),
        add_eos=False,
        dtype=tf.string,
        rank=0,
      )
    }
  return lib.TaskRegistry.add(
    name,
    source=lib.FunctionDataSource(dataset_fn, splits=source.splits),
    preprocessors=list(preprocessors),
    output_features=dict(output_features),
  )
