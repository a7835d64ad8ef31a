"""BERT-large's training step on one v5e chip, as its compiler plans it.

  python -m benchmarks.tpu [--batch_size=8] [--unrolled]

Phase 2 of configs/bert.py (512 tokens, dropout 0.1 everywhere) with LAMB. The
estimate is that of `python -m bertjax.plan`, which says what it leaves out.
"""

import argparse
import json
from typing import Any

from benchmarks import output
from bertjax import cli
from bertjax.config import merge, settings, stage_configs
from bertjax.plan import plan
from bertjax.planning import page
from configs import bert


def measure(batch_size: int, unrolled: bool = False) -> dict[str, Any]:
  """Figures of `bertjax.plan`.

  Args:
    batch_size: rows.
    unrolled: with model.scan=False, which takes longer to compile.
  """
  stage = stage_configs(bert.get_config("large"))["phase2"]
  stage["optim"] = {"name": "lamb", "learning_rate": 1e-3}
  changes = {
    "data": {"batch_size": batch_size},
    "model": {"scan": not unrolled},
    "init_from": None,
  }
  made = plan(
    settings(merge(stage, changes)), "v5e:1x1", vocab_size=30_522, suggest=False
  )
  print(page.render(made, f"BERT-large, LAMB, batch {batch_size}"))
  return page.figures(made)


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu")
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--unrolled", action="store_true")
  parser.add_argument("--json", type=output.path, help="file for all figures")
  options = parser.parse_args()
  with cli.clear_errors():
    found = measure(options.batch_size, options.unrolled)
  if options.json:
    options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
  main()
