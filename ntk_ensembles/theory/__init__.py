"""What infinitely wide ensembles do, exactly: kernels, predictions, decoding (DESIGN §2 and §3).

`kernels` holds the two kernels of the network, `predictor` the mean and variance that training on a
task's templates leads to, `decoding` the thresholds that read bits off them and how often they fail,
`certificate` what a decoder promises for all states.
"""

from ntk_ensembles.theory.certificate import Certificate, Critical, certify, members_for_states, sign_padding
from ntk_ensembles.theory.decoding import (
    DECODERS,
    TIE,
    Decoder,
    ExactMatchBand,
    bit_error_probability,
    decode,
    exact_match_band,
    exact_match_probability,
    log_exact_match_probability,
    margins,
    thresholds,
)
from ntk_ensembles.theory.empirical import empirical_ntk, linearise
from ntk_ensembles.theory.finite_width import FiniteWidth, VarianceEstimate
from ntk_ensembles.theory.kernels import InverseKernel, kappa0, kappa1, nngp, ntk, ntk_profile
from ntk_ensembles.theory.predictor import KERNELS, Gaussian, Kernel, Posterior, TemplatePredictor, posterior

__all__ = [
    "DECODERS",
    "KERNELS",
    "TIE",
    "Certificate",
    "Critical",
    "Decoder",
    "ExactMatchBand",
    "FiniteWidth",
    "Gaussian",
    "InverseKernel",
    "Kernel",
    "Posterior",
    "TemplatePredictor",
    "VarianceEstimate",
    "bit_error_probability",
    "certify",
    "decode",
    "empirical_ntk",
    "exact_match_band",
    "exact_match_probability",
    "kappa0",
    "kappa1",
    "linearise",
    "log_exact_match_probability",
    "margins",
    "members_for_states",
    "nngp",
    "ntk",
    "ntk_profile",
    "posterior",
    "sign_padding",
    "thresholds",
]
