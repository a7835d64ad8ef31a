"""New rows for a vocabulary that has a model already.

Only WordPiece takes a new piece into its search for the longest match, and only
where its rules leave the spelling whole (of an uncased vocabulary, lower case
without accents or hyphens). Any other becomes a user token: found by its
spelling in any text, also inside a word.
"""

from collections.abc import Iterable

from bertjax.data.tokenizers import base


def _new(tokenizer: base.Tokenizer, pieces: Iterable[str]) -> list[str]:
  """The pieces, checked: none empty, doubled or known already."""
  pieces = list(pieces)
  seen = set(tokenizer.vocabulary)
  for piece in pieces:
    if not piece:
      raise ValueError("pieces holds an empty string; remove it.")
    if piece in seen:
      raise ValueError(
        f"piece {piece!r} is in the vocabulary already; remove it from the"
        " new ones."
      )
    seen.add(piece)
  return pieces


def _user_tokens(tokenizer: base.Tokenizer, pieces: list[str]) -> list[str]:
  """All user tokens, new ones among them.

  Raises:
    ValueError: a continuation that no word has.
  """
  more = [piece for piece in pieces if not tokenizer.searches_for(piece)]
  if tokenizer.kind == "wordpiece":
    for piece in more:
      if piece.startswith("##"):
        raise ValueError(
          f"piece {piece!r} continues no word: the tokenizer changes or divides"
          f" {piece[2:]!r} before it looks for pieces."
        )
  return [*tokenizer.user_tokens, *more]


def append_pieces(
  tokenizer: base.Tokenizer, pieces: Iterable[str]
) -> base.Tokenizer:
  """The tokenizer with further pieces after its last row; old ids stay.

  The model needs as many further embedding rows.

  Raises:
    ValueError: an empty, repeated or known piece, or a continuation that no
      word has.
  """
  pieces = _new(tokenizer, pieces)
  return tokenizer.with_pieces(
    [*tokenizer.vocabulary, *pieces], _user_tokens(tokenizer, pieces)
  )


def reuse_unused(
  tokenizer: base.Tokenizer, pieces: Iterable[str]
) -> base.Tokenizer:
  """The tokenizer with [unusedN] rows, lowest N first, renamed to pieces.

  The model keeps its shape.

  Raises:
    ValueError: too few [unusedN] rows; see `append_pieces`.
  """
  pieces = _new(tokenizer, pieces)
  rows = [
    (slot, i)
    for i, piece in enumerate(tokenizer.vocabulary)
    if (slot := base.unused_slot(piece)) is not None
  ]
  if len(pieces) > len(rows):
    raise ValueError(
      f"{len(pieces)} new pieces do not fit into the {len(rows)} [unusedN]"
      " rows of the vocabulary; take fewer, or append_pieces."
    )
  vocabulary = list(tokenizer.vocabulary)
  for piece, (_, row) in zip(pieces, sorted(rows)):
    vocabulary[row] = piece
  return tokenizer.with_pieces(vocabulary, _user_tokens(tokenizer, pieces))


def pad_vocabulary(tokenizer: base.Tokenizer, multiple: int) -> base.Tokenizer:
  """The tokenizer with [unusedN] rows up to a multiple of `multiple`.

  Tensor cores and matrix units want vocabularies of 8, 64 or 128 times n.
  """
  if multiple < 1:
    raise ValueError(f"pad_to_multiple={multiple} must be 1 or more.")
  missing = -tokenizer.vocab_size % multiple
  if not missing:
    return tokenizer
  slots = (base.unused_slot(piece) for piece in tokenizer.vocabulary)
  first = 1 + max((s for s in slots if s is not None), default=-1)
  rows = [f"[unused{i}]" for i in range(first, first + missing)]
  return tokenizer.with_pieces(
    [*tokenizer.vocabulary, *rows], tokenizer.user_tokens
  )
