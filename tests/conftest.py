"""What every test runs under."""

import os

import torch

# Before anything imports Triton (transformers does): without a CUDA device its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tiny models gain nothing from more threads, and several test processes on one machine would wait for each other.
torch.set_num_threads(1)
