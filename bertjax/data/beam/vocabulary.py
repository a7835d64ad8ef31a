"""Vocabularies from the words of a whole corpus, counted by Apache Beam."""

import collections
from collections.abc import Iterator, Mapping
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from bertjax.data.beam.pipeline import results
from bertjax.data.beam.reading import Share, Shares
from bertjax.data.sources import Source
from bertjax.data.tokenizers import Tokenizer, base, training

_BLOCK = 1024  # documents that one reader takes at a time
_WORDS = 1_000_000  # distinct words after which a reader passes counts on
_FACTS = ("documents_read", "bytes_read")


def train_vocabulary(
  kind: str,
  source: Source,
  split: str,
  scratch: str,
  *,
  readers: int = 1,
  pipeline: PipelineOptions | None = None,
  **options: Any,
) -> Tokenizer:
  """`train_tokenizer` on every document instead of a sample.

  Words are counted by Beam; the pieces are made of the counts here, in memory
  that grows with the number of distinct words. Where all text fits into the
  `max_bytes` of `train_tokenizer`, the vocabulary is the same.

  Args:
    kind: wordpiece, bpe or byte_bpe.
    source: of the documents.
    split: of the source.
    scratch: folder or URL that all workers see.
    readers: workers that read and count at the same time.
    pipeline: see `pipeline_options`.
    **options: of `train_tokenizer`, but for `max_bytes` and `seed`.

  Raises:
    ValueError: a kind that needs more than counts; an option that does not
      fit; no word.
  """
  shares = Shares(source, split, readers)
  resolved = training.resolve(kind, options, "data.tokenizer")
  training.words_of(kind, resolved)  # refuses other kinds
  for name in ("max_bytes", "seed"):
    if name in options:
      raise ValueError(
        f"data.tokenizer.{name}={options[name]} is about a sample, but all"
        " words are counted; remove it."
      )
  next(iter(source.examples(split)), None)  # see `cache.make_shards`

  def counted(share: Share) -> Iterator[tuple[tuple[bool, str], int]]:
    return _counted(share, source, split, kind, resolved)

  def build(p: beam.Pipeline) -> beam.PCollection:
    return (
      p
      | shares
      | "Count" >> beam.FlatMap(counted)  # Beam cannot check a protocol's type
      | "Add" >> beam.CombinePerKey(sum)
    )

  counts, facts = {}, {}
  for (is_word, name), count in results(build, pipeline, scratch):
    (counts if is_word else facts)[name] = count
  facts = {name: facts[name] for name in _FACTS}
  facts["distinct_words"] = len(counts)
  return training.train_counted(kind, counts, resolved, facts)


def _counted(
  share: Share,
  source: Source,
  split: str,
  kind: str,
  options: Mapping[str, Any],
) -> Iterator[tuple[tuple[bool, str], int]]:
  """((True, word), count) and ((False, name of a fact), count)."""
  words = training.words_of(kind, options)
  counts, facts = collections.Counter(), dict.fromkeys(_FACTS, 0)
  for _, examples in share.blocks(source, split, _BLOCK):
    for example in examples:
      text = example["text"]
      facts["documents_read"] += 1
      facts["bytes_read"] += len(base.whole_characters(text).encode())
      counts.update(words(text))
      if len(counts) > _WORDS:
        yield from (((True, word), n) for word, n in counts.items())
        counts.clear()
  yield from (((True, word), n) for word, n in counts.items())
  yield from (((False, name), n) for name, n in facts.items())
