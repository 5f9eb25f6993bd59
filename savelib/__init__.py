"""savelib: a reward model that improves itself from the policy's own samples (SAVE, arXiv 2605.30888)."""

__version__ = "0.1.0"
