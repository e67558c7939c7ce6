"""Where the passphrase comes from: PERDURE_PASSWORD, PERDURE_PASSWORD_FILE, PERDURE_PASSWORD_COMMAND, or a terminal."""

from __future__ import annotations

import getpass
import os
import shlex
import subprocess
import sys
from pathlib import Path

from base.errors import UsageError, WrongPassphraseError


def passphrase(*, new: bool = False) -> bytes:
    """The passphrase as bytes, without the newline that ends a file or a command's output.

    `new` asks twice on a terminal. Raises UsageError, WrongPassphraseError (none to be had).
    """
    plain = os.environ.get("PERDURE_PASSWORD")
    file = os.environ.get("PERDURE_PASSWORD_FILE")
    command = os.environ.get("PERDURE_PASSWORD_COMMAND")
    if plain is not None:
        secret = plain.encode()
    elif file:
        secret = _from_file(Path(file))
    elif command:
        secret = _from_command(command)
    elif sys.stdin.isatty():
        secret = _from_terminal(new)
    else:
        raise WrongPassphraseError(
            "no passphrase: set PERDURE_PASSWORD_FILE or PERDURE_PASSWORD_COMMAND, or run this on a terminal"
        )
    if not secret:
        raise WrongPassphraseError("the passphrase is empty")
    return secret


def _from_file(path: Path) -> bytes:
    try:
        return path.read_bytes().rstrip(b"\r\n")
    except OSError as error:
        raise UsageError(f"PERDURE_PASSWORD_FILE: cannot read {path}: {error.strerror}") from error


def _from_command(command: str) -> bytes:
    try:
        done = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, check=True)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise UsageError(f"PERDURE_PASSWORD_COMMAND {command!r} failed: {error}") from error
    return done.stdout.rstrip(b"\r\n")


def _from_terminal(new: bool) -> bytes:
    first = getpass.getpass("passphrase of the repository: ")
    if new and getpass.getpass("once more: ") != first:
        raise UsageError("the passphrases differ")
    return first.encode()
