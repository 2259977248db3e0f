"""The layers of the house: a file imports only from lower ones, and the first three load neither torch nor transformers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

LEVELS = {
    0: ["surefoot.errors"],
    1: [
        "surefoot.config",
        "surefoot.flag_values",
        "surefoot.compat",
        "surefoot.run_file",
        "surefoot.json_file",
        "surefoot.schema",
        "surefoot.stages",
        "surefoot.machine",
        "surefoot.inputs",
        "surefoot.verdicts",
        "surefoot.detection",
        "surefoot.script",
        "surefoot.terminal",
        "surefoot.decoder",
        "surefoot.activations",
        "surefoot.checkpoint",
        "surefoot.signals",
        "surefoot.memory",
        "surefoot.support",
        "surefoot.last_words",
    ],
    2: ["surefoot.decide", "surefoot.plan", "surefoot.plan_text"],
    3: [
        "surefoot.runtime",
        "surefoot.tokens",
        "surefoot.adapters",
        "surefoot.artifacts",
        "surefoot.generate",
        "surefoot.loftq",
        "surefoot.weights",
    ],
    4: [
        "surefoot.run",
        "surefoot.assembly",
        "surefoot.cli",
        "surefoot.launcher",
        "surefoot.inference",
        "surefoot.measure",
        "surefoot.row_sets",
        "surefoot.answering",
    ],
    5: ["finetune"],
}
ROOMS = ["surefoot.attention", "surefoot.backends", "surefoot.data", "surefoot.evaluation", "surefoot.ops", "surefoot.training"]  # level 3


def level(module: str) -> int:
    if module.startswith(("surefoot.rules", "surefoot.report")):
        return 2
    if module.startswith(("surefoot.diagnosis", "surefoot.doctor", "surefoot.export", "surefoot.launch.")):
        return 4
    if any(module == room or module.startswith(f"{room}.") for room in ROOMS):
        return 3
    return next(number for number, modules in LEVELS.items() if module in modules)


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, is it imported at module level outside TYPE_CHECKING) for every import of our own."""
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    found = []
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node in tree.body) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            own = [name for name in names if (ROOT / (name.replace(".", "/") + ".py")).exists()]
            found += [(name, node in tree.body) for name in own or [node.module]]
    return found


def modules() -> dict[str, Path]:
    files = [ROOT / "finetune.py", *(ROOT / "surefoot").rglob("*.py")]
    return {str(file.relative_to(ROOT).with_suffix("")).replace("/", "."): file for file in files if file.name != "__init__.py"}


def test_imports_when_read_then_go_down_the_levels_and_never_across_rooms() -> None:
    wrong = []
    for module, file in modules().items():
        for target, _ in imports(file):
            if not target.startswith(("surefoot.", "finetune")) or target in ROOMS:
                continue
            same_room = module.rpartition(".")[0] == target.rpartition(".")[0]
            may_share = level(module) in (1, 2, 4) and level(target) == level(module)
            allowed = level(target) < level(module) or (same_room and (level(module) != 3 or module.count(".") == 2)) or may_share
            if not allowed:
                wrong.append(f"{module} (L{level(module)}) imports {target} (L{level(target)})")
    assert len(modules()) > 20
    assert wrong == []


def test_first_levels_when_imported_then_bring_no_torch() -> None:
    names = [name for number in (0, 1, 2) for name in LEVELS[number]] + [
        "surefoot.run",
        "surefoot.cli",
        "surefoot.diagnosis.text",
        "finetune",
    ]
    code = f"import sys, {', '.join(names)}; print(sorted({{'torch', 'transformers', 'datasets', 'peft'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_finetune_when_counted_then_stays_a_door() -> None:
    assert len((ROOT / "finetune.py").read_text().splitlines()) <= 45
