"""Library programs with random inputs, as JSON lines for `ntk-ensembles run --batch -`.

    python benchmarks/library_cases.py --each 12 | ntk-ensembles run --backend runs/sbn32 --batch -

Inputs are drawn from the range that each program is right for, and again until it halts within
`--max-instructions` on plain integers. Programs that need another number of cells are left out.
"""

from __future__ import annotations

import argparse
import json
import random
from typing import get_args

from ntk_ensembles.computer import LibraryProgram, library_programs
from ntk_ensembles.tasks import Branch, Machine

ATTEMPTS_MAX = 10_000


def main() -> None:
    """Print a line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=32, help="of the machine")
    parser.add_argument("--word-bits", type=int, default=8, help="bits of a cell")
    parser.add_argument("--branch", choices=get_args(Branch), default="negative", help="the branch rule")
    parser.add_argument("--each", type=int, default=12, help="cases of each program")
    parser.add_argument("--max-instructions", type=int, default=200, help="most instructions of a case")
    parser.add_argument("--seed", type=int, default=0, help="draws the inputs")
    options = parser.parse_args()
    generator = random.Random(options.seed)
    machine = Machine(options.cells, options.word_bits, options.branch)
    for program in library_programs():
        fits = program.cells == options.cells if program.exact else program.cells <= options.cells
        if options.branch in program.branches and fits:
            for _ in range(options.each):
                memory = draw(program, machine, options.max_instructions, generator)
                print(json.dumps({"memory": memory, "max_instructions": options.max_instructions}))


def draw(program: LibraryProgram, machine: Machine, instructions_max: int, generator: random.Random) -> list[int]:
    """Return a program with inputs that halts within a number of instructions."""
    assembly = program.assemble(cells=machine.cells, word_bits=machine.word_bits)
    for _ in range(ATTEMPTS_MAX):
        words = list(assembly.words)
        for field in program.inputs:
            low, high = field.bounds(machine.word_bits)
            start = assembly.address(field.label)
            words[start : start + field.count] = [generator.randint(low, high) for _ in range(field.count)]
        state, _ = machine.run(machine.load(words), instructions_max)
        if state.halted:
            return words
    raise SystemExit(f"{program.name}: no inputs found with which it halts in {instructions_max} instructions")


if __name__ == "__main__":
    main()
