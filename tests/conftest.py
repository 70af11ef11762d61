"""One thread for each test: the sizes are small, and threads that wait for each other cost more than they do."""

from collections.abc import Iterator

import jaxtyping
import matplotlib
import pytest
import torch
from matplotlib.figure import Figure

matplotlib.use("agg")
torch.set_num_threads(1)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No check of annotations, which tests add to the package: what a user meets who passes a wrong word."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blank figures, saved as others are: drawing them takes longer than to train small members."""
    from ntk_ensembles.runs import figures  # not before the checks of annotations are installed

    def blank(*arguments: object) -> Figure:
        return Figure(figsize=(1, 1))

    monkeypatch.setattr(figures.Chart, "figure", blank)
    monkeypatch.setattr(figures, "convergence_figure", blank)
