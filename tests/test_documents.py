"""What README.md, docs/ and the notebooks' text show is what works: code, links, flags and cited equations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from ntk_ensembles import TASKS, Addition, RunOptions, train
from ntk_ensembles.cli.main import main
from ntk_ensembles.cli.parsing import parse_task
from ntk_ensembles.cli.train import train_command

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LINKING = [*PAGES, ROOT / "benchmarks" / "README.md", *NOTEBOOKS]
THEORY = ROOT / "docs" / "theory.md"

COMMANDS = ("certify", "evaluate", "merge", "plan", "report", "reproduce", "run", "validate")
"""Those of ``ntk-ensembles``; ``train.py`` comes beside them."""


def text_of(page: Path) -> str:
    """The text of a page; of a notebook what stands between its code."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        return "\n\n".join(
            "".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"
        )
    return text


def blocks_of(page: Path) -> list[tuple[int, str]]:
    """The python blocks of a page, each with the number of the line on which its code begins."""
    text = text_of(page)
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def code_of(page: Path) -> list[str]:
    """Lines of code blocks, and the code between single backticks."""
    text = text_of(page)
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))
    return [*(line for block in fenced for line in block.splitlines()), *inline]


def train_what_the_checkpoints_page_loads() -> None:
    """The run that its code names in a comment, smaller."""
    train(Addition(bits=8), RunOptions(width=2048, ensemble=16, evaluation_states=50, out="runs/add"))


BEFORE: dict[str, Callable[[], object]] = {"checkpoints.md": train_what_the_checkpoints_page_loads}
"""What a page's reader has done before its first block."""

AFTER: dict[str, dict[str, object]] = {"checkpoints.md": {"sums": [8, 255]}}
"""Values that a page states in comments."""


def test_no_block_is_overlooked() -> None:
    pages = {page.name: len(blocks_of(page)) for page in PAGES}
    assert {"README.md", "any-data.md", "checkpoints.md", "sbn.md", "theory.md"} <= {
        n for n, found in pages.items() if found
    }
    for page in PAGES:
        # Also one that is indented, or begun with other words after "python".
        assert len(re.findall(r"(?:```|~~~)[ \t]*py", text_of(page))) == pages[page.name], page.name
    assert len(code_of(ROOT / "README.md")) > 50


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.name)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    BEFORE.get(page.name, lambda: None)()
    scope: dict[str, object] = {"__name__": page.stem}
    for line, block in blocks_of(page):
        # Blank lines before it, so that a traceback shows the line of the page.
        exec(compile("\n" * (line - 1) + block, str(page), "exec"), scope)
    for name, value in AFTER.get(page.name, {}).items():
        assert scope[name] == value


