"""Where metrics are written: CSV, TensorBoard, Weights & Biases.

`step` counts finished optimizer steps. Every writer is told the step that the
run resumes from, so that a resumed run has each step once: the files forget
what an interrupted run wrote after it, Weights & Biases ignores what comes
again.
"""

import csv
import io
import os
import pathlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax

from bertjax import registry


@runtime_checkable
class Writer(Protocol):
  """Receives scalars; one object per destination."""

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Records `values` at `step`; steps never decrease."""

  def close(self) -> None:
    """Flushes; no `write` follows."""


class CsvWriter:
  """One row per step, one column per name; floats keep every digit.

  Values of the same step (training, then evaluation) share a row. A name seen
  for the first time adds a column and rewrites the file. Each row is on disk
  when `write` returns, and a row that a kill cut in half is dropped.
  """

  def __init__(self, path: str | os.PathLike, *, resume_from: int = 0):
    """Opens `path`, keeping rows up to step `resume_from` if it exists."""
    self._path = pathlib.Path(path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._columns, rows = ["step"], []
    if self._path.exists():
      self._columns, rows = _read_rows(self._path)
    rows = [row for row in rows if int(row["step"]) <= resume_from]
    self._last = rows.pop() if rows else None
    self._rewrite(rows)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    row = {name: repr(float(value)) for name, value in values.items()}
    if self._last is not None and int(self._last["step"]) == step:
      row = {**self._last, **row}
      self._file.seek(self._offset)
      self._file.truncate()
    elif self._last is not None and step < int(self._last["step"]):
      raise ValueError(
        f"step={step} comes after step {self._last['step']} in {self._path};"
        " open the writer with resume_from to go back."
      )
    self._last = {"step": str(step), **row}
    new = [name for name in self._last if name not in self._columns]
    if new:
      self._file.close()
      rows = [r for r in _read_rows(self._path)[1] if int(r["step"]) < step]
      self._columns += new
      self._rewrite(rows)
    else:
      self._append()

  def close(self) -> None:
    self._file.close()

  def _append(self) -> None:
    self._offset = self._file.seek(0, os.SEEK_END)
    self._file.write(_line(self._columns, self._last))
    self._file.flush()

  def _rewrite(self, rows: Sequence[Mapping[str, str]]) -> None:
    """Replaces the file by `rows` and the last row, at once."""
    draft = self._path.with_name(self._path.name + ".new")
    header = dict(zip(self._columns, self._columns))
    draft.write_bytes(
      b"".join(_line(self._columns, r) for r in [header, *rows])
    )
    os.replace(draft, self._path)
    self._file = self._path.open("r+b")
    if self._last is not None:
      self._append()


def read_csv(path: str | os.PathLike) -> dict[str, list[float]]:
  """Columns of a file of `CsvWriter`; an empty cell is NaN."""
  columns, rows = _read_rows(pathlib.Path(path))
  return {
    name: [float(row[name]) if row[name] else float("nan") for row in rows]
    for name in columns
  }


def _read_rows(path: pathlib.Path) -> tuple[list[str], list[dict[str, str]]]:
  """Header and whole rows; a last line without its end was cut by a kill."""
  text = path.read_bytes().decode()
  whole = text[: text.rfind("\n") + 1]
  lines = list(csv.reader(io.StringIO(whole, newline="")))
  if not lines:
    return ["step"], []
  header = lines[0]
  if header[0] != "step":
    raise ValueError(
      f"{path} is not a table of metrics: its first column is"
      f" {header[0]!r}, not 'step'."
    )
  return header, [dict(zip(header, line)) for line in lines[1:]]


def _line(columns: Sequence[str], row: Mapping[str, str]) -> bytes:
  out = io.StringIO(newline="")
  csv.writer(out, lineterminator="\n").writerow(
    [row.get(name, "") for name in columns]
  )
  return out.getvalue().encode()


class TensorBoardWriter:
  """Event files for TensorBoard, without TensorFlow."""

  def __init__(self, logdir: str | os.PathLike, *, resume_from: int = 0):
    from tensorboardX import SummaryWriter

    # Files are named by the second and read in the order of their names: the
    # suffix keeps a quick resume from overwriting the file before it.
    self._writer = SummaryWriter(
      os.fspath(logdir),
      purge_step=resume_from + 1,
      filename_suffix=f".{resume_from:012}",
    )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class WandbWriter:
  """A Weights & Biases run named after the workdir, grouped by its parent.

  Its id is kept in the workdir, by which a resumed run continues it. A run that
  begins at step 0 is a new one. What was written is not rewound: the server
  refuses that for a run that was killed, and where the preview is not enabled.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    resume_from: int = 0,
    project: str = "bertjax",
  ):
    try:
      import wandb
    except ImportError as err:
      raise ImportError(
        "The wandb writer needs the package: pip install wandb."
      ) from err
    folder = pathlib.Path(workdir).resolve()
    known = folder / "wandb_id"
    if not resume_from or not known.exists():
      known.write_text(secrets.token_hex(8))
    self._run = wandb.init(
      project=project,
      id=known.read_text(),
      name=folder.name,
      group=folder.parent.name,
      dir=os.fspath(folder),
      resume="allow",
    )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log(dict(values), step=step)

  def close(self) -> None:
    self._run.finish()


class MultiWriter:
  """Writes to each of several writers; with none it discards."""

  def __init__(self, writers: Sequence[Writer] = ()):
    self._writers = tuple(writers)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    for writer in self._writers:
      writer.write(step, values)

  def close(self) -> None:
    for writer in self._writers:
      writer.close()


WRITERS = {
  "csv": lambda workdir, resume_from: CsvWriter(
    pathlib.Path(workdir) / "metrics.csv", resume_from=resume_from
  ),
  "tensorboard": lambda workdir, resume_from: TensorBoardWriter(
    pathlib.Path(workdir) / "events", resume_from=resume_from
  ),
  "wandb": lambda workdir, resume_from: WandbWriter(
    workdir, resume_from=resume_from
  ),
}


def open_writers(
  workdir: str | os.PathLike,
  names: Sequence[str] = ("csv", "tensorboard"),
  *,
  resume_from: int = 0,
) -> Writer:
  """The writers called `names` on process 0, none on the others.

  Args:
    workdir: the run's folder.
    names: keys of `WRITERS`.
    resume_from: finished steps of the restored state; 0 for a new run.

  Raises:
    ValueError: an unknown name.
    ImportError: of a writer whose package is not installed.
  """
  builders = [registry.lookup(WRITERS, name, "writers") for name in names]
  if jax.process_index() != 0:
    return MultiWriter()
  return MultiWriter([build(workdir, resume_from) for build in builders])
