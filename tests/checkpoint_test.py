"""Checkpoints on real files: exact, atomic, and honest about damage."""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized
from flax import struct
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bertjax import checkpoint
from bertjax.checkpoint import disk

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = {"seed": 3, "model": {"name": "bert", "sizes": [5, 7]}}


class State(struct.PyTreeNode):
  step: jax.Array
  params: dict
  opt_state: tuple
  key: jax.Array
  extra: dict


def temporary(test):
  path = pathlib.Path(tempfile.mkdtemp())
  test.addCleanup(shutil.rmtree, path, ignore_errors=True)
  return path


def mesh(n):
  return jax.make_mesh(
    (n,), ("data",), (AxisType.Auto,), devices=jax.devices()[:n]
  )


def make_state(seed, devices=4, rows=8, dtype=jnp.float32):
  """A state like the loop's: sharded kernel, adam moments, typed key."""
  kernel = jax.random.normal(jax.random.key(seed), (rows, 6), dtype)
  params = {
    "encoder": {
      "kernel": jax.device_put(kernel, NamedSharding(mesh(devices), P("data"))),
      "bias": jnp.arange(5, dtype=jnp.bfloat16) / 3 + seed,
    }
  }
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  opt_state = optimizer.init(params)
  _, opt_state = optimizer.update(params, opt_state, params)
  return State(
    step=jnp.int32(seed),
    params=params,
    opt_state=opt_state,
    key=jax.random.key(seed, impl="rbg"),
    extra={"queue": jnp.full((3,), seed, jnp.int8)},
  )


def abstract(state, devices):
  def one(x):
    spec = P("data") if x.ndim == 2 else P()
    return jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh(devices), spec)
    )

  return jax.tree.map(one, state)


