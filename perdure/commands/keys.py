"""Commands about what opens a repository: key slots, rotation, and the public key with which it can be audited."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from base.errors import ConflictError, LockedError, NotFoundError, StorageError, UsageError
from base.units import format_size
from perdure import places
from perdure.commands.prune import rewrite, rewrite_text
from perdure.credentials import credential, new_credential
from perdure.opening import lock_wait_s, opened, repository_path
from perdure.output import Output, moment, table
from store.creation import read_mark
from store.history import History
from store.keyring.files import read_key_files
from store.keyring.keychain import Keychain, left_over, recognise
from store.keyring.layout import Argon2Parameters, SlotKind
from store.keyring.slots import Credential, NewSlot, SlotInfo, list_slots, newest

if TYPE_CHECKING:
    from store.storage import LocalStorage
    from store.upkeep.audit import Report

_PUBLIC_KEY_MOST = 64 << 10
_KINDS = {SlotKind.PASSPHRASE: "passphrase", SlotKind.KEY_FILE: "key file"}


def list_(options: Namespace) -> None:
    """`perdure key list`: without a passphrase, so it believes what stands there unless this host has seen more."""
    path = repository_path(options.repository)
    history = History(places.repository_state(read_mark(path)) / "history.json")  # before what it is compared with
    files = read_key_files(path)
    recognise(history, files)
    header, _ = newest(files)
    found = list_slots(files)
    stale = [name.rpartition("/")[2] for name in left_over(files)]
    document = {
        "repository": header.repository_id.hex(),
        "keyring": header.number,
        "epoch": header.epoch,
        "slots": [_slot(each) for each in found],
        "left_over": stale,
    }
    Output(options.json, options.quiet).result(document, lambda: _list_text(found, stale))


def add(options: Namespace) -> None:
    """`perdure key add`"""
    with _keychain(options) as chain:
        before = {each.slot_id for each in chain.slots()}
        chain.change(add=NewSlot(new_credential(options.new_key_file), options.label))
        (made,) = [each for each in chain.slots() if each.slot_id not in before]
        document = {**_slot(made), "keyring": chain.keys.header.number}
    Output(options.json, options.quiet).result(
        document, lambda: [f"added key slot {document['slot']}{_labelled(options.label)}"]
    )


def remove(options: Namespace) -> None:
    """`perdure key remove`"""
    with _keychain(options) as chain:
        gone = _resolve(chain.slots(), options.slot)
        keys = chain.change(remove=[gone.slot_id])
        document = {"removed": gone.slot_id.hex(), "keyring": keys.header.number, "slots": len(keys.header.slots)}
    Output(options.json, options.quiet).result(
        document,
        lambda: [
            f"removed key slot {document['removed']}; {document['slots']} left",
            "Whoever could open it may have kept the keys: `perdure key rotate` before anything more is written.",
        ],
    )


def change_passphrase(options: Namespace) -> None:
    """`perdure key change-passphrase`: the slot that was opened is replaced by one that the new passphrase opens."""
    with _keychain(options) as chain:
        own = chain.own
        if own.header is None or own.header.kind is not SlotKind.PASSPHRASE:
            raise UsageError(
                "this was unlocked with a key file: unlock with the passphrase that is to be changed, "
                "or use `perdure key add` and `perdure key remove`"
            )
        keys = chain.change(add=NewSlot(new_credential(), own.header.label), remove=[own.slot_id])
        document = {"slot": keys.slot_id.hex(), "replaced": own.slot_id.hex(), "keyring": keys.header.number}
    Output(options.json, options.quiet).result(
        document,
        lambda: [f"the passphrase was changed: key slot {document['slot']} stands in place of {document['replaced']}"],
    )


def rotate(options: Namespace) -> int:
    """`perdure key rotate`: what is written from now on has a new data key and a new signing key.

    The slot that was opened is made anew, so that it trusts the new signing key and no older one; nobody else's can be,
    since that takes his passphrase. With --rewrite packs of earlier epochs are sealed anew after that; --resume goes
    on with that alone, where it was cut off.
    """
    given = credential()
    output = Output(options.json, options.quiet)
    if options.resume:
        rewritten, code = _rewrite(options, given, output)
        output.result({"rewrite": rewritten}, lambda: rewrite_text(rewritten))
        return code
    with _keychain(options, given) as chain:
        own = chain.own
        label, parameters = (own.header.label, own.header.parameters) if own.header else ("", None)
        keys = chain.change(add=NewSlot(given, label, parameters), remove=[own.slot_id], rotate=True)
        outdated = [each.hex() for each in chain.outdated()]
        document = {
            "epoch": keys.current_epoch,
            "keyring": keys.header.number,
            "slot": keys.slot_id.hex(),
            "replaced": own.slot_id.hex(),
            "public_key": keys.public_key.hex(),
            "outdated_slots": outdated,
        }
    code = 0
    if options.rewrite:
        try:
            document["rewrite"], code = _rewrite(options, given, output)
        except LockedError as error:
            raise LockedError(f"epoch {document['epoch']} has begun, but nothing was sealed anew: {error}") from error
    output.result(document, lambda: _rotate_text(document, outdated))
    return code


def _rewrite(options: Namespace, given: Credential, output: Output) -> tuple[dict[str, Any], int]:
    with opened(repository_path(options.repository), given=given, progress=output.progress()) as repository:
        return rewrite(repository, lock_wait_s(0.0), output.progress())


def export_public(options: Namespace) -> None:
    """`perdure key export-public`: the newest public signing key; unlocking proves that it is the repository's."""
    from store.upkeep.audit import public_pem

    with _keychain(options) as chain:
        keys = chain.keys
    pem = public_pem(keys.public_key)
    identity = keys.repository_id.hex()
    if options.file:
        _write_new(Path(options.file), f"Perdure repository {identity}, epoch {keys.current_epoch}\n{pem}".encode())
    document = {
        "repository": identity,
        "epoch": keys.current_epoch,
        "public_key": keys.public_key.hex(),
        "pem": pem,
        "file": options.file,
    }
    text = f"wrote the public key of epoch {keys.current_epoch} to {options.file}" if options.file else pem.rstrip()
    Output(options.json, options.quiet and bool(options.file)).result(document, lambda: [text])


