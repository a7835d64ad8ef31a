"""bertjax: train, speed up, compress and apply BERT-style encoders in JAX."""

__version__ = "0.1.0"
