"""JAX settings of the whole suite; they must precede the first use of JAX."""

import collections
import gc
import importlib.util
import os
import shutil
import tempfile
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Whichever test imports TensorFlow first brings Keras along and fixes this.
os.environ["KERAS_BACKEND"] = "jax"

# Tests compile thousands of programs for the CPU, to run each once or twice: a
# quick compiler saves more than fast code. Processes that tests start inherit
# all of it; compilers for TPUs and GPUs heed none of it. See
# `tests/optimized.py` for the compiler of real runs. Programs compiled in parts
# keep both cores busier, and take more of them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = " ".join(
  (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
    os.environ.get("XLA_FLAGS", ""),
  )
).strip()
# A worker per core: threads of OpenMP would wait for each other, spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A folder per session and worker: nothing outlives a run of the suite, and no
# two workers write the same file.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import joblib
import pytest
from absl import flags

# Named by `--jaxtyping-packages`, which imports no more than `tests`.
import tests.typechecker  # noqa: F401

# torch's compiler, part of its wheels for CUDA, crashes the process when
# transformers imports it, if TensorFlow was there before.
if importlib.util.find_spec("triton") is not None:
  importlib.import_module("triton")

# Imports and the search for tests leave nothing to collect.
gc.disable()

# Only processes that tests start find programs of one another: here equal ones
# are few, and to write all takes longer than those would to compile.
jax.config.update("jax_enable_compilation_cache", False)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# absltest's temporary folders ask for a flag, which pytest does not parse.
flags.FLAGS.mark_as_parsed()

# `--dist loadfile` gives a worker whole files, in this order, for what a file
# shares is built once; a long one that came last would run alone.
_LONGEST = (
  "train_test.py",
  "backends_test.py",
  "hosts_test.py",
  "fine_tune_test.py",
  "tpu_kernels_test.py",
  "configs_test.py",
  "plan_test.py",
  "plan_configs_test.py",
  "encoder_test.py",
  "battery_test.py",
  "predict_test.py",
  "cli_test.py",
  "task_data_test.py",
  "parity_test.py",
)


# Each program that a process keeps makes the next one take longer to compile:
# after 2,500, twice as long. And each is a few mappings of memory, of which
# Linux allows a process 65,530; the compiler crashes at the next one.
_MANY = 300
_compiled = collections.Counter()


def _count(event, *_, **__):
  _compiled[event] += 1


jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.fixture(autouse=True, scope="class")
def _few_programs():
  yield
  if _compiled["/jax/core/compile/backend_compile_duration"] > _MANY:
    _compiled.clear()
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module")
def one_device():
  """Runs take one device instead of all eight.

  To partition a program takes a third of the time to compile it, and is tested
  where meshes are.
  """
  with mock.patch.object(jax, "devices", return_value=jax.devices()[:1]):
    yield


@pytest.fixture(scope="module")
def unreported():
  """Runs end without a report, whose plots take longer than their steps."""
  from bertjax import report

  with mock.patch.object(report, "write_report"):
    yield


# Bytes that a worker grows to.
_WORKER = 4e9


def pytest_xdist_auto_num_workers():
  """A worker per core, if there is memory for them."""
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return max(1, min(joblib.cpu_count(), int(memory / _WORKER)))


def pytest_collection_modifyitems(items):
  place = {name: i for i, name in enumerate(_LONGEST)}
  items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish():
  from bertjax import garbage  # later than `--jaxtyping-packages` looks

  garbage.spare_imports()
  gc.enable()


def pytest_unconfigure():
  folder = os.environ.pop("JAX_COMPILATION_CACHE_DIR")
  shutil.rmtree(folder, ignore_errors=True)
