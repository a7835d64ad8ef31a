"""What a stage takes from the one before it, while no folder is there yet."""

import dataclasses

from bertjax.config import Settings
from bertjax.objectives import OBJECTIVES
from bertjax.objectives.frozen import frozen_fields


def continued(stage: Settings, before: Settings | None) -> Settings:
  """A stage with the model and tokenizer that it would find in a workdir.

  As `resolve.inherit` completes it once the stage before has run: what a config
  says itself stays, and a frozen model of the objective without a name is the
  model of that stage.

  Args:
    stage: as the config has it.
    before: the stage before, itself continued; None: there is none.
  """
  if before is None or "path" in (stage.init_from or {}):
    return stage
  model, data = dict(stage.model), dict(stage.data)
  objective = dict(stage.objective)
  if "name" not in model:
    model = {**before.model, **model}
  if (known := before.data.get("tokenizer")) is not None:
    own = data.setdefault("tokenizer", known)
    if own.get("name") == "extended" and "of" not in own:
      data["tokenizer"] = {**own, "of": known}
  builder = OBJECTIVES.get(objective.get("name"))
  for field in () if builder is None else frozen_fields(builder):
    spec = dict(objective.get(field) or {})
    if "name" not in spec and spec.get("path") is None:
      objective[field] = {**before.model, **spec}
  return dataclasses.replace(stage, model=model, data=data, objective=objective)
