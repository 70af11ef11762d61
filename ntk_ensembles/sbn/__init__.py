"""The one-instruction computer: its interpreter and the programs shipped with it (DESIGN §5).

The images in ``programs/`` fit 16 cells of 8 bits and halt. Their data cells hold an example; other
values may be patched in. A rule in the file's name says that the program is right only under it.

- ``negate``: cell 7 becomes −(cell 6).
- ``add``: cell 10 becomes cell 9 + cell 10.
- ``copy``: cell 13 becomes cell 12.
- ``minus_absolute``: cell 14 becomes −|cell 12|.
- ``multiply.negative``: cell 15 becomes cell 12 · n, where cell 14 holds −n, n ≥ 1.
- ``multiply.nonpositive``: cell 15 becomes cell 12 · cell 14, where cell 14 is at least 1.
- ``negated_sum.…``: cell 12 becomes −(cell 13 + cell 14 + cell 15); walks through the cells by
  changing its own operand.
"""

from ntk_ensembles.sbn.machine import Branch, Machine, MachineState, parse_image

__all__ = ["Branch", "Machine", "MachineState", "parse_image"]
