"""`ntk-ensembles certify`: what is exact, for which states, with how many members, before any training."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ntk_ensembles.cli.main import command
from ntk_ensembles.cli.options import DecoderOptions, EvaluationOptions, OutputOptions
from ntk_ensembles.cli.parsing import parse_task
from ntk_ensembles.console import console
from ntk_ensembles.errors import OptionError
from ntk_ensembles.tasks import EvaluationSet, Task
from ntk_ensembles.tasks.extremes import Extreme, MatchExtremes, exclusive_bits
from ntk_ensembles.theory import (
    TIE,
    Certificate,
    Critical,
    TemplatePredictor,
    certify,
    members_for_states,
    sign_padding,
)

_DESCRIPTION = (
    "Tell what a task's templates promise before any training: can it be learned exactly, for which states, with how "
    "many members, by which decoder. Exit status 0 if a decoder asked for is exact for all states, else 1."
)
_COVERS = (
    "This covers the mean of infinitely wide members trained to convergence, and, where members are counted, the "
    "Gaussian spread of infinitely wide members around it. It does not cover what a finite width adds (a shift of the "
    "mean of order 1/width), members that have not converged, or rounding: train.py measures those."
)
_INPUTS_SEEN = 1000


@dataclass(frozen=True)
class CertifyOptions(OutputOptions, DecoderOptions, EvaluationOptions):
    """Options of a certificate."""

    delta: float = 1e-6
    """Chance of any wrong bit that the members needed must stay below, between 0 and 1."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            OptionError: An option is outside its range.
        """
        super().__post_init__()
        if not 0 < self.delta < 1:
            raise OptionError("delta", self.delta, "a number between 0 and 1")


@command("ntk-ensembles certify")
def certify_command(arguments: list[str], prog: str) -> int:
    """Print a certificate; the exit status is 0 if a decoder that was asked for is exact for all states, else 1."""
    task, options, _ = parse_task(arguments, prog, _DESCRIPTION, CertifyOptions)
    try:
        with console(stderr=True).status("searching all states for the worst ones …"):
            certificate = certificate_of(task, options)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    options.show(certificate, lambda out: _show(task, certificate, out))
    return 0 if any(certificate["decoders"][name]["all_states"]["exact"] for name in options.decoders) else 1


def certificate_of(task: Task[Any, Any], options: CertifyOptions) -> dict[str, Any]:
    """Everything that is printed, as plain values."""
    templates = task.templates
    predictor = TemplatePredictor(templates)
    evaluation = EvaluationSet.sample(task, options.evaluation_states, options.evaluation_seed)
    seen = evaluation.matches.sum(1)
    start, start_names = _start_bits(task, options.evaluation_seed)
    scopes = {
        "all_states": MatchExtremes(templates),
        "reachable": MatchExtremes(templates, exclusive_bits(templates, start)),
    }
    extremes = {name: scope.most() for name, scope in scopes.items()}
    decoders: dict[str, Any] = {}
    for decoder in options.decoders:
        certificates = {name: certify(predictor, scope, decoder) for name, scope in scopes.items()}
        decoders[decoder] = {name: _describe(task, certificate) for name, certificate in certificates.items()}
        decoders[decoder]["members"] = {
            "one_state": certificates["all_states"].members(options.delta),
            "one_reachable_state": certificates["reachable"].members(options.delta),
            "evaluation_states": members_for_states(
                predictor, decoder, evaluation.matches, evaluation.successors, options.delta
            ),
            "all_states": certificates["all_states"].members(options.delta, task.layout.bits * math.log(2)),
        }
        if decoder == "sign":
            decoders[decoder]["padding"] = {name: sign_padding(predictor, scope) for name, scope in scopes.items()}
    return {
        "task": {"name": task.name, **task.options},
        "templates": len(templates),
        "state_bits": task.layout.bits,
        "delta": options.delta,
        "matched": {
            **{name: _describe_extreme(extreme) for name, extreme in extremes.items()},
            "sampled": {"states": len(evaluation), "min": int(seen.min()), "max": int(seen.max())},
            "reachable_from": start_names,
        },
        "fan_in": {
            "min": int(templates.fan_in.min()),
            "max": int(templates.fan_in.max()),
            "max_bit": task.layout.bit_name(int(templates.fan_in.argmax())),
        },
        "decoders": decoders,
        "covers": _COVERS,
    }


def _start_bits(task: Task[Any, Any], seed: int) -> tuple[Bool[Tensor, " bits"], list[str]]:
    """In each field the bits between the lowest and the highest that the first inputs set; and their names."""
    used: dict[str, int] = {}
    for value in itertools.islice(task.inputs(random.Random(seed)), _INPUTS_SEEN):
        for name, content in task.fields(value).items():
            used[name] = used.get(name, 0) | content
    start = torch.zeros(task.layout.bits, dtype=torch.bool)
    names = []
    for name in task.layout:
        content, bits = used.get(name, 0), task.layout[name]
        if content:
            low, high = (content & -content).bit_length() - 1, content.bit_length() - 1
            start[bits[low] : bits[high] + 1] = True
            whole = (low, high) == (0, len(bits) - 1)
            names.append(name if whole else f"{name}[{low}]" if low == high else f"{name}[{low}:{high + 1}]")
    return start, names


def _describe_extreme(extreme: Extreme | None) -> dict[str, Any]:
    assert extreme is not None
    return {"max": extreme.bound, "max_attained": extreme.attained}


def _describe(task: Task[Any, Any], certificate: Certificate) -> dict[str, Any]:
    return {
        "exact": certificate.exact,
        "coin_flips": certificate.tie,
        "margin": certificate.margin if math.isfinite(certificate.margin) else None,
        "worst_one": _describe_critical(task, certificate.ones),
        "worst_zero": _describe_critical(task, certificate.zeros),
    }


def _describe_critical(task: Task[Any, Any], critical: Critical | None) -> dict[str, Any] | None:
    """A state and bit in words: which bit, what sets it, and the state's fields that are not 0."""
    if critical is None:
        return None
    templates = task.templates.templates
    groups = Counter(template.group for template in templates if critical.bit in template.sets)
    return {
        "margin": critical.margin,
        "bit": task.layout.bit_name(critical.bit),
        "matched": critical.matched,
        "set_by": critical.setting,
        "fan_in": critical.fan_in,
        "groups": dict(groups.most_common()),
        "state": {name: value for name, value in task.layout.unpack(critical.state).items() if value},
    }


