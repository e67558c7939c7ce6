"""Memory of commands follows what is worked on at once, not how large a region is."""

import os
import subprocess
import sys

import numpy as np

PAGE = 4096
PAGES = 3000
SLACK_KIB = 40 << 10
"""In a larger region the same pages hang on more nodes, and the cache of frames (32 MiB) fills up."""


def peak_kib(shell, *words):
    """Resident memory of one command at its peak, as the kernel accounts for it when the process is reaped."""
    process = subprocess.Popen(
        [sys.executable, "-m", "perdure", "--quiet", *map(str, words)],
        env=shell.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        cwd=shell.root,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, words
    return usage.ru_maxrss


def scattered(path, length, seed):
    """The same amount of data, spread over a file of this length that is holes elsewhere."""
    random = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.truncate(length)
        for page in random.choice(length // PAGE, PAGES, replace=False).tolist():
            file.seek(page * PAGE)
            file.write(random.bytes(PAGE))


def test_no_command_needs_more_memory_for_a_larger_region(shell):
    """With a key file, since the memory of Argon2id would hide everything below 128 MiB."""
    peaks = {}
    for name, length in (("small", 1 << 30), ("large", 1 << 40)):
        first, second = shell.root / f"{name}.1", shell.root / f"{name}.2"
        scattered(first, length, 1)
        scattered(second, length, 2)
        peaks[name] = {
            "import": peak_kib(shell, "import", name, f"ram={first}"),
            "scan": peak_kib(shell, "import", name, f"ram={second}", "--parent", f"{name}@1"),
            "export": peak_kib(shell, "export", f"{name}@2", "ram", shell.root / "out", "--force"),
            "diff": peak_kib(shell, "diff", f"{name}@1", f"{name}@2"),
            "check": peak_kib(shell, "check", "--read-data"),
        }
        assert (shell.root / "out").stat().st_size == length
    for what, kib in peaks["large"].items():
        assert kib < peaks["small"][what] + SLACK_KIB, (what, peaks)
