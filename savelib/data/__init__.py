"""Pairs, prompts and worlds; importing it quiets the libraries that load models, once for all of savelib.

A progress bar's refresh would be a line in a log or a notebook, and a new reward head is expected.
"""

import os

import torch
from transformers.utils import logging

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed, which others import, warns else that it guessed so
# where a model has no safetensors, transformers would have a public service convert it
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
logging.disable_progress_bar()
logging.set_verbosity_error()