def bits(tree):
  def one(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    return np.asarray(x).tobytes()

  return [one(x) for x in jax.tree.leaves(tree)]


def saver(workdir, **kwargs):
  return checkpoint.Checkpointer(workdir, save_async=False, **kwargs)


def save(checkpointer, step, state=None, **kwargs):
  return checkpointer.save(
    step,
    make_state(step) if state is None else state,
    iterator_state={"next": step},
    config=CONFIG,
    **kwargs,
  )


def data_file(folder):
  """The largest file of a checkpoint: array data."""
  files = [p for p in folder.rglob("*") if p.is_file() and "/d/" in str(p)]
  return max(files, key=lambda p: p.stat().st_size)


def truncate(folder):
  path = data_file(folder)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(folder):
  path = data_file(folder)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def delete(folder):
  data_file(folder).unlink()


def delete_manifest(folder):
  (folder / "manifest.json").unlink()


def garble_manifest(folder):
  (folder / "manifest.json").write_text('{"format": 1, "files": {')


def folder_for_file(folder):
  path = folder / "meta.json"
  path.unlink()
  path.mkdir()


DAMAGE = (
  ("truncated", truncate, "has changed"),
  ("flipped_bit", flip, "has changed"),
  ("deleted_file", delete, "is missing"),
  ("no_manifest", delete_manifest, "manifest.json is missing"),
  ("garbled_manifest", garble_manifest, "manifest.json is not JSON"),
  ("folder_for_file", folder_for_file, "meta.json cannot be read"),
)


class CheckpointTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = temporary(self)
    self.folder = self.workdir / "checkpoints"

  def assert_same(self, a, b):
    self.assertEqual(jax.tree.structure(a), jax.tree.structure(b))
    self.assertEqual(bits(a), bits(b))

  @parameterized.parameters(4, 2, 1, 8)
  def test_restore_is_bitwise_exact_on_any_number_of_devices(self, devices):
    state = make_state(3, devices=4)
    with checkpoint.Checkpointer(self.workdir) as checkpointer:
      self.assertTrue(save(checkpointer, 3, state))
    target = abstract(state, devices)
    restored = saver(self.workdir).restore(target)
    self.assert_same(restored.state, state)
    self.assertEqual(restored.step, 3)
    self.assertEqual(restored.iterator_state, {"next": 3})
    self.assertEqual(restored.config, CONFIG)
    self.assertEqual(restored.skipped, ())
    for got, want in zip(
      jax.tree.leaves(restored.state), jax.tree.leaves(target)
    ):
      self.assertTrue(got.sharding.is_equivalent_to(want.sharding, got.ndim))
      self.assertEqual(got.dtype, want.dtype)
    # The restored key continues the same stream of random numbers.
    np.testing.assert_array_equal(
      jax.random.bits(restored.state.key, (7,)),
      jax.random.bits(state.key, (7,)),
    )

  def test_leaf_without_sharding_goes_to_one_device(self):
    save(saver(self.workdir), 2)
    plain = jax.eval_shape(lambda: make_state(2))
    restored = saver(self.workdir).restore(plain)
    self.assert_same(restored.state, make_state(2))
    kernel = restored.state.params["encoder"]["kernel"]
    self.assertLen(kernel.sharding.device_set, 1)

  def test_buffers_may_be_donated_while_the_save_runs(self):
    overwrite = jax.jit(
      lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0
    )
    big = {"params": {"w": jnp.arange(3_000_000, dtype=jnp.float32) + 1}}
    expected = np.array(big["params"]["w"])
    with checkpoint.Checkpointer(self.workdir) as checkpointer:
      save(checkpointer, 1, big)
      for _ in range(3):
        big = overwrite(big)
      jax.block_until_ready(big)
    params, _ = checkpoint.load_params(self.workdir)
    np.testing.assert_array_equal(params["w"], expected)

  def test_load_params_needs_no_mesh_and_reads_only_parameters(self):
    state = make_state(4)
    save(saver(self.workdir), 4, state)
    save(saver(self.workdir), 6)
    for path, step in (
      (self.workdir, 4),
      (self.folder, 4),
      (self.folder / "4", None),
    ):
      params, config = checkpoint.load_params(path, step)
      self.assert_same(params, jax.tree.map(np.asarray, state.params))
      self.assertTrue(
        all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))
      )
      self.assertEqual(config, CONFIG)
    newest, _ = checkpoint.load_params(self.workdir)
    self.assertEqual(bits(newest), bits(make_state(6).params))

  @parameterized.named_parameters(*DAMAGE)
  def test_damaged_newest_falls_back_and_says_so(self, damage, reason):
    checkpointer = saver(self.workdir, keep=3)
    save(checkpointer, 2)
    save(checkpointer, 5)
    damage(self.folder / "5")
    before = sorted(self.folder.rglob("*"))

    checkpointer = saver(self.workdir, keep=3)
    with self.assertLogs(level="WARNING") as logs:
      restored = checkpointer.restore(abstract(make_state(0), 2))
    self.assertEqual(restored.step, 2)
    self.assert_same(restored.state, make_state(2))
    self.assertEqual(restored.iterator_state, {"next": 2})
    self.assertEqual(restored.skipped[0][0], 5)
    self.assertIn(reason, restored.skipped[0][1])
    self.assertRegex("\n".join(logs.output), "step 5.*damaged.*step 2")
    self.assertEqual(sorted(self.folder.rglob("*")), before)
    self.assertEqual(checkpointer.latest_step(), 2)
    self.assertEqual(
      bits(checkpoint.load_params(self.workdir)[0]), bits(make_state(2).params)
    )
    # The run continues from 2 and comes to 5 again.
    self.assertTrue(save(checkpointer, 5))
    self.assertTrue((self.folder / "5.damaged").is_dir())
    self.assertEqual(saver(self.workdir).restore(make_state(0)).step, 5)

  def test_any_flipped_bit_of_any_file_is_noticed(self):
    save(saver(self.workdir), 2)
    folder = self.folder / "2"
    checkpoint.verify(folder)
    rng = random.Random(0)
    files = [p for p in folder.rglob("*") if p.is_file()]
    self.assertGreater(len(files), 5)
    for path in files:
      content = path.read_bytes()
      for _ in range(10 if content else 0):
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with self.assertRaises(checkpoint.DamagedError, msg=str(path)):
          checkpoint.verify(folder)
      path.write_bytes(content)
    checkpoint.verify(folder)

  def test_all_damaged_is_one_clear_error(self):
    checkpointer = saver(self.workdir)
    save(checkpointer, 2)
    save(checkpointer, 5)
    truncate(self.folder / "2")
    delete(self.folder / "5")
    checkpointer = saver(self.workdir)
    # A damaged run must not look like a fresh start.
    self.assertEqual(checkpointer.latest_step(), 5)
    with self.assertRaisesRegex(
      checkpoint.CheckpointError, "(?s)No checkpoint.*step 5.*missing.*step 2"
    ):
      checkpointer.restore(make_state(0))
    with self.assertRaisesRegex(checkpoint.CheckpointError, "No checkpoint"):
      checkpoint.load_params(self.workdir)

  def test_damaged_checkpoint_does_not_push_out_good_ones(self):
    checkpointer = saver(self.workdir, keep=2)
    save(checkpointer, 2)
    save(checkpointer, 9)
    flip(self.folder / "9")
    checkpointer = saver(self.workdir, keep=2)
    checkpointer.restore(make_state(0))
    save(checkpointer, 3)
    self.assertEqual(checkpointer.steps(), (2, 3, 9))
    save(checkpointer, 4)
    self.assertEqual(checkpointer.steps(), (3, 4, 9))
    save(checkpointer, 9)
    self.assertEqual(checkpointer.steps(), (4, 9))

  @parameterized.named_parameters(
    (
      "shape",
      lambda p: {**p, "kernel": jnp.zeros((8, 7))},
      r"'params/encoder/kernel'.*float32\[8, 6\] in the checkpoint"
      r".*float32\[8, 7\]",
    ),
    (
      "dtype",
      lambda p: {**p, "bias": jnp.zeros((5,))},
      r"'params/encoder/bias'.*bfloat16\[5\].*float32\[5\]",
    ),
    (
      "missing",
      lambda p: {**p, "scale": jnp.zeros((5,))},
      r"'params/encoder/scale'.*this model has it as float32\[5\]",
    ),
    (
      "unexpected",
      lambda p: {"kernel": p["kernel"]},
      r"'params/encoder/bias'.*the checkpoint has it as bfloat16\[5\]",
    ),
  )
  def test_foreign_checkpoint_is_refused_by_name(self, change, message):
    save(saver(self.workdir), 2)
    before = sorted(self.folder.rglob("*"))
    other = make_state(2)
    params = {"encoder": change(other.params["encoder"])}
    other = other.replace(
      params=params, opt_state=optax.adamw(1e-3).init(params)
    )
    with self.assertRaisesRegex(ValueError, message):
      saver(self.workdir).restore(abstract(other, 1))
    self.assertEqual(sorted(self.folder.rglob("*")), before)
    saver(self.workdir).restore(make_state(0))

  def test_other_optimizer_is_refused_by_name(self):
    save(saver(self.workdir), 2)
    other = make_state(2)
    other = other.replace(opt_state=optax.sgd(1e-3, 0.9).init(other.params))
    with self.assertRaisesRegex(ValueError, "'opt_state/.*differs"):
      saver(self.workdir).restore(abstract(other, 1))

  def test_nothing_to_restore(self):
    checkpointer = saver(self.workdir)
    self.assertIsNone(checkpointer.latest_step())
    with self.assertRaisesRegex(FileNotFoundError, "no checkpoint in"):
      checkpointer.restore(make_state(0))
    save(checkpointer, 2)
    with self.assertRaisesRegex(FileNotFoundError, r"step 4 in .*\[2\]"):
      checkpointer.restore(make_state(0), step=4)
    with self.assertRaisesRegex(FileNotFoundError, "no checkpoint"):
      checkpoint.load_params(self.workdir / "elsewhere")

  def test_retention(self):
    checkpointer = saver(self.workdir, keep=2, keep_every=10, best_metric="acc")
    scores = {7: 0.1, 10: 0.3, 12: 0.9, 15: float("nan"), 16: 0.2, 18: 0.4}
    for step, score in scores.items():
      save(checkpointer, step, metrics={"acc": score})
    self.assertEqual(checkpointer.steps(), (10, 12, 16, 18))
    self.assertEqual(checkpointer.best_step(), 12)
    lowest = saver(self.workdir, best_metric="acc", best_mode="min")
    self.assertEqual(lowest.best_step(), 16)

  def test_saving_an_intact_step_again_writes_nothing(self):
    checkpointer = saver(self.workdir)
    self.assertTrue(save(checkpointer, 2))
    self.assertFalse(save(checkpointer, 2))
    self.assertFalse(save(saver(self.workdir), 2))

  def test_interrupted_save_and_removal_leave_no_trace(self):
    checkpointer = saver(self.workdir)
    save(checkpointer, 2)
    for step in (3, 4):  # killed while written; killed while removed
      shutil.copytree(self.folder / "2", self.folder / str(step))
      (self.folder / str(step) / "manifest.json").unlink()
      (self.folder / str(step) / "UNFINISHED").write_text("")
    (self.folder / "6").mkdir()
    checkpointer = saver(self.workdir)
    self.assertEqual(checkpointer.latest_step(), 2)
    self.assertEqual(checkpointer.restore(make_state(0)).skipped, ())
    self.assertTrue(save(checkpointer, 4))
    self.assertCountEqual([p.name for p in self.folder.iterdir()], ["2", "4"])
    self.assertEqual(checkpointer.restore(make_state(0)).step, 4)

  def test_arguments_are_checked(self):
    with self.assertRaisesRegex(ValueError, "keep=0"):
      checkpoint.Checkpointer(self.workdir, keep=0)
    with self.assertRaisesRegex(ValueError, "keep_every=-1"):
      checkpoint.Checkpointer(self.workdir, keep_every=-1)
    with self.assertRaisesRegex(ValueError, "best_mode='up'"):
      checkpoint.Checkpointer(self.workdir, best_mode="up")
    checkpointer = saver(self.workdir)
    with self.assertRaisesRegex(ValueError, "iterator_state holds"):
      checkpointer.save(
        1, make_state(1), iterator_state={"i": jnp.ones(2)}, config={}
      )
    with self.assertRaisesRegex(ValueError, "'step' is a int"):
      checkpointer.save(1, {"step": 1}, iterator_state={}, config={})
    self.assertEqual(checkpointer.steps(), ())


