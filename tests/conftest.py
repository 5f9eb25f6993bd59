"""Every test: one thread a worker, no hub, DeepSpeed on the processor where there is no GPU."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # subprocesses and notebook kernels too
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"


@pytest.fixture
def folders(tmp_path, tmp_path_factory, monkeypatch):
    """Runs of this test alone; a cache that all tests of the worker share."""
    monkeypatch.setenv("SAVE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("SAVE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
