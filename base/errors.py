"""The error tree. A family says what the caller can do about it; facts are attributes.

    PerdureError                   exit code 1
    +-- UsageError                 2   the command line or a file it names is wrong: correct it
    |   `-- ConfigurationError     2   a VM.toml is wrong: names file, line and key
    +-- NotFoundError              1   no such VM, generation, region, running supervisor
    +-- ConflictError              1   what is asked contradicts what is (a VM that runs already, overlapping tags)
    +-- RepositoryMissingError     10
    +-- LockedError                11  somebody else holds it: wait, or see who
    +-- WrongPassphraseError       12
    +-- FormatVersionError         1   made by a newer Perdure: upgrade
    +-- IntegrityError             1   stored bytes are not what was stored (`check` turns these into findings, 3)
    +-- QuotaError                 1   a VM may not store so much: forget generations, or raise its quota
    +-- StorageError               1   the operating system refused: disk full, permission, I/O error
    +-- VirtualMachineError        1   QEMU is missing, refused, or died: its own message is kept
    +-- GuestError                 1   the guest answered with an error, or not in time
    `-- WorkerError                1   a worker process died or failed

Every message is one line and names the object, VM or file it is about.
"""

from __future__ import annotations

from base.units import format_size


class PerdureError(Exception):
    """Root of all errors that a user can cause or meet; `exit_code` is the command's exit status."""

    exit_code = 1

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class UsageError(PerdureError):
    """The request itself is wrong."""

    exit_code = 2


class ConfigurationError(UsageError):
    """A VM description is wrong.

    Attributes: `file` (path as given), `line` (1-based, None if unknown), `key` (dotted, None if unknown),
    `problem` (one sentence).
    """

    def __init__(self, file: str, problem: str, *, line: int | None = None, key: str | None = None) -> None:
        self.file, self.problem, self.line, self.key = file, problem, line, key
        where = file if line is None else f"{file}, line {line}"
        super().__init__(f"{where}: {problem}" if key is None else f"{where}: {key}: {problem}")


class NotFoundError(PerdureError):
    """A VM, generation, region or supervisor that was named does not exist."""


class ConflictError(PerdureError):
    """The request contradicts the present state."""


class RepositoryMissingError(PerdureError):
    """There is no repository at the given place."""

    exit_code = 10


class LockedError(PerdureError):
    """Somebody else holds a lock that is needed.

    Attributes: `pid`, `host`, `purpose`, `since` (RFC 3339) of the holder; None where it is not known.
    """

    exit_code = 11

    def __init__(
        self,
        message: str,
        *,
        pid: int | None = None,
        host: str | None = None,
        purpose: str | None = None,
        since: str | None = None,
    ) -> None:
        self.pid, self.host, self.purpose, self.since = pid, host, purpose, since
        super().__init__(message)


class WrongPassphraseError(PerdureError):
    """No key slot opens with what was given."""

    exit_code = 12


class FormatVersionError(PerdureError):
    """A stored object has a format version that this program does not know.

    Attributes: `object` (its name), `found`, `supported` (versions).
    """

    def __init__(self, object: str, found: int, supported: int) -> None:
        self.object, self.found, self.supported = object, found, supported
        super().__init__(
            f"{object}: format version {found} is newer than {supported}, which this Perdure knows: upgrade Perdure"
        )


class IntegrityError(PerdureError):
    """Stored bytes are damaged, missing, or not what their name says.

    Attributes: `object` (storage name), `offset` (bytes into the object, None if it concerns all of it),
    `chunk` (id in hex, None if not about one chunk), `problem`.
    """

    def __init__(self, object: str, problem: str, *, offset: int | None = None, chunk: str | None = None) -> None:
        self.object, self.problem, self.offset, self.chunk = object, problem, offset, chunk
        place = object if offset is None else f"{object} at offset {offset}"
        super().__init__(f"{place}: {problem}" + ("" if chunk is None else f" (chunk {chunk[:16]})"))


class QuotaError(PerdureError):
    """A generation would exceed what its VM may store; nothing was committed.

    Attributes: `vm`, `quota`, `used` (counted for what is listed), `wanted` (by the new generation), in bytes.
    """

    def __init__(self, vm: str, quota: int, used: int, wanted: int) -> None:
        self.vm, self.quota, self.used, self.wanted = vm, quota, used, wanted
        super().__init__(
            f"VM {vm} may store {format_size(quota)}, has {format_size(used)}, and would add {format_size(wanted)}: "
            f"forget generations of it (`perdure forget`), or raise its quota (`perdure policy set`)"
        )


class StorageError(PerdureError):
    """The operating system refused an operation on a file. Attributes: `path`, `errno` (0 if unknown)."""

    def __init__(self, path: str, problem: str, *, errno: int = 0) -> None:
        self.path, self.errno = path, errno
        super().__init__(f"{path}: {problem}")

    @classmethod
    def from_os(cls, error: OSError, path: str, doing: str) -> StorageError:
        """Say which operation failed on which file."""
        return cls(path, f"cannot {doing}: {error.strerror or error}", errno=error.errno or 0)


class VirtualMachineError(PerdureError):
    """QEMU is missing, did not start, died, or refused a command. The message names the VM."""


class GuestError(PerdureError):
    """The guest answered with an error, broke the protocol, or did not answer in time."""


class WorkerError(PerdureError):
    """A worker process died or reported a failure; whatever it worked on was abandoned."""


def one_line(error: BaseException) -> str:
    """The first message of an error, or of the errors in a group, in one line."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(one_line(each) for each in error.exceptions)
    return " ".join(str(error).split()) or type(error).__name__


def explained(error: BaseException) -> str:
    """The same of any error: one that is not ours has no words for users, and says of what type it is."""
    return one_line(error) if isinstance(error, PerdureError) else f"{type(error).__name__}: {one_line(error)}"


def _rebuild(family: type[PerdureError], arguments: tuple[object, ...], facts: dict[str, object]) -> PerdureError:
    """An error that came from a worker process, with its facts."""
    error = family.__new__(family)
    error.args = arguments
    error.__dict__.update(facts)
    return error
