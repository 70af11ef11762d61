"""Programs for the one-instruction computer: assembled, found in the library, run side by side, and displayed.

`assembler` turns source into words and back, and `library` finds programs: those in ``programs/*.asm``, and files of a
user's. `batch` runs programs on the interpreter, on the NTK limit, or on trained members; `display` shows them in a
terminal, as a trace file, and as a figure. The interpreter itself is `ntk_ensembles.tasks.Machine`.
"""

from ntk_ensembles.computer.assembler import Assembly, AssemblyError, SourceSpan, assemble, cells_for, disassemble
from ntk_ensembles.computer.batch import ProgramBatch, ProgramResult, execute_programs
from ntk_ensembles.computer.library import (
    LibraryProgram,
    find_program,
    library_programs,
    load_program,
    program_names,
)

__all__ = [
    "Assembly",
    "AssemblyError",
    "LibraryProgram",
    "ProgramBatch",
    "ProgramResult",
    "SourceSpan",
    "assemble",
    "cells_for",
    "disassemble",
    "execute_programs",
    "find_program",
    "library_programs",
    "load_program",
    "program_names",
]
