"""`perdure export`: a region as a sparse raw file or a qcow2 image, or all memory of a full generation as an ELF core.

A file appears under its name only when it is whole.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

from base import extents as ranges
from base.disk import Disk
from base.errors import ConflictError, StorageError, UsageError
from base.units import format_size
from perdure import documents
from perdure.opening import opened, repository_path
from perdure.output import Output
from store.holes import Holes
from store.reader import GenerationReader
from store.records import Region
from vm.addresses import Span
from vm.config import DEVICES


def export(options: Namespace) -> None:
    """The command."""
    output = Output(options.json, options.quiet)
    _require_sense(options)
    with (
        opened(
            repository_path(options.repository), workers=options.file != "-", progress=output.progress()
        ) as repository,
        GenerationReader(repository, repository.resolve(options.point)) as reader,
    ):
        if options.format == "elf":
            _export_core(reader, options, output)
        elif options.format == "qcow2":
            _export_qcow2(reader, options, output)
        else:
            _export_raw(reader, options, output)


def _require_sense(options: Namespace) -> None:
    """Raises UsageError."""
    if options.format != "elf" and options.region is None:
        raise UsageError(f"which region of {options.point}? `perdure export {options.point} REGION {options.file}`")
    if options.file == "-" and options.json:
        raise UsageError("--json and an export to standard output exclude each other")
    if options.format == "elf" and options.region is not None:
        raise UsageError("an ELF core has all memory: leave out REGION")
    if options.format != "raw" and (options.file == "-" or options.partial):
        raise UsageError(f"--format {options.format} is for a file, and for a generation that is whole")


def _export_raw(reader: GenerationReader, options: Namespace, output: Output) -> None:
    generation, region = reader.generation, reader.region(options.region)
    holes = Holes(region.root) if options.partial else None
    if options.file == "-":
        for piece in reader.stream(region, holes=holes):
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        for line in _holes_text(holes):
            output.note(line)
        return

    def fill(descriptor: int) -> int:
        os.ftruncate(descriptor, region.root.length)
        return reader.restore(region, descriptor, options.file, output.progress(), holes)

    written = _write(Path(options.file), options, fill)
    document = {
        **documents.point(generation),
        "region": region.name,
        "file": options.file,
        "bytes": region.root.length,
        "written_bytes": written,
        "lost_bytes": 0 if holes is None else ranges.total(holes.extents),
        "holes": [] if holes is None else [[start, end - start] for start, end in holes.extents.tolist()],
    }
    text = f"{generation.name} {region.name}: {format_size(written)} of {format_size(region.root.length)} written"
    output.result(document, lambda: [f"{text} to {options.file}", *_holes_text(holes)])


def _export_core(reader: GenerationReader, options: Namespace, output: Output) -> None:
    """All memory at its guest-physical addresses, and the processors' registers."""
    from vm.elf_core import frame
    from vm.vmstate import processors

    generation = reader.generation
    spans = [Span(*each) for each in generation.metadata.get("addresses", ())]
    if not generation.full or not spans:
        raise ConflictError(
            f"{generation.name} does not have all memory and the processors' registers, which an ELF core is made of: "
            "`perdure snapshot --full` makes a generation that has"
        )
    regions = {name: reader.region(name) for name in dict.fromkeys(span.region for span in spans)}
    devices = reader.region(DEVICES)
    reader.require_whole(devices)
    state = reader.read(devices, 0, devices.root.length)
    lengths = {name: region.root.length for name, region in regions.items()}
    made = frame(spans, lengths, processors(state, f"generation {generation.name}"))

    def fill(descriptor: int) -> int:
        os.ftruncate(descriptor, made.size)
        os.pwrite(descriptor, made.head, 0)
        written = len(made.head)
        for name, region in regions.items():
            written += _place(reader, region, descriptor, made.places[name], options, output)
        return written

    written = _write(Path(options.file), options, fill)
    document = {
        **documents.point(generation),
        "file": options.file,
        "format": "elf",
        "bytes": made.size,
        "written_bytes": written,
        "addresses": [[span.region, span.address, span.size] for span in spans],
    }
    text = f"{generation.name}: {format_size(written)} of {format_size(made.size)} written"
    output.result(document, lambda: [f"{text} to {options.file}, an ELF core of all memory"])


def _export_qcow2(reader: GenerationReader, options: Namespace, output: Output) -> None:
    """A region as a sparse qcow2 image, made by qemu-img, which reads it from here."""
    from restore.images import write_qcow2

    generation, region = reader.generation, reader.region(options.region)
    reader.require_whole(region)

    def fill(descriptor: int) -> int:
        return write_qcow2(reader, region, descriptor, options.file, output.progress())

    written = _write(Path(options.file), options, fill)
    document = {
        **documents.point(generation),
        "region": region.name,
        "file": options.file,
        "format": "qcow2",
        "bytes": region.root.length,
        "written_bytes": written,
    }
    text = f"{generation.name} {region.name}: {format_size(region.root.length)} as a qcow2 image of"
    output.result(document, lambda: [f"{text} {format_size(written)} in {options.file}"])


def _place(
    reader: GenerationReader, region: Region, descriptor: int, at: int, options: Namespace, output: Output
) -> int:
    return reader.restore(region, descriptor, options.file, output.progress(), at=at)


def _write(path: Path, options: Namespace, fill: Callable[[int], int]) -> int:
    """Write beside the target and rename, so that an export that was broken off never has its name.

    Only with --sync does it wait for the disk, as cp(1) does not either: the repository still has the content.
    """
    if path.exists() and not options.force:
        raise ConflictError(f"{path} exists: remove it, or use --force")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.perdure")
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError.from_os(error, str(path), "create") from error
    try:
        try:
            written = fill(descriptor)
            if options.sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.rename(path)
        if options.sync:
            Disk().fsync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError.from_os(error, str(path), "write") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return written


def _holes_text(holes: Holes | None) -> Iterator[str]:
    """What a partial export lacks."""
    if holes is not None and len(holes.extents):
        yield f"lost: {format_size(ranges.total(holes.extents))} in {len(holes.extents)} ranges, which are zeros:"
        for start, end in holes.extents.tolist():
            yield f"  {start:#014x}  {format_size(end - start)}"
