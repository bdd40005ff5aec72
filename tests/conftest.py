"""One profile for hypothesis: the same examples on every machine, and few enough that all tests take a minute."""

import torch
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=10, database=None)
settings.load_profile("repeatable")

torch.set_num_threads(1)  # tensors here are small: more threads would only wait for each other
