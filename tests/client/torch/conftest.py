"""Small models on one thread: several of them only wait for each other on a busy machine."""

import torch

torch.set_num_threads(1)
