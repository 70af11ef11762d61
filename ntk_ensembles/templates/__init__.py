"""Templates: the if-then rows that a task is made of, matched by three routes that agree, and bounded exactly.

`templates` defines the state, the templates and the template machine; `matching` holds two fast matchers, for few
states and for many; `bounds` computes how many templates one state can match at most and at least.
"""

from ntk_ensembles.templates.bounds import Bound, MatchBounds, exclusive_bits
from ntk_ensembles.templates.matching import BitPlaneMatcher, SparseMatcher
from ntk_ensembles.templates.templates import StateLayout, Template, TemplateSet

__all__ = [
    "BitPlaneMatcher",
    "Bound",
    "MatchBounds",
    "SparseMatcher",
    "StateLayout",
    "Template",
    "TemplateSet",
    "exclusive_bits",
]
