"""Optimized HLO text as data: instructions, loops, source lines."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {
  "pred": 8,
  **{f"{kind}{bits}": bits for kind in "su" for bits in (2, 4, 8, 16, 32, 64)},
  **{f"f{bits}": bits for bits in (16, 32, 64)},
  "bf16": 16,
  "c64": 64,
  "c128": 128,
}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?(\S+) \(.*\{\s*$")
_INSTRUCTION = re.compile(
  r"\s+(ROOT )?%?([^\s=]+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)$"
)
_CALLED = {
  "calls": re.compile(r"\bcalls=%?([^\s,}]+)"),
  "to_apply": re.compile(r"\bto_apply=%?([^\s,}]+)"),
  "condition": re.compile(r"\bcondition=%?([^\s,}]+)"),
  "body": re.compile(r"\bbody=%?([^\s,}]+)"),
}
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_BRANCH = re.compile(r"\b(?:true|false)_computation=%?([^\s,}]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_FRAME = re.compile(r"\bstack_frame_id=(\d+)")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
# Folders of installed packages; the second is Debian's and Colab's.
_INSTALLED = ("site-packages", "dist-packages")


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of an HLO type.

  Attributes:
    dtype: as HLO writes it.
    shape: on one device.
    in_hbm: not in a scratch memory of the chip.
  """

  dtype: str
  shape: tuple[int, ...]
  in_hbm: bool

  @property
  def bytes(self) -> int:
    """Without the padding of tiled layouts."""
    bits = _BITS.get(self.dtype)
    if bits is None:  # f8e4m3fn and its kin
      bits = 8 if self.dtype.startswith("f8") else 4
    return math.prod(self.shape) * bits // 8


