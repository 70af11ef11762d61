"""Exact execution by the NTK mean, checked on every input or on a million random programs.

`exhaustive` runs all inputs of a task of one length, `computer` random programs; both count in `tally` what each
decoder makes of it, and `distinct` tells how many different states were met.
"""

from ntk_ensembles.validation.computer import ComputerReport, validate_computer
from ntk_ensembles.validation.distinct import DistinctCount, StateCodes
from ntk_ensembles.validation.exhaustive import ExhaustiveReport, Inputs, validate_inputs
from ntk_ensembles.validation.tally import Tally

__all__ = [
    "ComputerReport",
    "DistinctCount",
    "ExhaustiveReport",
    "Inputs",
    "StateCodes",
    "Tally",
    "validate_computer",
    "validate_inputs",
]
