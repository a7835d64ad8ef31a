"""JAX settings of the whole suite; they must precede the first use of JAX."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Whichever test imports TensorFlow first brings Keras along and fixes this.
os.environ["KERAS_BACKEND"] = "jax"

import jax
from absl import flags

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# absltest's temporary folders ask for a flag, which pytest does not parse.
flags.FLAGS.mark_as_parsed()
