"""What is done to a pre-trained model before or while it learns a task."""

from bertjax.adaptation.reinit import reinitialise

__all__ = ["reinitialise"]
