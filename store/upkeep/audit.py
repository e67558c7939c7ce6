"""Auditing a repository with nothing but a public key: no passphrase, no index, nothing written into the repository.

What is proven, if there are no findings: the newest keyring stands in the chain of signing keys that the trusted public
key belongs to, and so do all keyrings before it that are still there; the files of its slots are the ones that it
names; records are numbered without gaps, each names the hash of the one before and is signed by the signing key of its
epoch, epochs never go back, generations are numbered upwards and follow generations that stand earlier. With a memory
of what this host has seen: that neither keyrings nor records went back. What needs keys is in NOT_VERIFIED.

Belongs to one thread; reads one record at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from base.errors import FormatVersionError, IntegrityError, UsageError
from base.progress import Progress, silent
from store import format as layout
from store.history import History
from store.keyring import layout as format_keys
from store.keyring import slots
from store.keyring.files import key_files
from store.keyring.keychain import left_over, recognise
from store.keyring.keys import Keys, signer_of
from store.keyring.layout import SIGNATURE_BYTES, KeyringHeader
from store.records import replaced_keys, unknown_epoch
from store.storage import Storage
from store.upkeep.findings import Finding

NOT_VERIFIED = (
    "content of packs and page maps, and whether packs are there at all",
    "bodies of records: names, times, tags, sizes",
    "whether any passphrase or key file still opens a slot",
    "that newer records or keyrings were removed, unless this host has seen them",
)
"""What an audit cannot say; `perdure check --read-data`, with a passphrase, says the first two."""

_RECORD = re.compile(r"records/[0-9]{12}")
_RECORD_MOST = layout.RECORD_HEADER.size + layout.MAX_BODY + SIGNATURE_BYTES


@dataclass(slots=True)
class Report:
    """Result of an audit; clean if there are no findings.

    `repository_id`, `signing_keys` (oldest first, hex), `keyring` and `epoch` are None and empty if no keyring could be
    trusted; then no signature of a record was checked. `last`: hash of the newest record, hex. `left_over`: files of
    slots that the keyring does not name; harmless, but a removed passphrase may still open old keyrings with them.
    """

    findings: list[Finding] = field(default_factory=list)
    repository_id: str | None = None
    signing_keys: tuple[str, ...] = ()
    keyring: int | None = None
    epoch: int | None = None
    slots: int = 0
    records: int = 0
    generations: int = 0
    last: str | None = None
    left_over: tuple[str, ...] = ()


def public_pem(public_key: bytes) -> str:
    """An Ed25519 public key in the form that openssl and others read too (SubjectPublicKeyInfo, RFC 8410)."""
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return Ed25519PublicKey.from_public_bytes(public_key).public_bytes(encoding, form).decode()


def public_from_pem(data: bytes, name: str) -> bytes:
    """The 32 bytes; `name` is for errors. Raises UsageError."""
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{name} holds no public key: make one with `perdure key export-public`") from error
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"{name} holds a public key of another kind than Ed25519: it is not that of a repository")
    return key.public_bytes_raw()


def audit(
    storage: Storage, trusted: bytes, memory: Callable[[bytes], History] | None = None, *, progress: Progress = silent
) -> Report:
    """Verify what can be verified with a public key that was exported from this repository.

    `memory`, given the repository id, is what this host has seen of it; it learns what was proven. Raises StorageError
    where the system refuses to read.
    """
    report = Report()
    marked = _marked(storage, report)
    history = memory(marked) if memory is not None and marked is not None else None  # knows nothing newer than is there
    listed = list(storage.list("records"))  # before the keyring: no record here is of a later epoch than it knows
    work = _Audit(storage, trusted, report, progress)
    work.keyrings(marked)
    work.records(listed)
    if history is not None and work.keyring is not None:
        work.recognise(history)
        if not report.findings:
            history.advance(*work.newest)
    return report


def _marked(storage: Storage, report: Report) -> bytes | None:
    """The repository id that the mark says, None if it is damaged."""
    try:
        data = storage.get_range("config", 0, layout.CONFIG.size + 1)
        found = layout.decode_config(data, "config")
        if data != layout.encode_config(found):
            raise IntegrityError("config", "damaged header")
        return found
    except (IntegrityError, FormatVersionError) as error:
        report.findings.append(_finding("repository", error))
        return None


def _finding(kind: str, error: IntegrityError | FormatVersionError) -> Finding:
    offset = error.offset if isinstance(error, IntegrityError) else None
    problem = error.problem if isinstance(error, IntegrityError) else str(error).removeprefix(f"{error.object}: ")
    return Finding(kind, error.object, offset, problem, (), ())


class _Audit:
    def __init__(self, storage: Storage, trusted: bytes, report: Report, progress: Progress) -> None:
        self._storage, self._trusted, self._progress = storage, trusted, progress
        self._files = key_files(storage)
        self.report = report
        self.keyring: KeyringHeader | None = None
        """The newest keyring, if it is trusted."""
        self.newest = 0, layout.ZERO_ID
        """Sequence and hash of the last record, if it was verified."""
        self._epoch = 0
        self._highest: dict[bytes, int] = {}
        self._known: set[bytes] = set()

    def keyrings(self, marked: bytes | None) -> None:
        """The newest keyring by the trusted key, those before it by their hashes, and the slots that it names."""
        report = self.report
        try:
            newest, name = slots.newest(self._files)
            slots.require_trusted(newest, self._trusted, name)
        except (IntegrityError, FormatVersionError) as error:
            self._found("keyring", error)
            return
        self.keyring = newest
        if marked not in (None, newest.repository_id):
            self._found(
                "repository", IntegrityError("config", "belongs to another repository than the keyring beside it")
            )
        report.repository_id, report.keyring, report.epoch = newest.repository_id.hex(), newest.number, newest.epoch
        report.signing_keys = tuple(each.public_key.hex() for each in newest.signing_keys)
        report.slots = len(newest.slots)
        at = newest
        while at.number > 1:
            before = format_keys.keyring_name(at.number - 1)
            try:
                if before not in self._files:
                    raise IntegrityError(before, "is missing: what came before cannot be proven")
                at = slots.require_successor(self._files[before], at)
            except (IntegrityError, FormatVersionError) as error:
                self._found("keyring", error)
                break
        report.left_over = tuple(left_over(self._files))
        for info in slots.list_slots(self._files):
            if info.problem is not None:
                name = format_keys.slot_name(info.slot_id)
                self._found("slot", IntegrityError(name, info.problem.removeprefix(f"{name}: ")))

    def recognise(self, history: History) -> None:
        """That this host has seen nothing newer, and nothing else in its place."""
        try:
            recognise(history, self._files)
        except (IntegrityError, FormatVersionError) as error:
            self._found("keyring", error)
        try:
            history.check(self._hash_of)
        except IntegrityError as error:
            self._found("record", error)

    def records(self, listed: list[str]) -> None:
        """Every record's place, signature, link and epoch."""
        names = sorted(each for each in listed if _RECORD.fullmatch(each))
        for stranger in sorted(set(listed) - set(names)):
            self._found("record", IntegrityError(stranger, "is no name of a record"))
        previous: bytes | None = layout.ZERO_ID
        expected = 1
        for name in names:
            sequence = int(name.rpartition("/")[2])
            if sequence != expected:
                count = sequence - expected
                missing = "is missing" if count == 1 else f"and {count - 1} after it are missing"
                self._found(
                    "record", IntegrityError(layout.record_name(expected), f"{missing}, though {name} is there")
                )
                previous = None
            try:
                previous = self._record(name, sequence, previous)
            except (IntegrityError, FormatVersionError) as error:
                self._found("record", error)
                previous = None  # the next one's link cannot be held against it
            expected = sequence + 1
            self.report.records += 1
            self._progress("checking records", sequence, max(sequence, len(names)))
        if not names:
            self._found("record", IntegrityError(layout.record_name(1), "is missing: there is no history"))
        elif previous is not None:
            self.newest = expected - 1, previous
            self.report.last = previous.hex()

    def _record(self, name: str, sequence: int, previous: bytes | None) -> bytes:
        """The hash of a record that is authentic; what is wrong with its place is found all the same."""
        if self._storage.size(name) > _RECORD_MOST:
            raise IntegrityError(name, "is longer than any record")
        data = self._storage.get(name)
        header, _, signature = layout.decode_record(data, name)
        if self.keyring is not None:
            if header.epoch > self.keyring.epoch:
                raise IntegrityError(name, unknown_epoch(header.epoch, self.keyring.epoch))
            signer = signer_of(self.keyring.signing_keys, header.epoch)
            Keys.verify(signer, memoryview(data)[:-SIGNATURE_BYTES], signature, name)
        record_id = layout.record_id(data)
        self._known |= {record_id, header.previous}  # that one may be damaged, and a parent all the same
        if header.sequence != sequence:
            raise IntegrityError(name, f"holds record {header.sequence}: history was reordered")
        for problem in self._misplaced(header, previous):
            self._found("record", IntegrityError(name, problem))
        self._epoch = max(self._epoch, header.epoch)
        if header.kind == layout.RECORD_GENERATION:
            self.report.generations += 1
            self._highest[header.vm_id] = max(header.number, self._highest.get(header.vm_id, 0))
        return record_id

    def _misplaced(self, header: layout.RecordHeader, previous: bytes | None) -> Iterator[str]:
        """What contradicts the records before."""
        if previous is not None and header.previous != previous:
            yield "does not follow the record before it: history was changed"
        if header.epoch < self._epoch:
            yield replaced_keys(header.epoch, self._epoch)
        if (header.kind == layout.RECORD_GENESIS) != (header.sequence == 1):
            yield (
                "begins a history in the middle of one" if header.sequence > 1 else "is not the beginning of a history"
            )
        if header.kind == layout.RECORD_GENERATION:
            if header.number <= self._highest.get(header.vm_id, 0):
                yield f"uses generation number {header.number} again"
            if header.parent != layout.ZERO_ID and header.parent not in self._known:
                yield "its parent generation does not stand before it"

    def _hash_of(self, sequence: int) -> bytes | None:
        name = layout.record_name(sequence)
        if not self._storage.exists(name) or self._storage.size(name) > _RECORD_MOST:
            return None
        return layout.record_id(self._storage.get(name))

    def _found(self, kind: str, error: IntegrityError | FormatVersionError) -> None:
        self.report.findings.append(_finding(kind, error))
