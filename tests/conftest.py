"""What every test runs under."""

import torch

# Tiny models gain nothing from more threads, and several test processes on one machine would wait for each other.
torch.set_num_threads(1)
