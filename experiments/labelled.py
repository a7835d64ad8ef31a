"""Labelled texts for small downstream tasks, as files that any config reads.

A task is three JSONL files of `{"id", "text", "label"}`. The training split's
order is random, so that its first n examples are a sample of n labels, and its
texts without the labels are a corpus for pre-training.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from bertjax.data.sources import base

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


@dataclasses.dataclass(frozen=True)
class LabelledTexts:
  """A task on disk.

  Attributes:
    paths: its files by split.
    labels: names of the classes.
  """

  paths: Mapping[str, str]
  labels: tuple[str, ...]

  def task(self) -> dict[str, Any]:
    """`config.data.task`."""
    source = dict(name="jsonl", paths=dict(self.paths))
    return dict(name="classification", source=source, labels=self.labels)

  def source(self) -> dict[str, Any]:
    """`config.data.source` of the texts alone."""
    return dict(name="jsonl", paths=dict(self.paths))


def write(
  folder: str | os.PathLike, records: Iterable[Mapping[str, str]]
) -> LabelledTexts:
  """Divides records by the hash of their text and writes them.

  The hash also decides the order, so the files depend on nothing but the set
  of records. A folder that is complete is left as it is.

  Args:
    folder: created if needed.
    records: each with `id`, `text` and `label`; read only if need be.
  """
  folder = pathlib.Path(folder)
  index = folder / "labels.json"
  if not index.exists():
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(
      records, key=lambda r: (base.text_hash(r["text"], "order"), r["id"])
    )
    lines: dict[str, list[str]] = {split: [] for split in SHARES}
    for record in found:
      line = json.dumps({k: record[k] for k in ("id", "text", "label")})
      lines[_split_of(record["text"])].append(line + "\n")
    for split, part in lines.items():
      (folder / f"{split}.jsonl").write_text("".join(part))
    partial = index.with_suffix(".partial")
    partial.write_text(json.dumps(sorted({r["label"] for r in found})))
    partial.replace(index)
  return LabelledTexts(
    {split: str(folder / f"{split}.jsonl") for split in SHARES},
    tuple(json.loads(index.read_text())),
  )


def _split_of(text: str) -> str:
  u = base.text_hash(text, "split") / 2**64
  for split, share in SHARES.items():
    if u < share:
      return split
    u -= share
  return "train"  # rounding of the shares
