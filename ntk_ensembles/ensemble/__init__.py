"""Finite-width ensembles: the network, stacks of members, and the rule that trains them.

`network` defines the network and a stack of members, and shares members out to CPU cores; `engines` computes steps and
predictions, from the matrix products of `products`; `descent` is the training rule; `cohort` says how the members of a
run are made and how many fit into memory.
"""

from ntk_ensembles.ensemble.cohort import PRECISIONS, Precision, Recipe, choose_cohort, train_members
from ntk_ensembles.ensemble.descent import LOSSES, Descent, DescentOptions, Loss, MemberStatus
from ntk_ensembles.ensemble.engines import EngineChoice, FunctionalEngine, OneHotEngine, make_engine, predict
from ntk_ensembles.ensemble.network import INITS, Init, MLPStack, TwoLayerMLP

__all__ = [
    "INITS",
    "LOSSES",
    "PRECISIONS",
    "Descent",
    "DescentOptions",
    "EngineChoice",
    "FunctionalEngine",
    "Init",
    "Loss",
    "MLPStack",
    "MemberStatus",
    "OneHotEngine",
    "Precision",
    "Recipe",
    "TwoLayerMLP",
    "choose_cohort",
    "make_engine",
    "predict",
    "train_members",
]
