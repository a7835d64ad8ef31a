"""What can be measured of data and tokenizers without training: by name."""

from collections.abc import Callable

from bertjax.analysis.fertility import fertility

ANALYSES: dict[str, Callable[..., dict[str, float]]] = {"fertility": fertility}

__all__ = ["ANALYSES", "fertility"]
