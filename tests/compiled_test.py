"""Compiling takes seconds, and commands keep programs for the next time."""

import os
import pathlib
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest
from jax.experimental.compilation_cache import compilation_cache

from bertjax import cli
from tests import optimized


class KeepCompiledTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir())
    for name in ("jax_compilation_cache_dir", "jax_enable_compilation_cache"):
      self.addCleanup(jax.config.update, name, getattr(jax.config, name))
    jax.config.update("jax_enable_compilation_cache", True)
    self.addCleanup(compilation_cache.reset_cache)
    cache = {"BERTJAX_CACHE": str(self.root / "cache")}
    self.enterContext(mock.patch.dict(os.environ, cache))

  def test_programs_are_kept_beside_the_token_caches(self):
    jax.config.update("jax_compilation_cache_dir", None)
    cli.keep_compiled()
    compilation_cache.reset_cache()
    jax.jit(lambda x: jnp.sin(x) * 3.25)(jnp.ones(7))
    kept = [path for path in self.root.rglob("*") if path.is_file()]
    self.assertNotEmpty(kept)
    self.assertEqual(kept[0].parents[1], self.root / "cache" / "compiled")

  def test_a_folder_that_the_user_chose_stays(self):
    chosen = str(self.root / "chosen")
    jax.config.update("jax_compilation_cache_dir", chosen)
    cli.keep_compiled()
    self.assertEqual(jax.config.jax_compilation_cache_dir, chosen)


class BertLargeTest(absltest.TestCase):
  def test_a_step_for_the_cpu_is_compiled_within_a_minute(self):
    done = subprocess.run(
      [sys.executable, "-m", "benchmarks.compiling", "--once"],
      env={**optimized.environment(), "JAX_PLATFORMS": "cpu"},
      cwd=pathlib.Path(__file__).parents[1],
      capture_output=True,
      text=True,
      check=True,
    )
    seconds = float(done.stdout.split()[-1])
    self.assertBetween(seconds, 1, 60)


if __name__ == "__main__":
  absltest.main()
