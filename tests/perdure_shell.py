"""`perdure` as a process, with everything that it touches in one folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEY = bytes(range(64))
"""Content of the key file that unlocks."""


class Shell:
    """Runs `perdure` with a state folder, repository and key file of its own. A passphrase, which costs every command
    most of a second, is for tests that are about one."""

    def __init__(self, root, passphrase=None):
        self.root = root
        self.repository = root / "repository"
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),  # the code beside these tests, whatever is installed
            "PERDURE_REPOSITORY": str(self.repository),
            "PERDURE_STATE_DIR": str(root / "state"),
        }
        if passphrase is None:
            self.environment["PERDURE_KEY_FILE"] = str(self.write("key", KEY))
        else:
            self.environment["PERDURE_PASSWORD"] = passphrase

    def run(self, *words, **environment):
        """The finished process, whatever came of it; never with a traceback."""
        done = subprocess.run(
            [sys.executable, "-m", "perdure", *map(str, words)],
            env={key: value for key, value in (self.environment | environment).items() if value is not None},
            capture_output=True,
            stdin=subprocess.DEVNULL,
            cwd=self.root,
        )
        assert b"Traceback" not in done.stderr, done.stderr
        return done

    def __call__(self, *words, code=0, **environment):
        done = self.run(*words, **environment)
        assert done.returncode == code, (words, done.returncode, done.stdout, done.stderr)
        return done

    def json(self, *words, code=0, **environment):
        done = self(*words, "--json", code=code, **environment)
        assert not done.stderr, done.stderr
        return json.loads(done.stdout)

    def error(self, *words, code, **environment):
        """The one line that a mistake gives."""
        done = self(*words, code=code, **environment)
        assert not done.stdout
        lines = done.stderr.decode().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("perdure: ")
        return lines[0]

    def write(self, name, data):
        path = self.root / name
        path.write_bytes(data)
        return path
