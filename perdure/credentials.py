"""Where passphrases and key files come from.

What unlocks: a key file (--key-file, PERDURE_KEY_FILE), else a passphrase from PERDURE_PASSWORD, PERDURE_PASSWORD_FILE,
PERDURE_PASSWORD_COMMAND, or a terminal. A new one: a key file that the command names, else a passphrase from the same
variables with PERDURE_NEW_PASSWORD in front, or a terminal, twice. For another repository that things are taken from,
PERDURE_FROM_KEY_FILE and the variables with PERDURE_FROM_PASSWORD in front; else what unlocks this one.
"""

from __future__ import annotations

import getpass
import os
import shlex
import subprocess
import sys
from pathlib import Path

from base.errors import UsageError, WrongPassphraseError
from store.keyring.slots import Credential, KeyFile

_KEY_FILE = "PERDURE_KEY_FILE"
_PASSWORD, _NEW_PASSWORD = "PERDURE_PASSWORD", "PERDURE_NEW_PASSWORD"
_FROM_KEY_FILE, _FROM_PASSWORD = "PERDURE_FROM_KEY_FILE", "PERDURE_FROM_PASSWORD"
_KEY_FILE_LEAST, _KEY_FILE_MOST = 32, 1 << 20


def credential(*, new: bool = False) -> Credential:
    """What unlocks the repository, or with `new` will unlock the one that is being made (asked for twice).

    Raises UsageError, WrongPassphraseError (none to be had).
    """
    file = os.environ.get(_KEY_FILE)
    if file:
        return key_file(Path(file))
    return _passphrase(_PASSWORD, "passphrase of the repository", twice=new)


def new_credential(file: str | None = None) -> Credential:
    """What will unlock a slot that is being made: a key file, or a passphrase. Raises like `credential`."""
    if file is not None:
        return key_file(Path(file))
    return _passphrase(_NEW_PASSWORD, "new passphrase", twice=True)


def from_credential() -> Credential | None:
    """What unlocks another repository that things are taken from; None if nothing is said of it. Raises UsageError."""
    file = os.environ.get(_FROM_KEY_FILE)
    if file:
        return key_file(Path(file))
    if any(os.environ.get(name) for name in _sources(_FROM_PASSWORD)):
        return _passphrase(_FROM_PASSWORD, "passphrase of the other repository", twice=False)
    return None


def stands_somewhere() -> bool:
    """Whether `credential` can be asked for again without a person."""
    return any(os.environ.get(name) for name in (_KEY_FILE, *_sources(_PASSWORD)))


def key_file(path: Path) -> KeyFile:
    """The bytes of a key file, all of them. Raises UsageError."""
    try:
        with path.open("rb") as file:
            content = file.read(_KEY_FILE_MOST + 1)
    except OSError as error:
        raise UsageError(f"cannot read key file {path}: {error.strerror}") from error
    if not _KEY_FILE_LEAST <= len(content) <= _KEY_FILE_MOST:
        raise UsageError(f"key file {path} must hold {_KEY_FILE_LEAST} random bytes or more, and at most 1 MiB")
    if len(set(content)) < _KEY_FILE_LEAST // 4:
        raise UsageError(f"key file {path} is not random: make one with `head -c 64 /dev/urandom > FILE`")
    return KeyFile(content)


def _sources(name: str) -> tuple[str, str, str]:
    return name, f"{name}_FILE", f"{name}_COMMAND"


def _passphrase(name: str, what: str, *, twice: bool) -> bytes:
    """The passphrase as bytes, without the newline that ends a file or a command's output."""
    in_clear, in_file, of_command = _sources(name)
    plain, file, command = (os.environ.get(each) for each in (in_clear, in_file, of_command))
    if plain is not None:
        secret = os.fsencode(plain)
    elif file:
        secret = _from_file(in_file, Path(file))
    elif command:
        secret = _from_command(of_command, command)
    elif sys.stdin.isatty():
        secret = _from_terminal(what, twice)
    else:
        raise WrongPassphraseError(f"no {what}: set {in_file} or {of_command}, or run this on a terminal")
    if not secret:
        raise WrongPassphraseError(f"the {what} is empty")
    return secret


def _from_file(variable: str, path: Path) -> bytes:
    try:
        return path.read_bytes().rstrip(b"\r\n")
    except OSError as error:
        raise UsageError(f"{variable}: cannot read {path}: {error.strerror}") from error


def _from_command(variable: str, command: str) -> bytes:
    try:
        done = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, check=True)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise UsageError(f"{variable} {command!r} failed: {error}") from error
    return done.stdout.rstrip(b"\r\n")


def _from_terminal(what: str, twice: bool) -> bytes:
    try:
        first = getpass.getpass(f"{what}: ")
        if twice and getpass.getpass("once more: ") != first:
            raise UsageError("the passphrases differ")
    except EOFError:
        raise WrongPassphraseError(f"no {what} was typed") from None
    return os.fsencode(first)
