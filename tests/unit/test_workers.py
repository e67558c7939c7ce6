"""Worker processes at the death of their owner."""

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

OWNER = """
    import os, signal
    from base.workers import WorkerPool

    def serve(pipe):
        while True:
            pipe.send(bytes(pipe.recv()))

    pool = WorkerPool(2, serve)
    for pipe in pool.pipes:
        for _ in range(3):
            pipe.send(1 << 20)  # the answer is more than a pipe holds, and nobody reads it
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_in_silence_when_their_owner_is_killed():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(OWNER)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,  # returns when the last process that holds the pipes has ended
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-9, b"", b"")
