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


SUPERVISION = (
    *("supervisor", "launcher", "machine", "running", "execution", "rollback"),
    *("background", "lazily", "draining", "quiescing", "capturing", "reconnecting"),
    *("borrowed", "guard", "following"),
)
"""Modules of supervision that run in the supervisor's loop."""

INSIDE = {
    "store": {"index": set(), "keyring": {""}, "retention": {"index", ""}, "": {"index", "keyring", "retention"}},
    "perdure": {"disks": {""}, "supervision": {"disks", ""}},
}
"""Folders within a folder and what of it they may import; "" is what stands in it itself. Who is not named may import
all: store.upkeep, perdure.commands, and the modules of perdure, which hand commands and supervisors out by name."""


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


@pytest.mark.parametrize(("parent", "folder"), [(parent, folder) for parent in INSIDE for folder in INSIDE[parent]])
def test_arrows_inside_a_folder(parent, folder):
    inside = {path.name for path in (ROOT / parent).iterdir() if (path / "__init__.py").exists()}
    names = {path.stem for path in (ROOT / parent).glob("*.py")} | inside
    for path in sorted((ROOT / parent / folder).glob("*.py")):
        parts = [name.split(".") for name in modules(path)]
        found = {each[1] for each in parts if each[0] == parent and len(each) > 1 and each[1] in names}
        wrong = {each if each in inside else "" for each in found} - INSIDE[parent][folder] - {folder}
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong)) or parent}"


def test_guest_needs_the_standard_library_only():
    import sys

    for path in (ROOT / "guest").rglob("*.py"):
        assert imports(path) <= set(sys.stdlib_module_names), path


def test_asyncio_stays_in_its_places():
    allowed = {
        *(f"vm/{name}.py" for name in ("monitor", "hold", "migration", "disks", "channel")),
        *("perdure/control.py", "perdure/disks/filling.py"),
        *(f"perdure/supervision/{name}.py" for name in SUPERVISION),
    }
    for folder in MAY_IMPORT:
        for path in (ROOT / folder).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            assert "asyncio" not in imports(path) or name in allowed or name.startswith("guest/"), name