def arrays(type_text: str) -> list[Array]:
  """All arrays of an HLO type, tuples flattened."""
  return [
    Array(
      dtype,
      tuple(int(d) for d in dims.split(",") if d),
      # S(n) names a memory space; HBM, number 0, is not written out.
      in_hbm="S(" not in layout,
    )
    for dtype, dims, layout in _ARRAY.findall(type_text)
    if dtype in _BITS or dtype.startswith(("f8", "f4"))
  ]


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of HLO.

  Attributes:
    name: unique in the module.
    type: what it returns, with layouts, as written.
    opcode: for example "fusion".
    operands: names of instructions in the same computation.
    arguments: the text between the parentheses.
    attributes: the text after them.
    is_root: whether its computation returns it.
  """

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  arguments: str
  attributes: str
  is_root: bool

  @functools.cached_property
  def arrays(self) -> list[Array]:
    """What it returns."""
    return arrays(self.type)

  @property
  def bytes(self) -> int:
    """Size of what it returns, wherever that lies."""
    return sum(a.bytes for a in self.arrays)

  @property
  def hbm_bytes(self) -> int:
    """Size of the part that lies in HBM."""
    return sum(a.bytes for a in self.arrays if a.in_hbm)

  @property
  def op_name(self) -> str:
    """The JAX operation and the scopes around it; "" if unknown."""
    match = _OP_NAME.search(self.attributes)
    return match[1] if match else ""

  def called(self, role: str = "calls") -> str | None:
    """Name of the computation in that role, if there is one."""
    match = _CALLED[role].search(self.attributes)
    return match[1] if match else None

  @property
  def branches(self) -> list[str]:
    """Computations of a conditional, that of false before that of true."""
    match = _BRANCHES.search(self.attributes)
    if match:
      return [name.strip().lstrip("%") for name in match[1].split(",")]
    return _BRANCH.findall(self.attributes)[::-1]


class Computation:
  """Instructions in order, found by name, use and parameter number."""

  def __init__(self, instructions: list[Instruction]):
    self.instructions = instructions
    self.by_name = {i.name: i for i in instructions}
    self.root = next((i for i in instructions if i.is_root), None)
    self.users: dict[str, list[tuple[Instruction, int]]] = (
      collections.defaultdict(list)
    )
    for instruction in instructions:
      for index, operand in enumerate(instruction.operands):
        self.users[operand].append((instruction, index))

  def parameter(self, number: int) -> Instruction | None:
    """The parameter of that number."""
    wanted = str(number)
    for instruction in self.instructions:
      if (instruction.opcode, instruction.arguments) == ("parameter", wanted):
        return instruction
    return None


@dataclasses.dataclass(frozen=True)
class Executed:
  """An instruction of a computation that runs, not of a fusion's inside.

  Attributes:
    instruction: what runs.
    computation: where it stands.
    times: how often in one run of the module.
    branch: of the conditionals around it, outermost first, which branch it
      stands in.
  """

  instruction: Instruction
  computation: Computation
  times: int
  branch: tuple[int, ...] = ()


class Module:
  """A parsed HLO module."""

  def __init__(self, text: str):
    """Reads the text of `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: there is no entry computation.
    """
    self.computations, self.entry = _computations(text)
    if self.entry not in self.computations:
      raise ValueError("The text is no HLO module: it has no ENTRY.")
    self.header = text[: text.index("\n")]
    self._frames = _frames(text)

  def callee(self, instruction: Instruction) -> Computation | None:
    """What a fusion, or another instruction with `calls`, computes."""
    return self.computations.get(instruction.called() or "")

  def executed(self) -> Iterator[Executed]:
    """Every instruction that runs, loops unrolled into `times`.

    Of a conditional, all branches are visited.
    """
    yield from self._walk(self.entry, 1, ())

  def _walk(
    self, name: str, times: int, branch: tuple[int, ...]
  ) -> Iterator[Executed]:
    computation = self.computations[name]
    for instruction in computation.instructions:
      if instruction.opcode == "while":
        trips = self.trip_count(instruction)
        body = instruction.called("body")
        yield from self._walk(body, times * trips, branch)
      elif instruction.opcode == "conditional":
        for index, inner in enumerate(instruction.branches):
          yield from self._walk(inner, times, (*branch, index))
      elif instruction.opcode == "call":
        yield from self._walk(instruction.called("to_apply"), times, branch)
      else:
        yield Executed(instruction, computation, times, branch)

  def trip_count(self, loop: Instruction) -> int:
    """Iterations of a `while`; 1 if its bound is not a constant."""
    known = _TRIPS.search(loop.attributes)
    if known:
      return int(known[1])
    bounds = self._constants(loop.called("condition"))
    return max(bounds, default=1)

  def _constants(self, name: str | None) -> list[int]:
    computation = self.computations.get(name or "")
    found = []
    for instruction in computation.instructions if computation else ():
      if instruction.opcode == "constant":
        if instruction.arguments.isdigit():
          found.append(int(instruction.arguments))
      else:  # the bound may sit in a fused comparison
        found += self._constants(instruction.called())
    return found

  def source(self, instruction: Instruction) -> str:
    """`file:line` of the user's code behind an instruction; "" if unknown.

    The innermost frame outside installed packages counts, or the innermost.
    """
    match = _FRAME.search(instruction.attributes)
    callee = self.callee(instruction)
    if match is None and callee and callee.root:
      match = _FRAME.search(callee.root.attributes)
    frame, first = int(match[1]) if match else 0, ""
    for _ in self._frames:  # no path from a frame to its root is longer
      if frame not in self._frames:
        break
      place, frame = self._frames[frame]
      first = first or place
      if not any(folder in place for folder in _INSTALLED):
        return place
    return first


def _computations(text: str) -> tuple[dict[str, Computation], str]:
  bodies: dict[str, list[Instruction]] = {}
  entry, body = "", None
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      body = bodies.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
      continue
    match = _INSTRUCTION.match(line)
    if match and body is not None:
      arguments, attributes = _split_at_close(match[5])
      body.append(
        Instruction(
          name=match[2],
          type=match[3],
          opcode=match[4],
          operands=tuple(re.findall(r"%([^\s,()]+)", arguments)),
          arguments=arguments,
          attributes=attributes,
          is_root=bool(match[1]),
        )
      )
  return {name: Computation(body) for name, body in bodies.items()}, entry


def _split_at_close(text: str) -> tuple[str, str]:
  """`a, f(b)), rest` -> `a, f(b)`, `, rest`."""
  depth = 1
  for index, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return text[:index], text[index + 1 :]
  return text, ""


def _frames(text: str) -> dict[int, tuple[str, int]]:
  """By frame: (`file:line`, parent frame, 0 for none)."""
  tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
  table: dict[int, str] | None = None
  for line in text.splitlines():
    if line in tables:
      table = tables[line]
    elif table is not None and (match := re.match(r"(\d+) (.*)", line)):
      table[int(match[1])] = match[2]
    elif line.endswith("{"):
      break
  files = tables["FileNames"]

  def field(row, name):
    return int(re.search(rf"\b{name}=(\d+)", row)[1])

  places = {
    key: f"{files[field(row, 'file_name_id')].strip(chr(34))}"
    f":{field(row, 'line')}"
    for key, row in tables["FileLocations"].items()
  }
  return {
    # Parents are written with an offset of one, so that a root has one too.
    key: (
      places[field(row, "file_location_id")],
      field(row, "parent_frame_id") - 1,
    )
    for key, row in tables["StackFrames"].items()
  }