def audit(options: Namespace) -> int:
    """`perdure check --public-key`: what can be verified without a passphrase."""
    from store.storage import LocalStorage
    from store.upkeep import audit as audits

    output = Output(options.json, options.quiet)
    path = repository_path(options.repository)
    trusted = audits.public_from_pem(_read_public(Path(options.public_key)), options.public_key)
    if not (path / "config").exists():
        read_mark(path)  # says that there is none
    storage = LocalStorage(path)
    try:
        report = audits.audit(storage, trusted, partial(_memory, storage), progress=output.progress())
    finally:
        storage.close()
    document = {
        "clean": not report.findings,
        **msgspec.to_builtins(report),
        "not_verified": list(audits.NOT_VERIFIED),
    }
    output.result(document, lambda: _audit_text(report, audits.NOT_VERIFIED))
    return 3 if report.findings else 0


def _keychain(options: Namespace, given: Credential | None = None) -> Keychain:
    path = repository_path(options.repository)
    identity = read_mark(path)
    return Keychain(path, identity, given or credential(), places.repository_state(identity))


def _memory(storage: LocalStorage, repository_id: bytes) -> History:
    state = places.repository_state(repository_id)
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    return History(state / "history.json", storage.settle)


def _resolve(found: tuple[SlotInfo, ...], prefix: str) -> SlotInfo:
    """The slot whose id begins so. Raises UsageError, NotFoundError."""
    text = prefix.lower()
    if not re.fullmatch(r"[0-9a-f]{1,16}", text):
        raise UsageError(f"{prefix!r} is no key slot: write the beginning of its id, as `perdure key list` shows it")
    meant = [each for each in found if each.slot_id.hex().startswith(text)]
    if not meant:
        raise NotFoundError(f"no key slot has an id that begins with {prefix}: see `perdure key list`")
    if len(meant) > 1:
        raise UsageError(
            f"several key slots have ids that begin with {prefix}: {', '.join(each.slot_id.hex() for each in meant)}"
        )
    return meant[0]


def _slot(info: SlotInfo) -> dict[str, Any]:
    header = info.header
    if header is None:
        return {"slot": info.slot_id.hex(), "usable": False, "problem": info.problem}
    return {
        "slot": info.slot_id.hex(),
        "usable": True,
        "problem": None,
        "kind": _KINDS[header.kind],
        "label": header.label,
        "created": _created(header.created),
        "argon2id": {
            "memory_kib": header.parameters.memory_kib,
            "passes": header.parameters.time,
            "lanes": header.parameters.lanes,
        },
    }


def _created(seconds: int) -> str | None:
    """RFC 3339 in UTC, None for a time that no calendar has."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return None


def _list_text(found: tuple[SlotInfo, ...], stale: list[str]) -> Iterator[str]:
    rows = []
    for each in found:
        header = each.header
        if header is None:
            rows.append((each.slot_id.hex(), "-", "-", "-", f"NOT USABLE: {each.problem}"))
            continue
        created = _created(header.created)
        when = moment(created) if created else "-"
        rows.append((each.slot_id.hex(), _KINDS[header.kind], when, _cost(header.parameters), header.label))
    yield from table(("SLOT", "KIND", "CREATED", "ARGON2ID", "LABEL"), rows)
    for name in stale:
        yield f"{name} is in no keyring any more: the next change of keys deletes its file"


def _cost(parameters: Argon2Parameters) -> str:
    return f"{format_size(parameters.memory_kib << 10)}, {parameters.time} passes"


def _rotate_text(document: dict[str, Any], outdated: list[str]) -> Iterator[str]:
    yield f"epoch {document['epoch']} has begun; your key slot is now {document['slot']}"
    if outdated:
        yield (
            f"{len(outdated)} key slots of others still trust the signing key before: {', '.join(outdated)}. "
            "If that one was stolen, have them made anew (`perdure key change-passphrase`)"
        )
    if "rewrite" in document:
        yield from rewrite_text(document["rewrite"])


def _audit_text(report: Report, not_verified: tuple[str, ...]) -> Iterator[str]:
    for each in report.findings:
        place = each.object if each.offset is None else f"{each.object} at offset {each.offset}"
        yield f"damaged: {place}: {each.problem}"
    yield (
        f"{report.records} records, {report.generations} generations, keyring {report.keyring or 'unknown'}, "
        f"{report.slots} key slots: " + (f"{len(report.findings)} findings" if report.findings else "clean")
    )
    if report.left_over:
        yield f"in no keyring any more, deleted by the next change of keys: {', '.join(report.left_over)}"
    yield "not verified without a passphrase:"
    yield from (f"  {each}" for each in not_verified)


def _labelled(label: str) -> str:
    return f" ({label})" if label else ""


def _read_public(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_PUBLIC_KEY_MOST)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _write_new(path: Path, data: bytes) -> None:
    try:
        with path.open("xb") as file:
            file.write(data)
    except FileExistsError:
        raise ConflictError(f"{path} exists: remove it, or name another file") from None
    except OSError as error:
        raise StorageError.from_os(error, str(path), "write") from error
