"""Commands on PATH that write down how they were called."""

import json
import os
import pathlib
from unittest import mock


class Commands:
  """A folder of stand-ins, and what they were called with."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self._log = folder / "calls.jsonl"
    (folder / "bin").mkdir(parents=True)

  def add(self, name: str, body: str = "") -> None:
    """A command that notes its arguments, then runs `body` (bash)."""
    path = self.folder / "bin" / name
    path.write_text(
      "#!/bin/bash\n"
      f"python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
      f' {name} "$@" >> "{self._log}"\n{body}\n'
    )
    path.chmod(0o755)

  def calls(self) -> list[list[str]]:
    """Command and arguments of all calls, in order."""
    if not self._log.exists():
      return []
    return [json.loads(line) for line in self._log.read_text().splitlines()]

  def environment(self, **more: str) -> dict[str, str]:
    path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
    return os.environ | {"PATH": path} | more

  def on_path(self):
    return mock.patch.dict(os.environ, self.environment())
