"""One thread for each test: the sizes are small, and threads that wait for each other cost more than they do."""

import matplotlib
import torch

matplotlib.use("agg")
torch.set_num_threads(1)
