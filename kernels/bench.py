r"""What our kernels cost beside the stock ones, on chips that are not here.

  python -m kernels.bench [--variant quick] [--output DIR]

Compiles the gradient of attention (forward and backward) for TPUs and prints,
by chip and shape, cycles of ours and of each stock kernel with its best tiles,
HBM bytes and VMEM; for an H100, registers, spills and shared memory. Writes
kernels.csv, kernels.md and kernels.png. `bertjax.hardware` says what a cycle
here is. Results are kept: the same command again continues where it was killed.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from bertjax import cli, hardware
from bertjax.registry import lookup
from experiments import plots, tables
from experiments.measurements import Measurements, fingerprint
from kernels.flash_attention import programs
from kernels.flash_attention.programs import IMPLEMENTATIONS, Shape

HERE = pathlib.Path(__file__).parent
CHIPS = {
  "v5e": "v5e:1x1",
  "v4": "v4:2x2x1",
  "v5p": "v5p:2x2x1",
  "v6e": "v6e:1x1",
}
SEARCHED = "v5e"
# (batch, heads, length, width): BERT's own, and what long documents need.
SHAPES = (
  (16, 12, 128, 64),
  (8, 12, 512, 64),
  (8, 16, 512, 64),
  (2, 16, 2048, 64),
  (1, 16, 8192, 64),
)
# Of what is compiled: how calls are split over devices changes no kernel.
_PACKAGE = pathlib.Path(programs.__file__).parent
SOURCES = tuple(
  path
  for path in sorted(_PACKAGE.rglob("*.py"))
  if path.stem
  not in ("placement", "reasons", "ring", "sharded", "varlen", "zigzag")
)
STOCK = ("stock_flash", "stock_splash")
OURS_MORE = {
  "hardware dropout": dict(
    dropout_rate=0.1, dropout_seed=0, dropout_generator="hardware"
  ),
  "counter dropout": dict(dropout_rate=0.1, dropout_seed=0),
  "relative bias (T5)": dict(relative_bias=True),
  "relative keys": dict(relative_keys=True),
  "relative queries": dict(relative_queries=True),
  "both (DeBERTa)": dict(relative_keys=True, relative_queries=True),
}


@dataclasses.dataclass(frozen=True)
class Scale:
  """How much a variant compiles.

  Attributes:
    chips: keys of `CHIPS`.
    shapes: of attention on TPUs.
    gpu_shapes: of attention on an H100.
    search: how many tiles of each stock kernel are tried; None: all.
  """

  chips: tuple[str, ...]
  shapes: tuple[Shape, ...]
  gpu_shapes: tuple[Shape, ...]
  search: int | None


SCALES = {
  "full": Scale(tuple(CHIPS), SHAPES, (SHAPES[2],), None),
  "quick": Scale(("v5e",), (SHAPES[0], SHAPES[2]), SHAPES[2:3], 1),
}


def tpu_cost(
  *, chip: str, name: str, sizes: Sequence[int], tiles: Any, options: dict
) -> dict[str, Any]:
  """Cycles and bytes of a compiled gradient, or why it does not compile."""
  try:
    program = hardware.compile_for(
      CHIPS[chip],
      programs.lower,
      name=name,
      sizes=tuple(sizes),
      tiles=tiles,
      options=options,
    )
  except (RuntimeError, ValueError, jax.errors.JaxRuntimeError) as err:
    return {"failed": str(err).split("\n")[0]}
  cost = hardware.price(program)
  kernels = [row for row in cost.rows if row.opcode == "custom-call"]
  return {
    "cycles": cost.cycles,
    "kernel_cycles": sum(row.estimate for row in kernels),
    "mxu_cycles": cost.mxu_cycles,
    "hbm_bytes": cost.hbm_bytes,
    "vmem_bytes": max(row.vmem_bytes for row in kernels),
    "temporary_bytes": program.memory.temporaries,
  }


def gpu_kernels(
  *, name: str, sizes: Sequence[int], dtype: str, options: dict
) -> dict[str, Any]:
  """What each kernel of a gradient occupies on an H100."""
  program = hardware.compile_for(
    "h100:1",
    programs.lower,
    name=name,
    sizes=tuple(sizes),
    dtype=dtype,
    options=options,
  )
  names = ("flash_attention", "mha_", "attention")
  return {
    "kernels": [
      {
        "kernel": k.name.removeprefix("flash_attention_"),
        "registers": k.registers,
        "spill_bytes": k.spill_stores + k.spill_loads,
        "shared_bytes": k.shared_memory,
      }
      for k in program.kernels
      if any(part in k.name for part in names)
    ]
  }


class Bench:
  """Measurements that are made again when what they are of has changed."""

  def __init__(self, workdir: pathlib.Path):
    pricing = pathlib.Path(hardware.__file__).parent
    self._stock = Measurements(
      workdir, fingerprint([pricing, programs.__file__])
    )
    self._ours = Measurements(workdir, fingerprint([pricing, *SOURCES]))

  def get(self, function, *, name: str, **arguments: Any) -> dict[str, Any]:
    """`function` of the implementation `name`; see `Measurements.get`."""
    made = self._stock if name.startswith("stock") else self._ours
    return made.get(function, name=name, **arguments)


def best(
  made: Bench, search: int | None, chip: str, name: str, sizes: Shape
) -> tuple[Any, dict[str, Any]]:
  """The tiles of an implementation with the fewest cycles, and its cost.

  The search is done for one chip; another takes what that one found best, or
  if it does not compile there, the next best that does.
  """
  choices = IMPLEMENTATIONS[name].tiles(sizes[2])[:search]

  def costs(chip, tiles):
    return made.get(
      tpu_cost, chip=chip, name=name, sizes=sizes, tiles=tiles, options={}
    )

  found = [(costs(SEARCHED, tiles), tiles) for tiles in choices]
  working = [x for x in found if "failed" not in x[0]]
  for _, tiles in sorted(working, key=lambda x: x[0]["cycles"]):
    cost = costs(chip, tiles)
    if "failed" not in cost:
      return tiles, cost
  raise RuntimeError(
    f"{name} does not compile for {chip} at {sizes}: {found[0][0]}"
  )


def tpu_rows(made: Bench, scale: Scale) -> Iterable[dict[str, Any]]:
  """One row a chip, shape, mask and implementation."""
  for chip in scale.chips:
    for sizes in scale.shapes:
      for name in ("ours", *STOCK):
        tiles, cost = best(made, scale.search, chip, name, sizes)
        runs = {"none": {}, "segment ids": {"segment_ids": True}}
        if name == "ours" and chip == SEARCHED:
          runs |= OURS_MORE
        for options_name, options in runs.items():
          if options:
            cost = made.get(
              tpu_cost,
              chip=chip,
              name=name,
              sizes=sizes,
              tiles=tiles,
              options=options,
            )
          yield {
            "chip": chip,
            "shape": _shown(sizes),
            "implementation": name,
            "tiles": "" if tiles is None else _shown(tiles),
            "options": options_name,
            **cost,
          }


def gpu_rows(made: Bench, scale: Scale) -> Iterable[dict[str, Any]]:
  """One row a kernel on an H100."""
  runs = (
    ("bfloat16", {}),
    ("bfloat16", {"segment_ids": True}),
    ("float32", {}),
  )
  for sizes in scale.gpu_shapes:
    for dtype, options in runs:
      for name in ("ours_gpu", "stock_triton"):
        found = made.get(
          gpu_kernels, name=name, sizes=sizes, dtype=dtype, options=options
        )
        for kernel in found["kernels"]:
          yield {
            "chip": "h100",
            "shape": _shown(sizes),
            "implementation": name,
            "dtype": dtype,
            "options": "segment ids" if options else "none",
            **kernel,
            "seconds": found["seconds"] / len(found["kernels"]),
          }


def _shown(values: Iterable[Any]) -> str:
  return " ".join(map(str, values))


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """A line a chip, shape and option: ours, and the stock kernels beside."""
  lines: dict[tuple, dict[str, dict[str, Any]]] = {}
  for row in rows:
    key = row["chip"], row["shape"], row["options"]
    lines.setdefault(key, {})[row["implementation"]] = row
  found = []
  for (chip, shape, options), by_name in lines.items():
    ours = by_name["ours"]
    line = {
      "chip": chip,
      "batch heads length width": shape,
      "options": options,
    }
    if "failed" in ours:  # refused by name; another backend runs there
      found.append(line | {"ours: cycles": ours["failed"]})
      continue
    line |= {
      "ours: cycles": f"{ours['cycles']:,.0f}",
      "kernels alone": f"{ours['kernel_cycles']:,.0f}",
      "HBM MB": f"{ours['hbm_bytes'] / 1e6:.1f}",
      "VMEM MiB": f"{ours['vmem_bytes'] / 2**20:.1f}",
    }
    for name in STOCK:
      if name not in by_name:
        continue
      other, title = by_name[name], name.replace("_", " ")
      if "failed" in other:
        line[title] = "does not compile"
        continue
      times = other["cycles"] / ours["cycles"]
      line[title] = f"{other['cycles']:,.0f} ({times:.2f}x)"
      line[f"its kernels ({name.removeprefix('stock_')})"] = (
        f"{other['kernel_cycles']:,.0f}"
      )
      line[f"its HBM MB ({name.removeprefix('stock_')})"] = (
        f"{other['hbm_bytes'] / 1e6:.1f}"
      )
    found.append(line)
  return found


def figure(rows: Sequence[dict[str, Any]]) -> Any:
  """How many times our cycles each stock kernel takes, by shape and chip."""
  drawn, axes = plots.panels(len(STOCK))
  rows = [r for r in rows if r["options"] == "none"]
  shapes = list(dict.fromkeys(r["shape"] for r in rows))
  chips = list(dict.fromkeys(r["chip"] for r in rows))
  cycles = {
    (r["chip"], r["shape"], r["implementation"]): r["cycles"] for r in rows
  }
  for panel, name in zip(axes, STOCK, strict=True):
    for place, chip in enumerate(chips):
      times = [
        cycles[chip, shape, name] / cycles[chip, shape, "ours"]
        for shape in shapes
      ]
      at = [i + 0.8 * place / len(chips) for i in range(len(shapes))]
      panel.bar(at, times, width=0.8 / len(chips), align="edge", label=chip)
    panel.axhline(1.0, color="gray", ls="--")
    panel.set_xticks(
      [i + 0.4 for i in range(len(shapes))],
      [s.replace(" ", "\n") for s in shapes],
      fontsize=7,
    )
    panel.set_title(f"{name.replace('_', ' ')}: cycles over ours", fontsize=9)
    panel.legend(fontsize=7)
  return drawn


def run(
  workdir: pathlib.Path,
  output: pathlib.Path,
  variant: str,
  chips: Sequence[str] | None = None,
) -> None:
  """Compiles what was not compiled yet, prints and writes the tables.

  Args:
    workdir: of finished measurements.
    output: folder of the tables.
    variant: key of `SCALES`.
    chips: keys of `CHIPS`, instead of the variant's.

  Raises:
    CompilerMissing: `libtpu` or the CUDA compiler is not installed.
  """
  scale = lookup(SCALES, variant, "variant")
  if chips:
    scale = dataclasses.replace(scale, chips=tuple(chips))
  made = Bench(workdir)
  tpu = []
  for row in tpu_rows(made, scale):
    print(_progress(row), file=sys.stderr)
    tpu.append(row)
  gpu = list(gpu_rows(made, scale))
  minutes = sum(row["seconds"] for row in (*tpu, *gpu)) / 60
  text = "\n\n".join(
    (
      "# Attention kernels: the compiled gradient, priced without a device",
      "Written by `python -m kernels.bench`. Cycles of the whole compiled"
      " program, bfloat16, forward and backward; in parentheses how many times"
      " ours the stock kernel takes with its best tiles.",
      tables.markdown(compared(tpu)),
      "Triton kernels, assembled for an H100:",
      tables.markdown(
        [{k: v for k, v in r.items() if k != "seconds"} for r in gpu]
      ),
      f"{minutes:.0f} minutes of compiling.",
    )
  )
  output.mkdir(parents=True, exist_ok=True)
  tables.write_csv(output / "kernels.csv", [*tpu, *gpu])
  (output / "kernels.md").write_text(text + "\n", encoding="utf-8")
  figure(tpu).savefig(output / "kernels.png", dpi=80)
  print(text)


def _progress(row: dict[str, Any]) -> str:
  cost = row.get("failed") or f"{row['cycles']:,.0f} cycles"
  names = ("chip", "shape", "implementation", "options", "tiles")
  return f"{', '.join(str(row[name]) for name in names)}: {cost}"


def main(arguments: Sequence[str] | None = None) -> None:
  """Command line."""
  parser = argparse.ArgumentParser(prog="python -m kernels.bench")
  parser.add_argument(
    "--variant", default="full", help="'full', or 'quick': a minute, one chip"
  )
  parser.add_argument(
    "--workdir",
    type=pathlib.Path,
    default=pathlib.Path("runs", "bench_kernels"),
    help="folder of finished measurements; default %(default)s",
  )
  parser.add_argument(
    "--output",
    type=pathlib.Path,
    help="folder of the tables; by default the experiment's, or for 'quick'"
    " the workdir",
  )
  parser.add_argument(
    "--chips", nargs="+", choices=CHIPS, help="only these TPUs"
  )
  options = parser.parse_args(arguments)
  output = options.output
  if output is None:
    experiment = HERE.parent / "experiments" / "flash_attention"
    output = experiment if options.variant == "full" else options.workdir
  cli.quiet()
  with cli.clear_errors():
    run(options.workdir, output, options.variant, options.chips)


if __name__ == "__main__":
  main()
