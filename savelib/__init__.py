"""savelib: a reward model that improves itself from the policy's own samples (SAVE, arXiv 2605.30888)."""

import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # notebooks without widgets are meant to be so

__version__ = "0.1.0"
