"""scripts/demo is a promise of its own: it runs to its end, and everything that it shows holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.qemu
@pytest.mark.usefixtures("guest_image")
@pytest.mark.timeout(900)  # a minute where nothing else runs
def test_everything_that_the_demo_shows_holds() -> None:
    words = [sys.executable, str(ROOT / "scripts" / "demo.py")]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["Everything held."]), done.stdout + done.stderr
