"""The package's floors: every module imports only from its own folder and from lower floors."""

import ast
from pathlib import Path

import ntk_ensembles

PACKAGE = Path(ntk_ensembles.__file__).parent
FLOORS = [
    {"errors", "files", "console"},
    {"events"},
    {"templates"},
    {"tasks"},
    {"theory"},
    {"ensemble", "computer"},
    {"runs"},
    {"training"},
    {"cli"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def test_modules_import_only_from_below() -> None:
    upward = []
    for path in sorted(PACKAGE.glob("*/**/*.py")) + [PACKAGE / f"{name}.py" for name in FLOORS[0] | FLOORS[1]]:
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                imported = name.removeprefix("ntk_ensembles.").partition(".")[0]
                if name.startswith("ntk_ensembles.") and imported != room and FLOOR[imported] >= FLOOR[room]:
                    upward.append(f"{path.relative_to(PACKAGE)}: {name}")
    assert not upward
