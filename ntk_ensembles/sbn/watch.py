"""Memory in a terminal, and an execution as it goes: memory, pc, and the current instruction."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ntk_ensembles.sbn.execution import Execution
from ntk_ensembles.sbn.machine import Machine, MachineState

_LABEL_WIDTH, _WORD_WIDTH, _ADDRESS_WIDTH = 11, 6, 4


def names_of(labels: Mapping[str, int]) -> dict[int, list[str]]:
    """The labels of each address."""
    names: dict[int, list[str]] = {}
    for label, address in labels.items():
        names.setdefault(address, []).append(label)
    return names


def memory_table(
    memory: Sequence[int], labels: Mapping[str, int], width: int, styles: Mapping[int, str] | None = None
) -> Table:
    """All words with their labels, as many a row as fit (a power of two up to 8).

    Args:
        memory: the words.
        labels: of addresses.
        width: columns of the terminal.
        styles: rich's, by address.
    """
    a_row = 8
    while a_row > 1 and _ADDRESS_WIDTH + a_row * (_LABEL_WIDTH + _WORD_WIDTH + 2) > width:
        a_row //= 2
    names = names_of(labels)
    table = Table.grid(padding=(0, 1, 0, 0))
    for start in range(0, len(memory), a_row):
        row = [Text(f"{start:>{_ADDRESS_WIDTH}}", style="dim")]
        for cell, word in enumerate(memory[start : start + a_row], start):
            label = ",".join(names.get(cell, []))
            label = label if len(label) <= _LABEL_WIDTH else f"{label[: _LABEL_WIDTH - 1]}…"
            row += [Text(f"{label:>{_LABEL_WIDTH}}", style="cyan")]
            row += [Text(f"{word:>{_WORD_WIDTH}}", style=(styles or {}).get(cell, ""))]
        table.add_row(*row)
    return table


class Watch:
    """Shows one program instruction by instruction: redrawn in place in a terminal, otherwise a line each.

    Args:
        console: where to.
        machine: the computer.
        labels: of the program.
        title: a line above.
        delay: seconds to wait after each instruction, in a terminal.
    """

    def __init__(self, console: Console, machine: Machine, labels: Mapping[str, int], title: str, delay: float) -> None:
        self._console = console
        self._machine = machine
        self._labels = labels
        self._names = names_of(labels)
        self._title = title
        self._delay = delay
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Watch:
        if self._live is None:
            self._console.print(Text(self._title), soft_wrap=True)
        else:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, before: Execution, after: Execution) -> None:
        """Show the instruction that led from one state to the next."""
        line = self._instruction(before.state, after.state)
        margin = "" if after.smallest_margin is None else f"  smallest margin {after.smallest_margin:.4f}"
        wrong = "  not as the interpreter" if after.agreed is False else ""
        if self._live is None:
            self._console.print(Text(f"{after.instructions:>6}  {line}{margin}{wrong}"), soft_wrap=True)
            return
        summary = f"instruction {after.instructions}, micro-step {after.micro_steps}{margin}{wrong}"
        # Memory comes last: where it is higher than the terminal, its end is cut off.
        lines = (Text(self._title, style="bold"), Text(line), Text(summary, style="red" if wrong else "dim"))
        self._live.update(Group(*lines, self._memory(before.state, after.state)), refresh=True)
        time.sleep(self._delay)

    def _operands(self, state: MachineState) -> tuple[int, int, int]:
        cells = self._machine.cells
        a, b, c = (state.memory[(state.pc + offset) % cells] for offset in range(3))
        return a % cells, b % cells, c

    def _instruction(self, before: MachineState, after: MachineState) -> str:
        """The instruction at pc, what it subtracted, and where it led."""
        a, b, c = self._operands(before)
        names = [self._names.get(address, [str(address)])[0] for address in (a, b, c % self._machine.cells)]
        shown = " ".join([*names[:2], str(c) if c < 0 else names[2]])
        change = f"{names[1]} = {before.memory[b]} - {before.memory[a]} = {after.memory[b]}"
        return f"pc {before.pc:>3}  {shown:<26} {change:<32} {'halts' if after.halted else f'to {after.pc}'}"

    def _memory(self, before: MachineState, after: MachineState) -> Table:
        """All cells, with the instruction and what it read and wrote marked."""
        a, b, _ = self._operands(before)
        styles = {(before.pc + offset) % self._machine.cells: "reverse" for offset in range(3)}
        styles[a] = f"{styles.get(a, '')} bold green".strip()
        styles[b] = f"{styles.get(b, '')} bold red".strip()
        return memory_table(after.memory, self._labels, self._console.width, styles)
