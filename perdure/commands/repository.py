"""Commands that need a repository and no running VM."""

from __future__ import annotations

import os
import re
import stat
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from base import extents as ranges
from base.disk import Disk
from base.errors import ConflictError, NotFoundError, UsageError
from base.extents import Extents
from base.units import PAGE, format_size
from perdure import documents
from perdure.commands import graph
from perdure.credentials import credential
from perdure.opening import opened, repository_path
from perdure.output import Output, moment, size, table
from store.chunker import PackingSettings
from store.records import Generation

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def init(options: Namespace) -> None:
    """`perdure init`"""
    from store.creation import create
    from store.keyring.slots import new_keyring
    from store.upkeep import reserve

    path = repository_path(options.repository)
    if not -7 <= options.compression_level <= 19 or not options.compression_level:
        raise UsageError("--compression-level is 1 to 19, or -1 to -7")
    if not 4 <= options.frame_size <= 4096:
        raise UsageError("--frame-size is 4 to 4096 KiB")
    if (path / "config").exists():
        raise ConflictError(f"{path} is a repository already")
    given = credential(new=True)
    made = new_keyring(given)
    create(
        path,
        made.files,
        made.keys,
        PackingSettings(level=options.compression_level, frame_bytes=options.frame_size << 10),
    )
    reserve.make(path, Disk())  # where there is no room for it, there is none to be set aside
    identity = made.keys.repository_id.hex()
    what = "passphrase" if isinstance(given, bytes) else "key file"
    _output(options).result(
        {"repository": str(path), "id": identity},
        lambda: [f"made repository {identity[:16]} at {path}", f"Keep the {what}: without it nothing can be read."],
    )


def import_(options: Namespace) -> None:
    """`perdure import`"""
    output = _output(options)
    if not _NAME.fullmatch(options.vm):
        raise UsageError(f"{options.vm!r} is no VM name: letters, digits, . _ - and at most 64 of them")
    files = _pairs(options.regions, "REGION=FILE")
    dirty = {name: _read_ranges(Path(file)) for name, file in _pairs(options.dirty, "REGION=RANGES.json").items()}
    for name in dirty:
        if name not in files:
            raise UsageError(f"--dirty {name}: no file is given for that region")
    if dirty and not options.parent:
        raise UsageError("--dirty needs --parent VM@N: the ranges say what changed since that generation")
    opened_files = {name: _open_source(Path(file)) for name, file in files.items()}
    try:
        large = any(name not in dirty and ranges.length(each) > 16 << 20 for name, each in opened_files.items())
        path = repository_path(options.repository)
        with opened(path, workers=large, progress=output.progress()) as repository:
            parent = repository.resolve(options.parent) if options.parent else None
            if parent is not None and parent.vm != options.vm:
                raise UsageError(f"--parent {options.parent} is a generation of VM {parent.vm}, not of {options.vm}")
            with repository.writer(options.vm, parent) as writer:
                for name, descriptor in opened_files.items():
                    if name in dirty and (parent is None or name not in parent.regions):
                        raise UsageError(f"--dirty {name}: {options.parent} has no region {name} to apply ranges to")
                    length = ranges.length(descriptor)
                    draft = writer.region(name, "image", length)
                    extents = _within(dirty.get(name), length, name)
                    if draft.anew and extents is not None:
                        output.note(f"{options.parent} has lost something of {name}: all of {files[name]} is read")
                        extents = None
                    writer.replace(draft, descriptor, extents, output.progress())
                generation = writer.commit("import", tags=tuple(options.tag))
                seconds = time.monotonic() - repository.since
    finally:
        for descriptor in opened_files.values():
            os.close(descriptor)
    forgotten = writer.forgotten
    output.result(
        documents.made(generation, seconds, forgotten), lambda: documents.made_text(generation, seconds, forgotten)
    )


def log(options: Namespace) -> None:
    """`perdure log`"""
    output = _output(options)
    with opened(repository_path(options.repository), progress=output.progress()) as repository:
        names = [options.vm] if options.vm else repository.vms()
        found = [generation for name in names for generation in repository.generations(name)]
        parents = {each.id: each.name for each in found}
        for parent in {each.parent for each in found if each.parent}.difference(parents):
            with suppress(NotFoundError):  # forgotten
                parents[parent] = repository.resolve(parent).name  # of a VM that this one was cloned from
    document = [
        documents.generation(each) | {"parent_name": None if each.parent is None else parents.get(each.parent)}
        for each in found
    ]
    output.result({"generations": document}, lambda: _graph_text(found) if options.graph else _log_text(found))


