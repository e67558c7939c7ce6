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


def imports(path: Path) -> set[str]:
    """First names of everything that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_arrows(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        wrong = (imports(path) & set(MAY_IMPORT)) - MAY_IMPORT[folder] - {folder}
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_guest_needs_the_standard_library_only():
    import sys

    for path in (ROOT / "guest").rglob("*.py"):
        assert imports(path) <= set(sys.stdlib_module_names), path


def test_asyncio_stays_in_its_places():
    allowed = {
        *("vm/monitor.py", "vm/hold.py", "vm/migration.py", "vm/channel.py"),
        *("perdure/supervisor.py", "perdure/control.py", "perdure/launcher.py", "perdure/machine.py"),
        "perdure/running.py",
    }
    for folder in MAY_IMPORT:
        for path in (ROOT / folder).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            assert "asyncio" not in imports(path) or name in allowed or name.startswith("guest/"), name
