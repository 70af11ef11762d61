"""Options that several commands have, for the commands' own dataclasses to derive from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console

from ntk_ensembles.console import console
from ntk_ensembles.errors import check_range
from ntk_ensembles.theory import DECODERS, Decoder


@dataclass(frozen=True)
class EvaluationOptions:
    """States that members or templates are evaluated on."""

    evaluation_states: int = 1000
    """Distinct states of true trajectories to evaluate on, 1 to 1000000."""

    evaluation_seed: int = 0
    """Seed that the evaluation states are drawn from, 0 to 2^63 - 1."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            OptionError: An option is outside its range.
        """
        check_range("evaluation_states", self.evaluation_states, 1, 1_000_000)
        check_range("evaluation_seed", self.evaluation_seed, 0, (1 << 63) - 1)


@dataclass(frozen=True)
class DecoderOptions:
    """Decoders to report on."""

    decode: Literal["midpoint", "sign", "both"] = "both"
    """Decoder to report on."""

    @property
    def decoders(self) -> tuple[Decoder, ...]:
        """Decoders that were asked for."""
        return DECODERS if self.decode == "both" else (self.decode,)


@dataclass(frozen=True)
class OutputOptions:
    """Form of the results: text for people, or an object for programs."""

    json: bool = False
    """Print one JSON object instead of text."""

    @property
    def messages(self) -> Console:
        """Console for messages; with ``--json``, standard output carries the JSON object alone."""
        return console(stderr=self.json)

    def show(self, results: Mapping[str, Any], as_text: Callable[[Console], None]) -> None:
        """Print results to standard output in the form that was asked for.

        Args:
            results: Results, as values that JSON can hold.
            as_text: Function that prints them for people, to the console that it is given.
        """
        if self.json:
            print(json.dumps(results, allow_nan=False))
        else:
            as_text(console())
