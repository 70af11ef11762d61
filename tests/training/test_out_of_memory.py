"""A cohort that does not fit is halved, and so are those that wait behind it: no member is lost or trained twice."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from rich.console import Console

from ntk_ensembles import Addition, RunOptions
from ntk_ensembles.training import EnsembleModule, stream, train

SMALL: dict[str, Any] = {"width": 32, "evaluation_states": 15, "tolerance": 0.3}


class RoomFor(L.Callback):
    """Memory for so many members at once; remembers which cohorts were trained to the end."""

    def __init__(self, members: int, error: type[Exception]) -> None:
        self.members, self.error = members, error
        self.cohorts: list[tuple[int, ...]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, EnsembleModule)
        if len(pl_module.stack) > self.members:
            raise self.error("no room")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, EnsembleModule)
        self.cohorts.append(pl_module.stack.indices)


@pytest.mark.parametrize(
    ("cohort", "room", "error", "cohorts"),
    [
        # Those that wait are no larger than what was found to fit, and come in their order.
        (4, 2, torch.OutOfMemoryError, [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]),
        (5, 3, MemoryError, [(0, 1), (2, 3), (4,), (5, 6), (7, 8), (9,)]),
        (7, 1, MemoryError, [(i,) for i in range(10)]),
    ],
)
def test_what_does_not_fit_is_halved(
    cohort: int, room: int, error: type[Exception], cohorts: list[tuple[int, ...]], tmp_path: Path
) -> None:
    out, printed, memory = tmp_path / "run", StringIO(), RoomFor(room, error)
    options = RunOptions(**SMALL, ensemble=10, cohort=cohort, out=str(out))
    results = train(Addition(2), options, console=Console(file=printed, width=150), callbacks=[memory])
    assert memory.cohorts == cohorts
    assert results is not None
    assert (results["members"], results["training"]["not_converged"]) == (10, [])
    assert f"out of memory with {cohort} members at once; continuing with {cohort // 2}" in printed.getvalue()
    names = sorted(path.name for path in out.glob("checkpoints/members-*"))
    assert names == [f"members-{own[0]:06d}-{own[-1]:06d}.safetensors" for own in cohorts]


def test_progress_goes_back_by_what_was_done_of_a_cohort_that_did_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out when a cohort has been trained and is evaluated: never more members are shown than are done."""
    done: list[float] = []

    class Watched(stream.Progress):
        def advance(self, *arguments: Any, **options: Any) -> None:
            super().advance(*arguments, **options)
            done.append(self.completed)

    class FullAtTheEnd(L.Callback):
        finished = 0

        def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert isinstance(pl_module, EnsembleModule)
            if len(pl_module.stack) > 1:
                raise torch.OutOfMemoryError("no room")
            self.finished += 1
            # What is trained of the cohort on its way is 0.8 of it.
            assert done[-1] == pytest.approx(self.finished - 0.2)

    monkeypatch.setattr(stream, "Progress", Watched)
    options = RunOptions(**SMALL, ensemble=4, cohort=4, out=str(tmp_path / "run"))
    train(Addition(2), options, console=Console(quiet=True), callbacks=[FullAtTheEnd()])
    assert max(done) == pytest.approx(4)


def test_one_member_that_does_not_fit_ends_the_run(tmp_path: Path) -> None:
    options = RunOptions(**SMALL, ensemble=2, out=str(tmp_path / "run"))
    with pytest.raises(MemoryError, match="one member of width 32 does not fit the memory of cpu; use a smaller width"):
        train(Addition(2), options, console=Console(quiet=True), callbacks=[RoomFor(0, MemoryError)])
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["width"] == 32
    assert not list((tmp_path / "run").glob("checkpoints/members-*"))
