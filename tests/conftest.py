"""One thread for each test: the sizes are small, and threads that wait for each other cost more than they do."""

from collections.abc import Iterator

import jaxtyping
import matplotlib
import pytest
import torch

matplotlib.use("agg")
torch.set_num_threads(1)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No check of annotations, which tests add to the package: what a user meets who passes a wrong word."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
