"""Finite-width ensembles: the network, its training, cohorts of members (DESIGN §2 and §4).

`network` defines the network and draws weights, `descent` is the rule by which it is trained, `identity`
and `functional` carry its steps out, `cohort_training` takes a cohort from draw to predictions.
"""

from ntk_ensembles.ensemble.cohort_training import (
    Engine,
    Members,
    Precision,
    Recipe,
    TrainedCohort,
    choose_cohort,
    train_cohort,
)
from ntk_ensembles.ensemble.descent import LOSSES, DescentOptions, Loss, MemberStatus, Trainable, descend
from ntk_ensembles.ensemble.functional import FunctionalModel
from ntk_ensembles.ensemble.identity import IdentityModel
from ntk_ensembles.ensemble.network import INITS, Cohort, Init, TwoLayerMLP

__all__ = [
    "INITS",
    "LOSSES",
    "Cohort",
    "DescentOptions",
    "Engine",
    "FunctionalModel",
    "IdentityModel",
    "Init",
    "Loss",
    "MemberStatus",
    "Members",
    "Precision",
    "Recipe",
    "Trainable",
    "TrainedCohort",
    "TwoLayerMLP",
    "choose_cohort",
    "descend",
    "train_cohort",
]