class DiskFullTest(absltest.TestCase):
  """A save that does not fit, on a real small file system if we may mount."""

  def setUp(self):
    super().setUp()
    self.workdir = temporary(self)
    mount = subprocess.run(
      ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", self.workdir],
      capture_output=True,
      check=False,
    )
    self.mounted = mount.returncode == 0
    if self.mounted:
      self.addCleanup(
        subprocess.run, ["umount", "-l", self.workdir], check=True
      )

  def check(self, checkpointer, big):
    with self.assertRaisesRegex(
      checkpoint.CheckpointError,
      r"(?s)step 7 could not be written.*needs up to [\d,]+ bytes,"
      r" [\d,]+ bytes are free.*step 5 is intact",
    ):
      save(checkpointer, 7, big)
    self.assertEqual(checkpointer.steps(), (5,))
    names = [p.name for p in (self.workdir / "checkpoints").iterdir()]
    self.assertEqual(names, ["5"])
    # The run can go on: the same object restores and saves again.
    self.assertEqual(checkpointer.restore(make_state(0)).step, 5)
    self.assertTrue(save(checkpointer, 8))

  def test_space_is_checked_before_writing(self):
    if not self.mounted:
      self.skipTest("may not mount a small file system")
    checkpointer = saver(self.workdir)
    save(checkpointer, 5)
    big = {"params": {"w": np.random.default_rng(0).random(400_000)}}
    self.check(checkpointer, big)

  def test_disk_fills_while_writing(self):
    if not self.mounted:
      self.skipTest("may not mount a small file system")
    checkpointer = saver(self.workdir)
    save(checkpointer, 5)
    big = {"params": {"w": np.random.default_rng(0).random(400_000)}}
    # Another program takes the space between the check and the write.
    checkpointer._make_room = lambda step, needed: None
    self.addCleanup(checkpointer.close)
    with self.subTest("write fails in the storage library"):
      with self.assertRaisesRegex(
        checkpoint.CheckpointError, "step 5 is intact"
      ) as caught:
        save(checkpointer, 7, big)
      self.assertIsNotNone(caught.exception.__cause__)
    del checkpointer._make_room
    self.assertEqual(checkpointer.steps(), (5,))
    self.assertTrue(save(checkpointer, 8))
    self.assertEqual(checkpointer.restore(make_state(0)).step, 8)

  def test_file_size_limit_while_writing(self):
    # As for a quota: every write beyond 100 kB fails, whatever is free.
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import numpy as np
from bertjax import checkpoint
c = checkpoint.Checkpointer({str(self.workdir)!r})
c.save(5, {{"params": {{"w": np.ones(9)}}}}, iterator_state={{}}, config={{}})
c.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
big = {{"params": {{"w": np.random.default_rng(0).random(40_000)}}}}
try:
  c.save(7, big, iterator_state={{}}, config={{}})
  c.wait()
