"""Full disks and kills leave whole checkpoints."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest

from bertjax import checkpoint
from bertjax.checkpoint import disk
from tests.checkpoints import make_state, save, saver, temporary

ROOT = pathlib.Path(__file__).parents[1]


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