def show(options: Namespace) -> None:
    """`perdure show`"""
    output = _output(options)
    with opened(repository_path(options.repository), progress=output.progress()) as repository:
        generation = repository.resolve(options.point)
    output.result(documents.generation(generation, full=True), lambda: documents.generation_text(generation))


def diff(options: Namespace) -> None:
    """`perdure diff`"""
    output = _output(options)
    with opened(repository_path(options.repository), progress=output.progress()) as repository:
        a, b = repository.resolve(options.a), repository.resolve(options.b)
        changed = repository.changed(a, b)
    document = {
        "a": documents.point(a),
        "b": documents.point(b),
        "regions": {
            name: {
                "changed_bytes": ranges.total(each),
                "ranges": [[start, end - start] for start, end in each.tolist()],
            }
            for name, each in changed.items()
        },
    }
    output.result(document, lambda: _diff_text(changed))


def _graph_text(found: list[Generation]) -> list[str]:
    """The table of `_log_text`, newest first, with the drawing before it."""
    header, *lines = _log_text(found)
    line_of = {each.id: line for each, line in zip(found, lines, strict=True)}
    drawn = list(graph.rows(found))
    width = max((len(drawing) for drawing, _ in drawn), default=0)
    return [
        f"{'':<{width}}  {header}",
        *(f"{drawing:<{width}}  {line_of[each.id] if each else ''}".rstrip() for drawing, each in drawn),
    ]


def _log_text(found: list[Generation]) -> list[str]:
    rows: list[tuple[str, ...]] = [
        (
            each.name,
            each.id[:12],
            moment(each.time),
            f"{each.cause}, full" if each.full else each.cause,
            size(each.region_bytes),
            size(each.dirty_bytes),
            size(each.stored_bytes),
            ",".join(each.tags),
            f"{size(sum(each.hurt.values()))} lost" if each.hurt else "",
        )
        for each in found
    ]
    header: tuple[str, ...] = ("GENERATION", "ID", "TIME", "CAUSE", "KEPT", "CHANGED", "STORED", "TAGS", "HURT")
    if not any(each.hurt for each in found):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return table(header, rows, right="KEPT CHANGED STORED")


def _diff_text(changed: dict[str, Extents]) -> Iterator[str]:
    for name, each in changed.items():
        yield f"{name}: {format_size(ranges.total(each))} in {len(each)} ranges"
        for start, end in each.tolist():
            yield f"  {start:#014x}  {format_size(end - start)}"


def _pairs(words: list[str], form: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for word in words:
        name, equals, file = word.partition("=")
        if not equals or not _NAME.fullmatch(name) or not file:
            raise UsageError(f"{word!r}: write {form}")
        if name in pairs:
            raise UsageError(f"region {name} is given twice")
        pairs[name] = file
    return pairs


def _open_source(path: Path) -> int:
    """Open a regular file or a block device. Raises UsageError for anything else: only these have a size."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)  # a FIFO would wait
        mode = os.fstat(descriptor).st_mode
        empty = stat.S_ISBLK(mode) and not ranges.length(descriptor)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if empty:
        raise UsageError(f"cannot read {path}: there is nothing in this block device")
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise UsageError(f"cannot read {path}: it is neither a regular file nor a block device")
    return descriptor


def _read_ranges(path: Path) -> list[tuple[int, int]]:
    """[[offset, length], ...] in bytes. Raises UsageError."""
    try:
        rows = msgspec.json.decode(path.read_bytes(), type=list[tuple[int, int]])
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise UsageError(f"{path}: not a list of [offset, length]: {error}") from error
    for offset, length in rows:
        if offset < 0 or length < 0 or offset + length >= 1 << 62:
            raise UsageError(f"{path}: [{offset}, {length}] is no range of bytes")
    return rows


def _within(rows: list[tuple[int, int]] | None, length: int, name: str) -> Extents | None:
    """Ranges as extents. Raises UsageError for one beyond the file: it is about another image."""
    if rows is None:
        return None
    extents = ranges.normalise([(offset, offset + count) for offset, count in rows])
    if len(extents) and int(extents[-1, 1]) > -(-length // PAGE) * PAGE:
        raise UsageError(f"--dirty {name}: a range ends at {int(extents[-1, 1])}, past the file's {length} bytes")
    return extents


def _output(options: Namespace) -> Output:
    return Output(options.json, options.quiet)
