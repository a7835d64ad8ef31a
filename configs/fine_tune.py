r"""Fine-tuning of a pre-trained encoder (Devlin et al. 2018, section 4).

Run:   python -m bertjax.train --config=configs/fine_tune.py:sst2 \
           --config.init_from.path=FOLDER --workdir=runs/sst2
       The argument is a row of the table bertjax.tasks.TASKS ("glue/" and
       "super_glue/" may be left out): cola sst2 mrpc stsb qqp mnli qnli rte
       boolq cb copa wic squad squad_v2 swag hellaswag conll2003 wnut17...
       FOLDER is a workdir or a published folder; model and tokenizer are its.
Then:  python -m bertjax.evaluate --model=runs/sst2 --split=validation
       python -m bertjax.predict classify --model=runs/sst2 --text="..."
       python -m bertjax.convert --from=runs/sst2 --to=out --format=huggingface
Tiny:  --config=configs/fine_tune.py:tiny   (a minute, no network, no FOLDER)
Needs: the task, prepared by TFDS (in --config.data.task.data_dir, if not in its
       usual folder); or, in a copy of this file, data.task.source =
       dict(name="jsonl", paths=dict(train=..., validation=...)).
Search: the grid of section A.3, in a copy of this file:
         c.grid = dict(optim=dict(learning_rate=[5e-5, 3e-5, 2e-5]),
                       data=dict(batch_size=[16, 32]),
                       stop=dict(epochs=[2, 3, 4]))
         c.keep = dict(best_metric="dev/accuracy")
       --model=runs/sst2 is then the best run. c.stop.early =
       dict(metric="dev/accuracy", patience=2) ends a run that stands still.
Also:  --config.optim.layerwise_decay=0.9 --config.optim.freeze_lowest=2
       --config.init_from.reinit.top_k=2
Seen:  tiny, 143 steps: dev accuracy 0.860, macro F1 0.852 (on another machine,
       with other packages to read, accuracy 0.847); guessing "flax" is
       0.369, 0.135. Nobody here has the published tasks.

Three epochs, the rate up over a tenth of them and down to 0 over the rest.
"""

import ml_collections
from ml_collections import config_dict

from bertjax.config import new_config
from bertjax.tasks import TASKS

# Where the paper differs from batches of 32 rows of 128 tokens.
_RECIPES = {
  "conll2003": dict(learning_rate=5e-5),
  "squad": dict(seq_len=384),
  "squad_v2": dict(seq_len=384),
  "swag": dict(batch_size=16, learning_rate=2e-5),
}
# Split on which the metrics are taken, where it has another name.
_VALIDATION = {"glue/mnli": "validation_matched"}


def get_config(variant: str = "sst2") -> ml_collections.ConfigDict:
  names = (variant, f"glue/{variant}", f"super_glue/{variant}",
           f"{variant}2003")  # fmt: skip
  task = next((name for name in names if name in TASKS), variant)
  recipe = dict(batch_size=32, seq_len=128, learning_rate=3e-5)
  recipe |= _RECIPES.get(task, {})
  c = new_config()
  c.seed = 0
  c.dtype = "bfloat16"
  c.init_from = dict(path="bert-base-uncased", reinit=dict(top_k=0))
  c.data = dict(
    name="task",
    task=dict(name=task, data_dir=config_dict.placeholder(str)),
    seq_len=recipe["seq_len"],
    batch_size=recipe["batch_size"],
  )
  c.optim = dict(
    name="adamw",
    learning_rate=recipe["learning_rate"],
    weight_decay=0.01,
    clip_norm=1.0,
    layerwise_decay=1.0,
    freeze_lowest=config_dict.placeholder(int),
    schedule=dict(name="linear", warmup=0.1),
  )
  c.stop = dict(epochs=3)
  split = _VALIDATION.get(task, "validation")
  c.evals = dict(dev=dict(name="task_metrics", split=split, every_epochs=1))
  c.every = dict(log=20, checkpoint=500)
  if variant == "tiny":
    _make_tiny(c)
  return c


def _make_tiny(c: ml_collections.ConfigDict) -> None:
  """Which package a line of documentation is from, learned from nothing."""
  c.init_from = {}
  c.dtype = "float32"
  c.model = dict(name="bert", size="tiny")
  c.data.task = dict(
    name="docstrings", packages=("absl-py", "flax", "grain", "optax")
  )
  c.data.tokenizer = dict(name="train", kind="wordpiece", vocab_size=4096)
  c.data.seq_len = 32
  c.optim.learning_rate = 1e-3
  c.every = dict(log=10, checkpoint=50)
