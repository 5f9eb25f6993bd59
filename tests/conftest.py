"""Every test: one thread a worker, no hub, DeepSpeed on the processor where there is no GPU."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # subprocesses and notebook kernels too
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
