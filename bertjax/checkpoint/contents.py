"""What a checkpoint holds: arrays by name, shape and size, and JSON values."""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from bertjax import rules


def describe(tree: Any) -> list[list[Any]]:
  """`[name, shape, dtype]` of every leaf; also works on abstract trees."""
  described = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = rules.path_name(path)
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
      raise ValueError(
        f"state: {name!r} is a {type(leaf).__name__}; a checkpoint holds"
        " arrays, so wrap it in jnp.asarray."
      )
    described.append([name, list(leaf.shape), str(leaf.dtype)])
  return described


def refuse_foreign(
  saved: list[list[Any]], wanted: list[list[Any]], path: epath.Path
) -> None:
  """Raises ValueError naming the first array that differs, parameters first."""
  have = {name: (tuple(shape), dtype) for name, shape, dtype in saved}
  want = {name: (tuple(shape), dtype) for name, shape, dtype in wanted}
  ordered = [name for name, *_ in wanted] + [
    name for name, *_ in saved if name not in want
  ]
  ordered.sort(key=lambda name: not name.startswith("params/"))  # stable
  for name in ordered:
    if have.get(name) == want.get(name):
      continue
    if generator := _other_generator(have.get(name), want.get(name)):
      raise ValueError(
        f"{path} was written with another generator of random numbers, as"
        " 'auto' chooses by platform; go on with"
        f" --config.prng={generator}. Nothing was changed."
      )
    if name not in have:
      shape, dtype = want[name]
      detail = f"this model has it as {dtype}{list(shape)}, the checkpoint not"
    elif name not in want:
      shape, dtype = have[name]
      detail = f"the checkpoint has it as {dtype}{list(shape)}, this model not"
    else:
      detail = (
        f"{have[name][1]}{list(have[name][0])} in the checkpoint,"
        f" {want[name][1]}{list(want[name][0])} in this model"
      )
    raise ValueError(
      f"{path} belongs to another model: {name!r} differs ({detail})."
      " Use the config of that run, or another workdir. Nothing was changed."
    )


# Of `config.prng`, by how the dtype of a key says it.
_GENERATORS = {
  "key<fry>": "threefry2x32",
  "key<rbg>": "rbg",
  "key<urbg>": "unsafe_rbg",
}


def _other_generator(
  saved: tuple[Any, str] | None, wanted: tuple[Any, str] | None
) -> str | None:
  """The generator of a saved key, if the wanted one is a key of another."""
  if saved is None or wanted is None or wanted[1] not in _GENERATORS:
    return None
  return _GENERATORS.get(saved[1])


def placed(leaf: Any) -> jax.ShapeDtypeStruct:
  """The leaf where it asks to be; without a wish, on the first device."""
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def nbytes(x: Any) -> int:
  """Bytes of an array; a key array does not tell its own on every version."""
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  return math.prod(x.shape) * np.dtype(x.dtype).itemsize


def jsonable(values: Mapping[str, Any], field: str) -> dict[str, Any]:
  """`values` as JSON would give them back (tuples become lists)."""
  if hasattr(values, "to_dict"):  # ml_collections.ConfigDict
    values = values.to_dict()
  try:
    return json.loads(json.dumps(dict(values)))
  except TypeError as err:
    raise ValueError(
      f"{field} holds something that JSON cannot ({err}); use numbers,"
      " strings, lists and dicts."
    ) from err
