"""The arrows of docs/DESIGN.md: which folder may import which, read from the code's own imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "base": set(),
    "store": {"base"},
    "vm": {"base"},
    "capture": {"vm", "store", "base"},
    "restore": {"vm", "store", "base"},
    "guest": set(),
    "perdure": {"capture", "restore", "vm", "store", "base"},
}


INSIDE_STORE = {"index": {"index"}, "retention": {"index", "retention", ""}, "": {"index", "retention", ""}}
"""Folders of store and what of store they may import; "" is what stands in store itself. Upkeep may import all."""


def modules(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, wherever in it; of `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imports(path: Path) -> set[str]:
    """First names of everything that a file imports, wherever in it."""
    return {name.split(".")[0] for name in modules(path)}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_arrows(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        wrong = (imports(path) & set(MAY_IMPORT)) - MAY_IMPORT[folder] - {folder}
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("folder", INSIDE_STORE)
def test_arrows_inside_the_store(folder):
    here = ROOT / "store" / folder
    names = {path.stem for path in (ROOT / "store").glob("*.py")} | {"index", "retention", "upkeep"}
    for path in sorted(here.glob("*.py")):
        parts = [name.split(".") for name in modules(path)]
        found = {each[1] for each in parts if each[0] == "store" and len(each) > 1 and each[1] in names}
        found = {each if (ROOT / "store" / each).is_dir() else "" for each in found}
        wrong = found - INSIDE_STORE[folder]
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong)) or 'the store'}"


def test_guest_needs_the_standard_library_only():
    import sys

    for path in (ROOT / "guest").rglob("*.py"):
        assert imports(path) <= set(sys.stdlib_module_names), path


def test_asyncio_stays_in_its_places():
    allowed = {
        *("vm/monitor.py", "vm/hold.py", "vm/migration.py", "vm/disks.py", "vm/channel.py"),
        *("perdure/supervisor.py", "perdure/control.py", "perdure/launcher.py", "perdure/machine.py"),
        *("perdure/running.py", "perdure/execution.py", "perdure/filling.py", "perdure/rollback.py"),
        *("perdure/background.py", "perdure/lazily.py"),
    }
    for folder in MAY_IMPORT:
        for path in (ROOT / folder).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            assert "asyncio" not in imports(path) or name in allowed or name.startswith("guest/"), name
