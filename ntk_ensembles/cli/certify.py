"""`ntk-ensembles certify`: what is exact, for which states, with how many members, before any training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ntk_ensembles.cli.main import command
from ntk_ensembles.cli.parsing import DecoderOptions, OutputOptions, PredictionOptions, parse_task
from ntk_ensembles.console import console, print_parts
from ntk_ensembles.ensemble import INITS, Init
from ntk_ensembles.ensemble.network import WIDTH_MAX, one_thread
from ntk_ensembles.errors import check_choice, check_fraction, check_range
from ntk_ensembles.runs.certificate import describe_certificate
from ntk_ensembles.tasks import EvaluationSet
from ntk_ensembles.theory import Labels, certify_task, certify_width, check_labels

_DESCRIPTION = (
    "Certify what a task's templates promise before any training: can it be learned exactly, for which states, with "
    "how many members, by which decoder. Exit status 0 if a decoder asked for is exact for all states, else 1."
)


@dataclass(frozen=True)
class CertifyOptions(OutputOptions, DecoderOptions, PredictionOptions):
    """Options of a certificate."""

    delta: float = 1e-6
    """Chance of any wrong bit that the members needed must stay below, between 0 and 1."""

    width: int | None = None
    """Hidden units of each member: estimates the members needed at this width too. By default only infinite width."""

    init: Init = "gaussian"
    """Initial weights of members of --width."""

    labels: Labels = "plain"
    """Labels that members of --width are trained on."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_fraction("delta", self.delta)
        if self.width is not None:
            check_range("width", self.width, 1, WIDTH_MAX)
        check_choice("init", self.init, INITS)
        check_labels(self.labels, self.layers)


@command("ntk-ensembles certify")
def certify_command(arguments: list[str], prog: str) -> int:
    """Print a certificate; the exit status is 0 if a decoder that was asked for is exact for all states, else 1."""
    task, options, _ = parse_task(arguments, prog, _DESCRIPTION, CertifyOptions)
    shared: dict[str, Any] = {
        name: getattr(options, name) for name in ("layers", "padding", "decoders", "delta", "evaluation_seed")
    }
    try:
        with console(stderr=True).status("searching all states for the worst ones …"):
            with one_thread():
                shared["evaluation"] = EvaluationSet.sample(task, options.evaluation_states, options.evaluation_seed)
            certificate = certify_task(task, **shared)
            if options.width is not None:
                antisymmetric = options.init == "antisymmetric"
                certificate["at_width"] = certify_width(
                    task, options.width, antisymmetric=antisymmetric, labels=options.labels, **shared
                )
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    options.show(certificate, lambda out: print_parts(describe_certificate(certificate, repr(task)), out))
    return 0 if any(certificate["decoders"][name]["all_states"]["exact"] for name in options.decoders) else 1
