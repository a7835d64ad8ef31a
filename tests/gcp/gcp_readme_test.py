"""The commands of gcp/README.md have the flags that they name."""

import pathlib
import re

from absl.testing import absltest, parameterized

from bertjax import hardware

_ROOT = pathlib.Path(__file__).parents[2]
_TEXT = (_ROOT / "gcp" / "README.md").read_text("utf-8").replace("\\\n", " ")
_COMMANDS = re.findall(r"^python -m (gcp\.\w+) (.*)$", _TEXT, re.M)
_WHICH = re.search(r'export WHICH="(.*)"', _TEXT)[1]


class CommandsTest(parameterized.TestCase):
  def test_there_are_commands_of_each_program(self):
    self.assertEqual(
      {module for module, _ in _COMMANDS}, {"gcp.tpu", "gcp.jobs"}
    )

  @parameterized.parameters(*_COMMANDS)
  def test_flags_and_files_exist(self, module, arguments):
    source = (_ROOT / f"{module.replace('.', '/')}.py").read_text("utf-8")
    # What parses it may stand before the name.
    known = re.findall(
      r'flags\.DEFINE\w*\(\s*(?:cli\.\w+,\s*)?"([\w-]+)"', source
    )
    arguments = arguments.split("#")[0].replace("$WHICH", _WHICH)
    for name, value in re.findall(r"--(\w[\w-]*)(?:=(\S+))?", arguments):
      self.assertIn(name, known)
      if name == "config":
        self.assertTrue((_ROOT / value.split(":")[0]).exists())
      if name == "topology":
        hardware.parse(value)


if __name__ == "__main__":
  absltest.main()
