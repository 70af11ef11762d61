"""`ntk-ensembles certify`: what is exact, for which states, with how many members, before any training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from ntk_ensembles.cli.main import command
from ntk_ensembles.cli.parsing import DecoderOptions, OutputOptions, PredictionOptions, parse_task
from ntk_ensembles.console import console
from ntk_ensembles.ensemble import INITS, Init
from ntk_ensembles.ensemble.network import WIDTH_MAX
from ntk_ensembles.errors import OptionError, check_choice, check_range
from ntk_ensembles.tasks import Task
from ntk_ensembles.theory import TIE, Labels, certify_task, certify_width, check_labels

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
        """Check the ranges.

        Raises:
            OptionError: An option is outside its range.
        """
        super().__post_init__()
        if not 0 < self.delta < 1:
            raise OptionError("delta", self.delta, "a number between 0 and 1")
        if self.width is not None:
            check_range("width", self.width, 1, WIDTH_MAX)
        check_choice("init", self.init, INITS)
        check_labels(self.labels, self.layers)


@command("ntk-ensembles certify")
def certify_command(arguments: list[str], prog: str) -> int:
    """Print a certificate; the exit status is 0 if a decoder that was asked for is exact for all states, else 1."""
    task, options, _ = parse_task(arguments, prog, _DESCRIPTION, CertifyOptions)
    try:
        with console(stderr=True).status("searching all states for the worst ones …"):
            certificate = certify_task(
                task,
                layers=options.layers,
                padding=options.padding,
                decoders=options.decoders,
                delta=options.delta,
                evaluation_states=options.evaluation_states,
                evaluation_seed=options.evaluation_seed,
            )
            if options.width is not None:
                certificate["at_width"] = certify_width(
                    task,
                    options.width,
                    antisymmetric=options.init == "antisymmetric",
                    labels=options.labels,
                    layers=options.layers,
                    padding=options.padding,
                    decoders=options.decoders,
                    delta=options.delta,
                    evaluation_states=options.evaluation_states,
                    evaluation_seed=options.evaluation_seed,
                )
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    options.show(certificate, lambda out: _show(task, certificate, out))
    return 0 if any(certificate["decoders"][name]["all_states"]["exact"] for name in options.decoders) else 1


def _show(task: Task[Any, Any], certificate: dict[str, Any], out: Console) -> None:
    matched = certificate["num_matches"]
    padding = f" and {certificate['padding']:,} of padding" if certificate["padding"] else ""
    trained = ", the readout alone trained" if certificate["layers"] == "readout" else ""
    templates = f"k = {certificate['templates']} templates{padding}"
    out.print(f"{task!r}: {templates}, m = {certificate['state_bits']} bits{trained}.")
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
    chance = f"members that suffice for a chance of {1 - certificate['delta']:.7g}"
    out.print(_members_table(chance, certificate["decoders"], sampled["states"]))
    out.print("By the union bound over bits and states of exact Gaussian tails.\n")
    if at_width := certificate.get("at_width"):
        _show_width(at_width, sampled["states"], out)
    for name, decoder in certificate["decoders"].items():
        for line in _remarks(name, decoder, certificate["padding"]):
            out.print(line, highlight=False)
    out.print(certificate["covers"], style="dim", highlight=False)


def _members_table(title: str, decoders: dict[str, Any], sampled: int) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("decoder")
    headings = {
        "one_state": "any one state",
        "one_reachable_state": "any one reachable",
        "evaluation_states": f"the {sampled} sampled",
        "all_states": "all 2^m states",
    }
    for heading in headings.values():
        table.add_column(heading, justify="right")
    for name, decoder in decoders.items():
        counts = [decoder["members"][key] for key in headings]
        table.add_row(name, *("none" if count is None else f"{count:,}" for count in counts))
    return table


def _show_width(at_width: dict[str, Any], sampled: int, out: Console) -> None:
    """Print what is expected at a finite width, beside what was proven for infinite width."""
    kind = f"{at_width['init']}, {at_width['labels']} labels"
    title = f"the same, estimated at width {at_width['width']:,} ({kind})"
    out.print(_members_table(title, at_width["decoders"], sampled))
    out.print(at_width["is"], highlight=False)
    trusted = f"below width {at_width['trusted_from']:,} it should not be trusted"
    if at_width["trusted"]:
        out.print(f"{trusted[0].upper()}{trusted[1:]}.\n", highlight=False)
    else:
        out.print(f"[bold red]The width is too small:[/bold red] {trusted}.\n", highlight=False)


def _remarks(name: str, decoder: dict[str, Any], given: int) -> list[str]:
    """Why a decoder is not exact, and why no number of members may suffice."""
    lines = []
    found = decoder["all_states"]
    if found["exact"] is False:
        worst = min((w for w in (found["worst_one"], found["worst_zero"]) if w), key=lambda w: float(w["margin"]))
        lines.append(
            f"{name} fails at bit {worst['bit']}: in a state that {worst['num_matches']} templates match, "
            f"{worst['set_count']} of the {worst['fan_in']} templates that can set it is among them, and the others "
            f"pull the mean to {worst['margin']:.3g}. Those that set it: {_groups(worst['groups'])}."
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