except checkpoint.CheckpointError as err:
  print(err)
c.close()
print("steps", c.steps())
"""
    out = subprocess.run(
      [sys.executable, "-c", code],
      cwd=ROOT,
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    self.assertRegex(out, "step 7 could not be written.*step 5 is intact")
    self.assertIn("steps (5,)", out)


KILLED = """
import sys
import numpy as np
from bertjax import checkpoint
c = checkpoint.Checkpointer(sys.argv[1], keep=2)
for step in range(int(sys.argv[2]), 100_000):
  state = {"params": {str(i): np.full(50_000, step + i / 64) for i in range(9)}}
  c.save(step, state, iterator_state={"next": step}, config={})
  if step % 5 == 0:
    print(step, flush=True)
"""


class KillTest(absltest.TestCase):
  def test_half_a_manifest_is_none(self):
    """A kill while it is written leaves what counts as unfinished."""
    folder = disk.absolute(temporary(self))
    (folder / disk.MARKER).write_text("")
    (folder / disk.META).write_text("{}")

    def killed(path, text):
      with path.open("w") as file:
        file.write(text[: len(text) // 2])
      raise KeyboardInterrupt

    with (
      mock.patch.object(type(folder), "write_text", killed),
      self.assertRaises(KeyboardInterrupt),
    ):
      disk.commit(folder)
    self.assertTrue(disk.is_unfinished(folder))
    disk.commit(folder)
    self.assertFalse(disk.is_unfinished(folder))
    disk.verify(folder)

  def test_kill_at_any_moment_leaves_a_whole_checkpoint(self):
    workdir = temporary(self)
    like = {
      "params": {
        str(i): jax.ShapeDtypeStruct((50_000,), np.float64) for i in range(9)
      }
    }
    rng = random.Random(1)
    reached = 0
    for _ in range(4):
      child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(workdir), str(reached + 1)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"},
        stdout=subprocess.PIPE,
        text=True,
      )
      printed = int(child.stdout.readline())
      time.sleep(rng.uniform(0, 0.3))
      child.send_signal(signal.SIGKILL)
      child.wait()
      child.stdout.close()
      with saver(workdir) as checkpointer, jax.enable_x64(True):
        restored = checkpointer.restore(like)
      # `save` had returned for `printed`, so the one before is committed.
      self.assertGreaterEqual(restored.step, printed - 1)
      self.assertEqual(restored.skipped, ())
      self.assertEqual(restored.iterator_state, {"next": restored.step})
      for i in range(9):
        np.testing.assert_array_equal(
          restored.state["params"][str(i)], restored.step + i / 64
        )
      reached = restored.step


if __name__ == "__main__":
  absltest.main()