def _show(task: Task[Any, Any], certificate: dict[str, Any], out: Console) -> None:
    matched = certificate["matched"]
    out.print(f"{task!r}: k = {certificate['templates']} templates, m = {certificate['state_bits']} bits.")
    every, reachable, sampled = matched["all_states"], matched["reachable"], matched["sampled"]
    out.print(f"Templates that match a state (s): at most {_extreme(every)} in any of the 2^m states (proven);")
    start = _listed(matched["reachable_from"])
    out.print(f"  at most {_extreme(reachable)} in executions that start with only {start} set (proven);")
    out.print(f"  {sampled['min']} to {sampled['max']} seen on {sampled['states']} sampled states.")
    fan_in = certificate["fan_in"]
    out.print(f"Templates that set a bit (fan-in F): {fan_in['min']} to {fan_in['max']} ({fan_in['max_bit']}).\n")
    table = Table(title="worst case of the infinitely wide ensemble", title_justify="left")
    for heading in ("decoder", "states", "exact", "margin of 1-bits", "margin of 0-bits"):
        table.add_column(heading, justify="left" if heading in ("decoder", "states") else "right")
    for name, decoder in certificate["decoders"].items():
        for scope, words in (("all_states", "all 2^m"), ("reachable", "reachable")):
            found = decoder[scope]
            verdict = {True: "yes", False: "no", None: "open"}[found["exact"]]
            table.add_row(name, words, verdict, _margin(found["worst_one"]), _margin(found["worst_zero"]))
    out.print(table)
    table = Table(title=f"members that suffice for a chance of {1 - certificate['delta']:.7g}", title_justify="left")
    table.add_column("decoder")
    headings = {
        "one_state": "any one state",
        "one_reachable_state": "any one reachable",
        "evaluation_states": f"the {sampled['states']} sampled",
        "all_states": "all 2^m states",
    }
    for heading in headings.values():
        table.add_column(heading, justify="right")
    for name, decoder in certificate["decoders"].items():
        counts = [decoder["members"][key] for key in headings]
        table.add_row(name, *("none" if count is None else f"{count:,}" for count in counts))
    out.print(table)
    out.print("By the union bound over bits and states of exact Gaussian tails.\n")
    for name, decoder in certificate["decoders"].items():
        for line in _remarks(name, decoder):
            out.print(line, highlight=False)
    out.print(certificate["covers"], style="dim", highlight=False)


def _remarks(name: str, decoder: dict[str, Any]) -> list[str]:
    """Why a decoder is not exact, and why no number of members may suffice."""
    lines = []
    found = decoder["all_states"]
    if found["exact"] is False:
        worst = min((w for w in (found["worst_one"], found["worst_zero"]) if w), key=lambda w: float(w["margin"]))
        lines.append(
            f"{name} fails at bit {worst['bit']}: in a state that {worst['matched']} templates match, "
            f"{worst['set_by']} of the {worst['fan_in']} templates that can set it is among them, and the others pull "
            f"the mean to {worst['margin']:.3g}. Those that set it: {_groups(worst['groups'])}."
        )
    padding = decoder.get("padding", {"all_states": 0})
    if padding["all_states"]:
        lines.append(
            f"{name} is exact with {padding['all_states']:,} zero-label templates more (padding); on reachable states "
            f"with {padding['reachable']:,}."
        )
    if found["coin_flips"]:
        worst = found["worst_zero"]
        lines.append(
            f"{name} leaves 0-bits without a margin (*): the infinite mean is exactly 0 where one template matches or "
            f"none sets the bit (bit {worst['bit']}, s = {worst['matched']}, F = {worst['fan_in']}), and a finite "
            "ensemble decodes it by a coin."
        )
    return lines


def _extreme(described: dict[str, Any]) -> str:
    if described["max"] == described["max_attained"]:
        return str(described["max"])
    return f"{described['max']} (found: {described['max_attained']})"


def _margin(critical: dict[str, Any] | None) -> str:
    if critical is None:
        return "-"
    return "0 (*)" if abs(critical["margin"]) <= TIE else f"{critical['margin']:.4g}"


def _groups(groups: dict[str, int]) -> str:
    return ", ".join(f"{count} of group '{group}'" for group, count in groups.items())


def _listed(names: list[str]) -> str:
    """Names in short: the first few, where there are many of one kind."""
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:2])}, …, {', '.join(names[-3:])}"
