"""Whether all devices that hold a parameter hold the same one, to the bit.

Optimizers that average by themselves (`optim.local`) update every replica on
its own; nothing but equal arithmetic keeps them equal. An evaluation

    config.evals.replicas = dict(name="replicas", every=100)

ends a run whose replicas have drifted apart.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bertjax import rules
from bertjax.evals.base import Evaluator


class ReplicaError(RuntimeError):
  """Devices that should hold the same parameters do not."""


def differing(tree: Any, mesh: Mesh) -> dict[str, int]:
  """How many numbers are not the same on all devices, by path name.

  Args:
    tree: of arrays that a NamedSharding over `mesh` places.
    mesh: the device mesh.
  """
  named = {
    rules.path_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  specs = {name: _spec(leaf) for name, leaf in named.items()}
  with jax.set_mesh(mesh):
    counts = jax.jit(
      jax.shard_map(
        lambda leaves: {
          name: _count(x, specs[name], mesh) for name, x in leaves.items()
        },
        mesh=mesh,
        in_specs=(specs,),
        out_specs=PartitionSpec(),
        check_vma=False,
      )
    )(named)
  return {name: int(n) for name, n in jax.device_get(counts).items()}


def _spec(leaf: jax.Array) -> PartitionSpec:
  sharding = leaf.sharding
  return (
    sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()
  )


def _count(x: jax.Array, spec: PartitionSpec, mesh: Mesh) -> jax.Array:
  """Numbers of a shard that differ between devices, over all shards."""
  entries = (e if isinstance(e, tuple) else (e,) for e in spec if e)
  shards = tuple(axis for entry in entries for axis in entry)
  copies = tuple(axis for axis in mesh.axis_names if axis not in shards)
  bits = jax.lax.bitcast_convert_type(x, f"int{8 * x.dtype.itemsize}")
  unequal = jax.lax.pmax(bits, copies) != jax.lax.pmin(bits, copies)
  return jax.lax.psum(jnp.sum(unequal, dtype=jnp.int32), shards)


def replicas(
  *, mesh: Mesh, objective: Any = None, data: Any = None
) -> Evaluator:
  """An evaluator that raises where replicas differ, else reports 0.

  Args:
    mesh: the device mesh.
    objective: not needed.
    data: not needed.

  Raises:
    ReplicaError: when called; names the parameters.
  """
  del objective, data

  def evaluate(
    variables: Mapping[str, Any], key: jax.Array
  ) -> dict[str, float]:
    del key
    found = {k: n for k, n in differing(variables["params"], mesh).items() if n}
    if found:
      shown = ", ".join(f"{k} ({n} numbers)" for k, n in sorted(found.items()))
      raise ReplicaError(
        f"Replicas of these parameters differ between devices: {shown}."
        " Training went on with several models; go back to a checkpoint from"
        " before that."
      )
    return {"differing": 0.0}

  return Evaluator(evaluate)
