"""Kernels for TPU and GPU, each with a plain JAX reference."""
