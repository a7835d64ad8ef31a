"""Commands on PATH that write down how they were called."""

import os
import pathlib
import sys
from unittest import mock

SHELLCHECK = pathlib.Path(sys.executable).with_name("shellcheck")


class Commands:
  """A folder of stand-ins, and what they were called with."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self._log = folder / "calls"
    (folder / "bin").mkdir(parents=True)

  def add(self, name: str, body: str = "") -> None:
    """A command that notes its arguments, then runs `body` (bash)."""
    path = self.folder / "bin" / name
    # Separators of units and records: arguments may have several lines.
    note = f"printf '%s\\x1f' {name} \"$@\"; printf '\\x1e'"
    path.write_text(f'#!/bin/bash\n{{ {note}; }} >> "{self._log}"\n{body}\n')
    path.chmod(0o755)

  def calls(self) -> list[list[str]]:
    """Command and arguments of all calls, in order."""
    if not self._log.exists():
      return []
    records = self._log.read_text().split("\x1e")[:-1]
    return [record.split("\x1f")[:-1] for record in records]

  def forget(self) -> None:
    """Begins the calls anew."""
    self._log.unlink(missing_ok=True)

  def environment(self, **more: str) -> dict[str, str]:
    path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
    return os.environ | {"PATH": path} | more

  def on_path(self):
    return mock.patch.dict(os.environ, self.environment())
