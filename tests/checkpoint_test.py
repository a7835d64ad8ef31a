"""Checkpoints on real files: exact, atomic, and honest about damage."""

import pathlib
import random
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bertjax import checkpoint
from bertjax.checkpoint import disk
from tests.checkpoints import (
  CONFIG,
  abstract,
  bits,
  make_state,
  mesh,
  save,
  saver,
  temporary,
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

  @parameterized.parameters(1, 8)
  def test_buffers_may_be_donated_while_the_save_runs(self, devices):
    overwrite = jax.jit(
      lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0
    )
    expected = np.arange(3_000_000, dtype=np.float32) + 1
    big = jax.device_put(
      {"params": {"w": expected}}, NamedSharding(mesh(devices), P())
    )
    with checkpoint.Checkpointer(self.workdir) as checkpointer:
      save(checkpointer, 1, big)
      for _ in range(3):
        big = overwrite(big)
      jax.block_until_ready(big)
    params, _ = checkpoint.load_params(self.workdir)
    np.testing.assert_array_equal(params["w"], expected)

  def test_copies_are_saved_without_compiling(self):
    everywhere = NamedSharding(mesh(8), P())
    state = jax.device_put(make_state(3, rows=56), everywhere)
    with jax.log_compiles(), self.assertNoLogs("jax", "WARNING"):
      save(saver(self.workdir), 3, state)
    restored = saver(self.workdir).restore(abstract(state, 2))
    self.assert_same(restored.state, state)

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

  @parameterized.product(late=(False, True), keep_every=(None, 2))
  def test_what_is_removed_while_it_is_read_makes_way_for_the_newest(
    self, late, keep_every
  ):
    checkpointer = saver(self.workdir, keep=1, keep_every=keep_every)
    save(checkpointer, 2)
    save(checkpointer, 3)
    find = disk.first_intact

    def overtaken(folder, steps):
      chosen = find(folder, steps) if late else None
      save(checkpointer, 5)  # which removes 3
      return chosen or find(folder, steps)

    with (
      mock.patch.object(disk, "first_intact", side_effect=overtaken),
      self.assertLogs(level="WARNING") as logs,
    ):
      params, _ = checkpoint.load_params(self.workdir)
    self.assertEqual(bits(params), bits(make_state(5).params))
    self.assertIn("changed while it was read", logs.output[0])
    self.assertLen(logs.output, 1)
    with self.assertRaisesRegex(FileNotFoundError, "checkpoint of step 3"):
      checkpoint.load_params(self.workdir, 3)

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

  def test_a_run_of_several_is_its_best_or_last(self):
    folder = self.workdir / "seed=3" / "two" / "checkpoints"
    folder.mkdir(parents=True)
    checkpoint.link(self.workdir / checkpoint.BEST, "seed=3")
    checkpoint.link(self.workdir / "seed=3" / checkpoint.LAST, "two")
    found = pathlib.Path(checkpoint.located(self.workdir))
    self.assertTrue(found.samefile(folder.parent))
    folder.rmdir()  # what has no checkpoints is nobody's run
    found = pathlib.Path(checkpoint.located(self.workdir))
    self.assertEqual(found, self.workdir)

  def test_another_generator_is_named_as_the_config_would(self):
    save(saver(self.workdir), 2)
    other = make_state(2).replace(key=jax.random.key(2, impl="threefry2x32"))
    with self.assertRaisesRegex(ValueError, r"go on with --config\.prng=rbg\."):
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


if __name__ == "__main__":
  absltest.main()
