"""Random programs on the computer, right ones and ones whose templates are wrong on purpose."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ntk_ensembles.tasks import SBN, Branch, Template
from ntk_ensembles.theory import DECODERS
from ntk_ensembles.theory.executor import NTKExecutor
from ntk_ensembles.theory.validation import validate_programs


@pytest.mark.parametrize(("cells", "word", "branch"), [(4, 3, "negative"), (8, 4, "nonpositive")])
def test_random_programs(cells: int, word: int, branch: Branch) -> None:
    task = SBN(cells, word, branch)
    executors = [NTKExecutor(task.templates, decoder, padding=2000) for decoder in DECODERS]
    told: list[int] = []
    report = validate_programs(task, executors, 600, 7, on_progress=told.append)
    assert report.instructions == sum(told) >= 600
    assert [tally.failures for tally in report.tallies] == [0, 0]
    # Each halted computer is watched for as long as another instruction takes, but for those at the end.
    computers = -(-600 // 64)
    watched = report.micro_steps - report.instructions * task.micro_steps_per_instruction
    assert (
        (report.halted - computers) * task.micro_steps_per_instruction
        <= watched
        <= report.halted * task.micro_steps_per_instruction
    )
    assert report.halted <= report.memories <= report.halted + computers + report.instructions // 64
    assert report.halted > 0
    assert 0 < report.tallies[0].smallest_one < 0.5


def test_the_seed_decides() -> None:
    task = SBN(4, 3)
    executors = [NTKExecutor(task.templates)]
    first, again, other = (validate_programs(task, executors, 100, seed) for seed in (7, 7, 8))
    counts = [(report.instructions, report.memories, report.halted, report.tallies) for report in (first, again, other)]
    assert counts[0] == counts[1] != counts[2]


class NeverBorrows(SBN):
    """Where subtrahend bit and borrow are both 1 no borrow is passed on."""

    def make_templates(self) -> Iterator[Template]:
        for rule in super().make_templates():
            if rule.group != "borrow" or len(rule.ones) != 2:
                yield rule


def test_templates_that_are_wrong() -> None:
    """Every micro-step is the OR-machine's, and the result is not the interpreter's."""
    task = NeverBorrows(4, 3)
    report = validate_programs(task, [NTKExecutor(task.templates)], 200, 0)
    (tally,) = report.tallies
    assert 0 < tally.failures < report.instructions
    assert tally.first_failure is not None
    assert tally.first_failure.startswith("instruction at pc ")
    assert ", after it bit " in tally.first_failure


def test_a_decoder_that_is_wrong() -> None:
    task = SBN(4, 3)
    report = validate_programs(task, [NTKExecutor(task.templates, "sign"), NTKExecutor(task.templates)], 1000, 0)
    sign, midpoint = report.tallies
    assert midpoint.failures == 0
    assert sign.failures > 0
    assert sign.smallest_one < 0
    assert sign.first_failure is not None
    assert ", micro-step " in sign.first_failure
