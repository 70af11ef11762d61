"""The infinitely wide ensemble, exactly: kernels, predictions, decoding, the closed loop, certificates, validation.

`kernels` holds the two kernels of the network, `predictor` the mean and variance that training on a task's templates
leads to, `decoding` the thresholds that turn a mean into bits and how often they fail, `executor` the closed loop,
`certificate` what a decoder promises for all states, `validation` the loop on every input of a task. For a finite width
there are `empirical`, the kernel of one network, `finite_width`, what the width adds, and `width_certificate`.
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
    deviation_root,
    exact_match_probability,
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
    check_labels,
)
from ntk_ensembles.theory.kernels import (
    LAYERS,
    InverseKernel,
    Layers,
    TrainingKernel,
    kappa0,
    kappa1,
    nngp,
    ntk,
)
from ntk_ensembles.theory.predictor import PADDING_MAX, Gaussian, Posterior, TemplatePredictor, posterior
from ntk_ensembles.theory.width_certificate import certify_width

__all__ = [
    "DECODERS",
    "LABELS",
    "LAYERS",
    "MOVEMENT_MAX",
    "PADDING_MAX",
    "TIE",
    "Certificate",
    "Decoder",
    "ExactMatchBand",
    "FiniteWidth",
    "Gaussian",
    "InverseKernel",
    "Labels",
    "Layers",
    "LimitPrediction",
    "NTKExecutor",
    "Posterior",
    "Prediction",
    "Rollout",
    "Step",
    "Stepper",
    "TemplatePredictor",
    "TensorStepper",
    "Trace",
    "TrainingKernel",
    "VarianceEstimate",
    "WidthPrediction",
    "WorstCase",
    "bit_error_probability",
    "certify",
    "certify_task",
    "certify_width",
    "check_labels",
    "decode",
    "deviation_root",
    "empirical_ntk",
    "exact_match_probability",
    "kappa0",
    "kappa1",
    "linearise",
    "margins",
    "members_for_states",
    "nngp",
    "ntk",
    "posterior",
    "rollout",
    "sign_padding",
    "thresholds",
]
