"""One engine for vision representation learning and interpretability."""

__version__ = "0.1.0"
