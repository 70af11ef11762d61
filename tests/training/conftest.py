"""Lightning's trainer as these tests use it: on the CPU, and silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest


@pytest.fixture(scope="session")
def trainer() -> Callable[..., L.Trainer]:
    """Return a function that makes a trainer, with other settings where a test names them."""

    def make(**changes: Any) -> L.Trainer:
        quiet: dict[str, Any] = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        }
        return L.Trainer(**quiet | changes)

    return make
