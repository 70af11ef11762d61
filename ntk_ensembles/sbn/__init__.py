"""The one-instruction computer: interpreter, assembler, and the programs that come with it (DESIGN §5).

`machine` is the interpreter, over plain integers. `assembler` turns source into words and back, and `library`
finds programs: those in ``programs/*.asm``, and files of a user's. `execution` runs programs on the interpreter,
on the NTK limit, or on trained members; `history` keeps and draws what happened, `watch` shows it in a terminal.

The raw images ``programs/*.dec`` are inputs of the SBN task's evaluation. They fit 16 cells of 8 bits and halt. Their
data cells hold an example; other values may be patched in. A rule in the file's name says that the program is
right only under it.

- ``negate``: cell 7 becomes −(cell 6).
- ``add``: cell 10 becomes cell 9 + cell 10.
- ``copy``: cell 13 becomes cell 12.
- ``minus_absolute``: cell 14 becomes −|cell 12|.
- ``multiply.negative``: cell 15 becomes cell 12 · n, where cell 14 holds −n, n ≥ 1.
- ``multiply.nonpositive``: cell 15 becomes cell 12 · cell 14, where cell 14 is at least 1.
- ``negated_sum.…``: cell 12 becomes −(cell 13 + cell 14 + cell 15); walks through the cells by
  changing its own operand.
"""

from ntk_ensembles.sbn.assembler import Assembly, AssemblyError, Place, assemble, cells_for, disassemble
from ntk_ensembles.sbn.library import LibraryProgram, find_program, library, load_program
from ntk_ensembles.sbn.machine import Branch, Machine, MachineState, parse_image

__all__ = [
    "Assembly",
    "AssemblyError",
    "Branch",
    "LibraryProgram",
    "Machine",
    "MachineState",
    "Place",
    "assemble",
    "cells_for",
    "disassemble",
    "find_program",
    "library",
    "load_program",
    "parse_image",
]
