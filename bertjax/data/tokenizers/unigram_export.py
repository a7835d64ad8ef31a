"""A SentencePiece unigram model as a tokenizer.json.

The `tokenizers` library runs the same search over the same scores behind the
model's own normalisation table. Two things are the library's own: between
segmentations of exactly equal score it may take the other one, and of a base
character with combining marks it normalises the cluster at once, which can lose
a mark.
"""

from collections.abc import Sequence

import tokenizers
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import decoders, models, normalizers, pre_tokenizers

from bertjax.data.tokenizers import base, library

_UNIGRAM = proto.TrainerSpec.UNIGRAM
_NORMAL = proto.ModelProto.SentencePiece.NORMAL
_BYTE = proto.ModelProto.SentencePiece.BYTE


def is_exportable(model: bytes) -> bool:
  """Whether the library can do what this model does.

  It cannot run a model of type BPE, nor one that keeps or omits whitespace in
  another way than all published unigram models do.
  """
  parsed = proto.ModelProto.FromString(model)
  spec = parsed.normalizer_spec
  return (
    parsed.trainer_spec.model_type == _UNIGRAM
    and not parsed.trainer_spec.treat_whitespace_as_suffix
    and spec.add_dummy_prefix
    and spec.remove_extra_whitespaces
    and spec.escape_whitespaces
  )


def to_library(
  model: bytes,
  pieces: Sequence[str],
  model_rows: Sequence[int],
  specials: base.Specials,
  user_tokens: Sequence[str],
) -> tokenizers.Tokenizer:
  """The tokenizer as the `tokenizers` library runs it.

  Args:
    model: a serialised model that `is_exportable`.
    pieces: the whole vocabulary; the position is the id.
    model_rows: id of each row of the model.
    specials: names of the special tokens.
    user_tokens: pieces that are found by their spelling.
  """
  parsed = proto.ModelProto.FromString(model)
  normal = [p.score for p in parsed.pieces if p.type == _NORMAL]
  # The library derives the price of an unknown character from the lowest score.
  lowest = min(normal)
  scores = [lowest] * len(pieces)
  for row, piece in zip(model_rows, parsed.pieces):
    if piece.type == _NORMAL and pieces[row] == piece.piece:
      scores[row] = piece.score
  unknown = list(pieces).index(specials.unk)
  backend = tokenizers.Tokenizer(
    models.Unigram(
      list(zip(pieces, scores)),
      unk_id=unknown,
      byte_fallback=any(p.type == _BYTE for p in parsed.pieces),
    )
  )
  steps = [
    normalizers.Strip(),
    normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
  ]
  if table := parsed.normalizer_spec.precompiled_charsmap:
    steps.insert(0, normalizers.Precompiled(table))
  backend.normalizer = normalizers.Sequence(steps)
  backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
  backend.decoder = decoders.Metaspace(prepend_scheme="always")
  return library.add_literals(backend, specials, user_tokens)
