"""A certificate in words and tables, for the terminal and for pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ntk_ensembles.console import Paragraph, Part, TextTable
from ntk_ensembles.templates import MatchBounds
from ntk_ensembles.theory import DECODERS, TIE, TemplatePredictor, certify

_VERDICTS = {True: "yes", False: "no", None: "open"}
_DELTA = 1e-6
"""Chance of any wrong bit in `describe_in_short`."""

_SECONDS_MAX = 10.0
"""Time limit of its searches: a run waits for them."""


def count(value: int | None) -> str:
    """Return a number of members as text; "none" where no number suffices.

    Args:
        value: The number, or None.
    """
    return "none" if value is None else f"{value:,}"


def describe_certificate(certificate: Mapping[str, Any], task: str) -> list[Part]:
    """Return a certificate in words and tables.

    Args:
        certificate: What `certify_task` returns, with ``at_width``, what `certify_width` returns, if that is wanted.
        task: The task in words.
    """
    matched, fan_in = certificate["num_matches"], certificate["fan_in"]
    every, reachable, sampled = matched["all_states"], matched["reachable"], matched["sampled"]
    worst = []
    for name, decoder in certificate["decoders"].items():
        for scope, words in (("all_states", "all 2^m"), ("reachable", "reachable")):
            found = decoder[scope]
            margins = [_margin(case and case["margin"]) for case in (found["worst_one"], found["worst_zero"])]
            worst.append([name, words, _VERDICTS[found["exact"]], *margins])
    headings = ("decoder", "states", "exact", "margin of 1-bits", "margin of 0-bits")
    templates = f"k = {certificate['templates']} templates"
    templates += f" and {certificate['padding']:,} of padding" if certificate["padding"] else ""
    trained = ", the readout alone trained" if certificate["layers"] == "readout" else ""
    parts: list[Part] = [
        Paragraph(f"{task}: {templates}, m = {certificate['state_bits']} bits{trained}."),
        Paragraph(
            f"Templates that match a state (s): at most {_extreme(every)} in any of the 2^m states (proven); at most "
            f"{_extreme(reachable)} in executions that start with only {_listed(matched['reachable_from'])} set "
            f"(proven); {sampled['min']} to {sampled['max']} seen on {sampled['states']} sampled states."
        ),
        Paragraph(f"Templates that set a bit (fan-in F): {fan_in['min']} to {fan_in['max']} ({fan_in['max_bit']})."),
        TextTable("worst case of the infinitely wide ensemble", headings, worst, words=(0, 1)),
        _sufficient(_suffice(certificate["delta"]), certificate["decoders"], sampled["states"]),
        Paragraph("By the union bound over bits and states of exact Gaussian tails."),
    ]
    if at_width := certificate.get("at_width"):
        kind = f"{at_width['init']}, {at_width['labels']} labels"
        title = f"the same, estimated at width {at_width['width']:,} ({kind})"
        parts.append(_sufficient(title, at_width["decoders"], sampled["states"]))
        parts.append(Paragraph(at_width["is"]))
        below = f"below width {at_width['trusted_from']:,} it should not be trusted."
        if at_width["trusted"]:
            parts.append(Paragraph(f"B{below[1:]}"))
        else:
            parts.append(Paragraph(f"The width is too small: {below}", "warning"))
    for name, decoder in certificate["decoders"].items():
        parts += [Paragraph(line) for line in _remarks(name, decoder, certificate["padding"])]
    return [*parts, Paragraph(certificate["covers"], "note")]


def describe_in_short(predictor: TemplatePredictor) -> TextTable:
    """Return what of a certificate is found quickly, in a table: what holds of all states.

    Args:
        predictor: Theory of what is learned.

    Raises:
        RuntimeError: A search found no state within its time limit.
    """
    bounds, bits = MatchBounds(predictor.templates, seconds_max=_SECONDS_MAX), predictor.templates.layout.bits
    rows = []
    for decoder in DECODERS:
        found = certify(predictor, bounds, decoder)
        verdict = _VERDICTS[found.exact] + (", without a margin" if found.exact and found.tie else "")
        members = [count(found.members(_DELTA, logarithm)) for logarithm in (0.0, bits * math.log(2))]
        rows.append([decoder, verdict, _margin(found.margin), *members])
    headings = ("decoder", "exact", "smallest margin", "members for any one state", "members for all states")
    title = f"What the templates promise of all 2^{bits} states, in infinite width, and the {_suffice(_DELTA)}."
    return TextTable(title, headings, rows)


def _suffice(delta: float) -> str:
    return f"members that suffice for a chance of {1 - delta:.7g}"


def _sufficient(title: str, decoders: Mapping[str, Any], sampled: int) -> TextTable:
    headings = {
        "one_state": "any one state",
        "one_reachable_state": "any one reachable",
        "evaluation_states": f"the {sampled} sampled",
        "all_states": "all 2^m states",
    }
    rows = [[name, *(count(found["members"][key]) for key in headings)] for name, found in decoders.items()]
    return TextTable(title, ("decoder", *headings.values()), rows)


def _remarks(name: str, decoder: Mapping[str, Any], given: int) -> list[str]:
    """Return why a decoder is not exact, and why no number of members may suffice."""
    lines = []
    found = decoder["all_states"]
    if found["exact"] is False:
        worst = min((w for w in (found["worst_one"], found["worst_zero"]) if w), key=lambda w: float(w["margin"]))
        setting = ", ".join(f"{count} of group '{group}'" for group, count in worst["groups"].items())
        lines.append(
            f"{name} fails at bit {worst['bit']}: in a state that {worst['num_matches']} templates match, "
            f"{worst['set_count']} of the {worst['fan_in']} templates that can set it is among them, and the others "
            f"pull the mean to {worst['margin']:.3g}. Those that set it: {setting}."
        )
    padding = decoder.get("padding", {"all_states": 0})
    if padding["all_states"] > given:
        lines.append(
            f"{name} is exact with --padding {padding['all_states']} (templates without a label); on reachable states "
            f"with --padding {padding['reachable']}."
        )
    if found["tie"]:
        worst = found["worst_zero"]
        lines.append(
            f"{name} leaves 0-bits without a margin (*): the infinite mean is exactly 0 where one template matches or "
            f"none sets the bit (bit {worst['bit']}, s = {worst['num_matches']}, F = {worst['fan_in']}), and a finite "
            "ensemble decodes it at random."
        )
    return lines


def _extreme(described: Mapping[str, Any]) -> str:
    if described["max"] == described["max_attained"]:
        return str(described["max"])
    return f"{described['max']} (found: {described['max_attained']})"


def _margin(margin: float | None) -> str:
    if margin is None:
        return "-"
    return "0 (*)" if abs(margin) <= TIE else f"{margin:.4g}"


def _listed(names: Sequence[str]) -> str:
    """Return names, of many only the first two and the last three."""
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:2])}, …, {', '.join(names[-3:])}"
