"""The infinitely wide ensemble, exactly: kernels, predictions, decoding, the closed loop, certificates, validation.

`kernels` holds the two kernels of the network, `predictor` the mean and variance that training on a task's templates
leads to, `decoding` the thresholds that turn a mean into bits and how often they fail, `executor` the closed loop,
`certificate` what a decoder promises for all states, `validation` the loop on every input of a task.
"""

from ntk_ensembles.theory.certificate import (
    Certificate,
    WorstCase,
    certify,
    certify_task,
    members_for_states,
    sign_padding,
)
from ntk_ensembles.theory.decoding import (
    DECODERS,
    TIE,
    Decoder,
    ExactMatchBand,
    LimitPrediction,
    Prediction,
    bit_error_probability,
    decode,
    decode_mean,
    exact_match_band,
    exact_match_probability,
    log_exact_match_probability,
    margin_table,
    margins,
    thresholds,
)
from ntk_ensembles.theory.empirical import empirical_ntk, linearise
from ntk_ensembles.theory.executor import NTKExecutor, Rollout, Step, Stepper, TensorStepper, Trace, rollout
from ntk_ensembles.theory.finite_width import (
    LABELS,
    MOVEMENT_MAX,
    FiniteWidth,
    Labels,
    VarianceEstimate,
    WidthPrediction,
)
from ntk_ensembles.theory.kernels import InverseKernel, kappa0, kappa1, nngp, ntk, ntk_profile
from ntk_ensembles.theory.predictor import KERNELS, Gaussian, Kernel, Posterior, TemplatePredictor, posterior
from ntk_ensembles.theory.width_certificate import certify_width

__all__ = [
    "DECODERS",
    "KERNELS",
    "LABELS",
    "MOVEMENT_MAX",
    "TIE",
    "Certificate",
    "Decoder",
    "ExactMatchBand",
    "FiniteWidth",
    "Gaussian",
    "InverseKernel",
    "LimitPrediction",
    "NTKExecutor",
    "Kernel",
    "Labels",
    "Posterior",
    "Prediction",
    "Rollout",
    "Step",
    "Stepper",
    "TemplatePredictor",
    "TensorStepper",
    "Trace",
    "WidthPrediction",
    "WorstCase",
    "VarianceEstimate",
    "bit_error_probability",
    "certify",
    "certify_task",
    "certify_width",
    "decode",
    "decode_mean",
    "empirical_ntk",
    "exact_match_band",
    "exact_match_probability",
    "kappa0",
    "kappa1",
    "linearise",
    "log_exact_match_probability",
    "margin_table",
    "margins",
    "members_for_states",
    "nngp",
    "ntk",
    "ntk_profile",
    "posterior",
    "rollout",
    "sign_padding",
    "thresholds",
]
