"""Commands keep compiled programs for the next time."""

import os
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest
from jax.experimental.compilation_cache import compilation_cache

from bertjax import cli


class KeepCompiledTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir())
    before = jax.config.jax_compilation_cache_dir
    self.addCleanup(jax.config.update, "jax_compilation_cache_dir", before)
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


if __name__ == "__main__":
  absltest.main()
