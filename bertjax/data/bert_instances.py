r"""Static BERT instances in the reference's order of random draws, as TFRecord.

Devlin et al. 2018, arXiv:1810.04805. One `random.Random(seed)` drives the whole
file: shuffle documents; `dupe_factor` passes of cutting, pairing, truncating
and masking; shuffle instances. With the same text, vocabulary and options the
ids are those of the original script. (`instances.pairs` and `masking` have the
same distribution, cost nothing on disk and never repeat a mask: prefer them.)

Run:  python -m bertjax.data.bert_instances --input=docs.txt \
          --vocab=tokenizer_folder --output=instances.tfrecord

The input has one sentence per line and a blank line between documents.
"""

import dataclasses
import glob
import hashlib
import os
import random
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from absl import app, flags

from bertjax.data import dataset as dataset_lib
from bertjax.data.orders import Orders
from bertjax.data.sources import files as files_lib
from bertjax.data.sources import remote, tensorflow_io

_SPECIALS = 3  # [CLS] A [SEP] B [SEP]
Document = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Instance:
  """One pair of texts with its masks, all as ids.

  Attributes:
    tokens: [CLS] A [SEP] B [SEP] after masking, without padding.
    a_length: tokens up to and including the first [SEP].
    masked_positions: where, ascending.
    labels: the original ids there.
    is_random: whether B is a random text.
  """

  tokens: tuple[int, ...]
  a_length: int
  masked_positions: tuple[int, ...]
  labels: tuple[int, ...]
  is_random: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
  """The reference generator.

  Attributes:
    tokenizer: for the special ids, `vocab_size` and `continues_word`.
    max_seq_length: tokens per instance.
    max_predictions_per_seq: masked tokens per instance at most.
    masked_lm_prob: share of the tokens, special ones counted, to mask.
    dupe_factor: passes over the documents.
    short_seq_prob: probability that a document aims at a random shorter length.
    do_whole_word_mask: mask the pieces of a word together.
    random_seed: of the one stream of draws.
  """

  tokenizer: object
  max_seq_length: int = 128
  max_predictions_per_seq: int = 20
  masked_lm_prob: float = 0.15
  dupe_factor: int = 10
  short_seq_prob: float = 0.1
  do_whole_word_mask: bool = False
  random_seed: int = 12345

  def __post_init__(self):
    if self.max_seq_length < _SPECIALS + 2:
      raise ValueError(
        f"max_seq_length={self.max_seq_length} must be at least"
        f" {_SPECIALS + 2}."
      )
    for name in ("max_predictions_per_seq", "dupe_factor"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be positive.")
    if not 0 < self.masked_lm_prob <= 1:
      raise ValueError(
        f"masked_lm_prob={self.masked_lm_prob} must be above 0, at most 1."
      )
    if not 0 <= self.short_seq_prob <= 1:
      raise ValueError(
        f"short_seq_prob={self.short_seq_prob} must be from 0 to 1."
      )

  def __call__(self, documents: Iterable[Document]) -> list[Instance]:
    """All instances, shuffled.

    Args:
      documents: per document its sentences as ids; empty ones are dropped.

    Raises:
      ValueError: there are no documents.
    """
    rng = random.Random(self.random_seed)
    documents = [[list(s) for s in d if len(s)] for d in documents]
    documents = [d for d in documents if d]
    if not documents:
      raise ValueError(
        "--input holds no documents; write one sentence per line and a blank"
        " line between documents."
      )
    rng.shuffle(documents)
    instances = []
    for _ in range(self.dupe_factor):
      for number in range(len(documents)):
        instances.extend(self._of_document(documents, number, rng))
    rng.shuffle(instances)
    return instances

  def _of_document(self, documents, number, rng) -> Iterator[Instance]:
    sentences = documents[number]
    max_tokens = self.max_seq_length - _SPECIALS
    target = max_tokens
    if rng.random() < self.short_seq_prob:
      target = rng.randint(2, max_tokens)
    first = 0
    while first < len(sentences):
      end, size = first, 0
      while end < len(sentences) and (size < target or end == first):
        size += len(sentences[end])
        end += 1
      split = first + 1
      if end - first >= 2:
        split = first + rng.randint(1, end - first - 1)
      a = _join(sentences[first:split])
      is_random = end - first == 1 or rng.random() < 0.5
      if is_random:
        b = self._random_text(documents, number, target - len(a), rng)
        following = split
      else:
        b = _join(sentences[split:end])
        following = end
      truncate_pair(a, b, max_tokens, rng)
      yield self._masked(a, b, is_random, rng)
      first = following

  def _random_text(self, documents, number, length, rng) -> list[int]:
    for _ in range(10):
      other = rng.randint(0, len(documents) - 1)
      if other != number:
        break
    text = []
    start = rng.randint(0, len(documents[other]) - 1)
    for sentence in documents[other][start:]:
      text.extend(sentence)
      if len(text) >= length:
        break
    return text

  def _masked(self, a, b, is_random, rng) -> Instance:
    special = self.tokenizer
    tokens = [special.cls_id, *a, special.sep_id, *b, special.sep_id]
    groups = []
    for position, token in enumerate(tokens):
      if token in (special.cls_id, special.sep_id):
        continue
      joins = self.do_whole_word_mask and special.continues_word[token]
      if joins and groups:
        groups[-1].append(position)
      else:
        groups.append([position])
    rng.shuffle(groups)
    wanted = min(
      self.max_predictions_per_seq,
      max(1, round(len(tokens) * self.masked_lm_prob)),
    )
    labels = {}
    output = list(tokens)
    for group in groups:
      if len(labels) >= wanted:
        break
      if len(labels) + len(group) > wanted:
        continue
      for position in group:
        labels[position] = tokens[position]
        if rng.random() < 0.8:
          output[position] = special.mask_id
        elif rng.random() >= 0.5:
          output[position] = rng.randint(0, special.vocab_size - 1)
    positions = sorted(labels)
    return Instance(
      tokens=tuple(int(t) for t in output),
      a_length=len(a) + 2,
      masked_positions=tuple(positions),
      labels=tuple(int(labels[p]) for p in positions),
      is_random=is_random,
    )


def truncate_pair(
  a: list[int], b: list[int], max_tokens: int, rng: random.Random
) -> None:
  """Shortens the longer text in place, from a random side each time."""
  while len(a) + len(b) > max_tokens:
    longer = a if len(a) > len(b) else b
    if rng.random() < 0.5:
      del longer[0]
    else:
      longer.pop()


def features(
  instance: Instance, max_seq_length: int, max_predictions_per_seq: int
) -> dict[str, np.ndarray]:
  """The reference's features, padded with 0; ints int64, weights float32."""

  def padded(values, length, dtype=np.int64):
    result = np.zeros(length, dtype)
    result[: len(values)] = values
    return result

  size, masked = len(instance.tokens), len(instance.labels)
  slots = max_predictions_per_seq
  return {
    "input_ids": padded(instance.tokens, max_seq_length),
    "input_mask": padded(np.ones(size), max_seq_length),
    "segment_ids": padded(np.arange(size) >= instance.a_length, max_seq_length),
    "masked_lm_positions": padded(instance.masked_positions, slots),
    "masked_lm_ids": padded(instance.labels, slots),
    "masked_lm_weights": padded(np.ones(masked), slots, np.float32),
    "next_sentence_labels": np.array([int(instance.is_random)]),
  }


def write_tfrecord(
  instances: Iterable[Instance],
  path: str,
  max_seq_length: int,
  max_predictions_per_seq: int,
) -> int:
  """Writes tf.Examples; returns how many."""
  tf = tensorflow_io.load("tensorflow")
  count = 0
  with tf.io.TFRecordWriter(path) as writer:
    for instance in instances:
      feature = {}
      row = features(instance, max_seq_length, max_predictions_per_seq)
      for name, values in row.items():
        if values.dtype == np.float32:
          kind = {"float_list": tf.train.FloatList(value=values)}
        else:
          kind = {"int64_list": tf.train.Int64List(value=values)}
        feature[name] = tf.train.Feature(**kind)
      example = tf.train.Example(features=tf.train.Features(feature=feature))
      writer.write(example.SerializeToString())
      count += 1
  return count


def read_tfrecord(
  paths: str | Sequence[str], field: str = "paths"
) -> dict[str, np.ndarray]:
  """All rows of ready-made BERT TFRecords as one batch of ours.

  Args:
    paths: files or glob patterns; rows may differ in length.
    field: what holds them in a config, for messages.

  Returns:
    The batch of `RowDataset`, one row per example: `tokens, segment_ids,
    positions, type_ids` [n, t], `masked_positions, labels` [n, m] and
    `pair_labels` [n].

  Raises:
    ValueError: no file, no example, or a file that does not hold such rows.
  """
  tf = tensorflow_io.load("tensorflow")
  patterns = [paths] if isinstance(paths, str) else list(paths)
  files = _matching(patterns)
  if not files:
    raise ValueError(
      f"{field}={patterns!r} matches no file; give TFRecords of BERT instances."
    )
  # No lengths are asked for: the longest rows tell them.
  spec = {
    name: tf.io.RaggedFeature(
      tf.float32 if name == "masked_lm_weights" else tf.int64
    )
    for name in _FEATURES
  }
  rows = {name: [] for name in _FEATURES}
  for file in files:
    for records in tensorflow_io.read_records(file, batch_size=4096):
      try:
        parsed = tf.io.parse_example(records, spec)
      # TensorFlow's message may quote bytes that are no text.
      except (tf.errors.InvalidArgumentError, UnicodeDecodeError) as err:
        raise ValueError(f"{file} does not hold {_BERT_INSTANCES}.") from err
      for name, values in parsed.items():
        if not values.values.shape[0]:
          raise ValueError(
            f"{file} lacks the feature {name!r} of {_BERT_INSTANCES}."
          )
        rows[name].append(values)
  if not rows["input_ids"]:
    raise ValueError(f"{field}={patterns!r} holds no examples.")
  return _as_batch(
    {k: tf.concat(v, axis=0).to_tensor().numpy() for k, v in rows.items()}
  )


def _matching(patterns: Iterable[str]) -> list[str]:
  found = [f for p in patterns for f in sorted(glob.glob(p))]
  return [f for f in found if not os.path.isdir(f)]


_FEATURES = (
  "input_ids",
  "input_mask",
  "segment_ids",
  "masked_lm_positions",
  "masked_lm_ids",
  "masked_lm_weights",
  "next_sentence_labels",
)
_BERT_INSTANCES = f"BERT instances, tf.Examples of {', '.join(_FEATURES)}"


def _as_batch(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  real = rows["input_mask"]
  used = rows["masked_lm_weights"] > 0
  batch = {
    "tokens": rows["input_ids"],
    "segment_ids": real,
    "positions": np.arange(real.shape[1])[None] * real,
    "type_ids": rows["segment_ids"],
    "masked_positions": np.where(used, rows["masked_lm_positions"], 0),
    "labels": np.where(used, rows["masked_lm_ids"], -1),
    "pair_labels": rows["next_sentence_labels"][:, 0],
  }
  return {k: np.ascontiguousarray(v, np.int32) for k, v in batch.items()}


class StaticDataset(dataset_lib.RowDataset):
  """Ready-made rows held in memory, in a new random order every epoch."""

  def __init__(
    self, rows: dict[str, np.ndarray], *, pad_id: int = 0, seed: int = 0
  ):
    """`rows` as `read_tfrecord` returns them."""
    self._rows = rows
    self._count, self.seq_len = rows["tokens"].shape
    if not self._count:
      raise ValueError("rows holds no examples.")
    self.pad_id, self.seed = pad_id, seed
    self._orders = Orders(self._count, seed)
    digest = hashlib.sha256()
    for name in sorted(rows):
      digest.update(rows[name].tobytes())
    self._digest = digest.hexdigest()[:16]

  @property
  def row_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    return {
      k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype)
      for k, v in self._rows.items()
    }

  def rows_per_epoch(self, epoch: int) -> int:
    del epoch  # all alike
    return self._count

  def epoch_of(self, row: int) -> tuple[int, int]:
    return divmod(row, self._count)

  def rows(self, first: int, stop: int) -> dict[str, np.ndarray]:
    _, picked = self._orders.find(first, stop)
    return {k: v[picked] for k, v in self._rows.items()}

  def fingerprint(self) -> str:
    return f"{self._digest}-{self.seed}"

  def reseeded(self, seed: int) -> "StaticDataset":
    return StaticDataset(self._rows, pad_id=self.pad_id, seed=seed)


def read_documents(paths: Sequence[str], tokenizer) -> list[list[list[int]]]:
  """Sentences as ids, from text files in the reference's format."""
  documents = [[]]
  for path in paths:
    for line in _lines(path):
      line = line.strip()
      if not line:
        documents.append([])
      elif len(ids := tokenizer.encode(line)):
        documents[-1].append(ids.tolist())
    # As in the reference, the end of a file does not end a document.
  return [d for d in documents if d]


def _lines(path: str) -> Iterator[str]:
  # A line feed alone ends a line, as in the reference.
  with open(path, encoding="utf-8", newline="\n") as lines:
    try:
      yield from lines
    except UnicodeDecodeError as err:
      raise ValueError(
        f"{files_lib.undecodable(path, err)}; write it in UTF-8."
      ) from err


def _join(sentences: Iterable[Sequence[int]]) -> list[int]:
  return [token for sentence in sentences for token in sentence]


_HELP = {
  "max_seq_length": "Tokens per instance.",
  "max_predictions_per_seq": "Masked tokens per instance at most.",
  "masked_lm_prob": "Share of the tokens, special ones counted, to mask.",
  "dupe_factor": "Passes over the documents, each masked anew.",
  "short_seq_prob": "Probability that a document aims at a random length.",
  "do_whole_word_mask": "Mask the pieces of a word together.",
  "random_seed": "Seed of the one stream of draws.",
}


def _define_flags() -> None:
  """Only when run: training imports this module and has flags of its own."""
  from bertjax import cli

  flags.DEFINE_list("input", None, "Text files or patterns.", required=True)
  flags.DEFINE(cli.PATH, "vocab", None, "Folder of a tokenizer.", required=True)
  flags.DEFINE(cli.PATH, "output", None, "TFRecord to write.", required=True)
  define = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
  }
  for name, default in _defaults().items():
    define[type(default)](name, default, _HELP[name])


def _defaults() -> dict[str, bool | int | float]:
  fields = dataclasses.fields(Generator)
  return {f.name: f.default for f in fields if f.name != "tokenizer"}


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unknown arguments: {argv[1:]}")
  from bertjax import cli

  with cli.clear_errors():
    _write(flags.FLAGS)


def _write(values: flags.FlagValues) -> None:
  from bertjax import cli
  from bertjax.data import tokenizers

  if not remote.is_url(values.output):  # TensorFlow writes to gs:// too
    cli.check_output("output", values.output)
  tokenizer = tokenizers.load_tokenizer(values.vocab)
  files = _matching(map(os.path.expanduser, values.input))
  if not files:
    raise ValueError(f"--input={','.join(values.input)} matches no file.")
  options = {name: values[name].value for name in _defaults()}
  generator = Generator(tokenizer, **options)
  instances = generator(read_documents(files, tokenizer))
  count = write_tfrecord(
    instances,
    values.output,
    values.max_seq_length,
    values.max_predictions_per_seq,
  )
  print(f"Wrote {count} instances of {len(files)} files to {values.output}.")


if __name__ == "__main__":
  _define_flags()
  app.run(main)
