"""A sample of a corpus that is as large as a trainer may see."""

import hashlib
import heapq
from collections.abc import Iterable, Iterator

from bertjax.data.tokenizers import base

CHUNK_BYTES = 65_536  # a document is sampled in parts of about this size


def parts(text: str, limit: int = CHUNK_BYTES) -> Iterator[str]:
  """Cuts a text into parts of at most `limit` characters, at spaces."""
  start = 0
  while len(text) - start > limit:
    cut = text.rfind(" ", start, start + limit)
    cut = start + limit if cut <= start else cut + 1
    yield text[start:cut]
    start = cut
  yield text[start:]


def sample_texts(
  texts: Iterable[str], max_bytes: int, seed: int
) -> tuple[list[str], dict[str, int]]:
  """A uniform sample of a stream, in its order, in bounded memory.

  Every part of a document (up to 64 KiB) draws a number from a hash of (seed,
  position). Those under a threshold are kept, and the threshold falls whenever
  they exceed `max_bytes`: the head of the stream has no preference, and the
  result depends on nothing but the stream and the seed.

  Returns:
    The kept parts (at most `max_bytes` of UTF-8) and what was read and kept.
  """
  if max_bytes < 1:
    raise ValueError(f"max_bytes={max_bytes} must be 1 or more.")
  limit = max(1, min(CHUNK_BYTES, max_bytes // 16))
  heap: list[tuple[int, int, int, str]] = []  # (-draw, position, bytes, text)
  threshold = 1 << 64
  kept = position = 0
  facts = dict.fromkeys(("documents_read", "bytes_read"), 0)
  for text in texts:
    facts["documents_read"] += 1
    for part in parts(base.whole_characters(text), limit):
      size = len(part) if part.isascii() else len(part.encode())
      facts["bytes_read"] += size
      position += 1
      name = f"{seed}:{position}".encode()
      draw = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())
      if not size or draw >= threshold:
        continue
      heapq.heappush(heap, (-draw, position, size, part))
      kept += size
      while kept > max_bytes:
        negative, _, dropped, _ = heapq.heappop(heap)
        threshold = -negative
        kept -= dropped
  heap.sort(key=lambda item: item[1])
  facts |= {"bytes_used": kept, "parts_read": position, "parts_used": len(heap)}
  return [item[-1] for item in heap], facts