def links_of(page: Path) -> list[str]:
    """The links of a page to other files of the repository, and to its own headings."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)) if not link.startswith("http")]


def dead_links(page: Path) -> list[str]:
    """Those whose file or heading does not exist."""
    dead = []
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        headings = re.findall(r"^#+ (.*)$", text_of(target), re.MULTILINE) if anchor and target.exists() else []
        anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        if not target.exists() or (anchor and anchor not in anchors):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", [page for page in LINKING if links_of(page)], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_exist(page: Path) -> None:
    assert dead_links(page) == []


def test_dead_links_are_seen(tmp_path: Path) -> None:
    assert {"README.md", "any-data.md", "sbn.md", "theory.md"} <= {page.name for page in LINKING if links_of(page)}
    other, page = tmp_path / "other.md", tmp_path / "page.md"
    other.write_text("# One heading\n## Two, with a comma\n", encoding="utf-8")
    alive = ["other.md", "other.md#one-heading", "other.md#two-with-a-comma", "#here", "https://nowhere.example/x"]
    dead = ["another.md", "other.md#three", "#there"]
    text = "# Here\n" + "\n".join(f"[words]({link}) and more" for link in (*alive, *dead))
    page.write_text(text, encoding="utf-8")
    assert dead_links(page) == dead


@cache
def help_of(command: str) -> str:
    """The help of a command, with the options of every task."""
    capture = pytest.MonkeyPatch()
    written: list[str] = []
    tasks: list[list[str]] = [[]]
    if command in ("train.py", "certify", "validate"):
        tasks += [["--task", name] for name in TASKS]
    with capture.context() as patch:
        # Help is for a terminal; lines that are broken could break a flag.
        patch.setenv("COLUMNS", "200")
        patch.setattr("sys.stdout.write", written.append)
        for task in tasks:
            with pytest.raises(SystemExit) as stop:
                train_command([*task, "--help"]) if command == "train.py" else main([command, *task, "--help"])
            assert stop.value.code == 0
    return "".join(written)


def named(code: str) -> str | None:
    """The command that a line of code runs."""
    found = re.search(r"(?:^|\s)(train\.py|ntk-ensembles)(?:\s+(\w+))?", code)
    if found is None:
        return None
    return "train.py" if found[1] == "train.py" else found[2]


def flags(code: str) -> list[str]:
    return re.findall(r"(?<![\w-])--[a-z][a-z-]*", code)


WITH_FLAGS = [page for page in LINKING if any(named(code) or code.startswith("--") for code in code_of(page))]
"""Pages with commands or flags; of others there is nothing to say."""


@pytest.mark.parametrize("page", WITH_FLAGS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_flags_exist(page: Path) -> None:
    """Those of a command in its help; a flag that stands alone in the help of one of them."""
    seen = 0
    everything = "".join(help_of(command) for command in (*COMMANDS, "train.py"))
    for code in code_of(page):
        command = named(code)
        if command is not None:
            assert command in (*COMMANDS, "train.py"), code
            seen += 1
        # The page of the benchmarks has commands of its own; torchrun's flags come before train.py.
        own = command or code.startswith("--")
        for flag in flags(code[code.find("train.py") :] if command == "train.py" else code) if own else []:
            known = help_of(command) if command else everything
            assert re.search(rf"{flag}(?![\w-])", known), f"{flag} in {code!r}"
            seen += 1
    assert seen


def test_the_flags_test_sees_flags() -> None:
    seen = {(named(code), flag) for page in LINKING for code in code_of(page) for flag in flags(code)}
    assert {"README.md", "checkpoints.md", "sbn.md"} <= {page.name for page in WITH_FLAGS}
    assert {("train.py", "--task"), ("run", "--backend"), ("certify", "--task"), (None, "--out")} <= seen
    assert "--nonsense" not in help_of("train.py")


def test_training_commands_parse() -> None:
    """With the values that the README gives to options."""
    commands = [
        code.partition("train.py")[2].split() for code in code_of(ROOT / "README.md") if named(code) == "train.py"
    ]
    parsed = 0
    for command in commands:
        if "RUN_DIR" in command or "--help" in command or "--task" not in command and "--config" not in command:
            continue
        arguments = [re.sub(r"^(configs|examples)/", rf"{ROOT}/\1/", argument) for argument in command]
        parse_task(arguments, "train.py", "", RunOptions)
        parsed += 1
    assert parsed >= 4


def test_cited_equations_and_sections_exist() -> None:
    """Of docs/theory.md, in docstrings and in other pages; its numbers have no gaps."""
    theory = text_of(THEORY)
    numbers = [int(number) for number in re.findall(r"\\tag\{(\d+)\}", theory)]
    assert numbers == list(range(1, len(numbers) + 1))
    sections = [int(number) for number in re.findall(r"^## (\d+)\. ", theory, re.MULTILINE)]
    assert sections == list(range(1, 12))
    cited = 0
    for path in [*sorted((ROOT / "ntk_ensembles").rglob("*.py")), *PAGES, THEORY]:
        text = " ".join(text_of(path).split())
        for kind, allowed in (("equations?", numbers), ("sections?", sections)):
            for words in re.findall(rf"theory\.md\)?, {kind} ((?:\(?\d+\)?(?:, | and | to )?)+)", text):
                for number in re.findall(r"\d+", words):
                    assert int(number) in allowed, f"{path.name}: {kind} {number}"
                    cited += 1
    assert cited >= 5
    for number in re.findall(
        r"(?<=[\s,])\((\d{1,2})\)(?=[\s,.:;])", re.sub(r"\$\$.*?\$\$", "", theory, flags=re.DOTALL)
    ):
        assert int(number) in numbers, number


def test_symbols_point_to_what_exists() -> None:
    """The table of docs/theory.md: every name stands in the file that it is said to be in."""
    rows = [row.split(" | ") for row in re.findall(r"^\| \$.*$", text_of(THEORY), re.MULTILINE)]
    found = 0
    for *_, where in rows:
        for path, names in re.findall(r"`([\w/]+(?:\.py|/))`: ((?:`[\w.]+`(?:, )?)+)", where):
            place = ROOT / "ntk_ensembles" / path
            files = [place] if place.suffix else sorted(place.glob("*.py"))
            text = "".join(text_of(file) for file in files)
            for name in re.findall(r"`\.?([\w.]+)`", names):
                for part in name.split("."):
                    assert re.search(rf"\b{part}\b", text), f"{path}: {name}"
                found += 1
    assert found >= 20
