"""The on-disk format of packs, frames, records and the repository's mark: magics, layouts, pure encoders and decoders.

All integers are little-endian. Sealed parts are nonce (12), ciphertext, tag (16): see store.keyring.keys. The format of
key slots and keyrings stands in store.keyring.layout. docs/FORMAT.md carries these tables; a test compares them.

REPOSITORY  file `config`
    offset size  field
         0    8  magic "PERDREPO"
         8    2  format version, 1
        10    6  zero
        16   16  repository id, random

PACK  files `packs/<pack id in hex>`
    offset size  field
         0    8  magic "PERDPACK"
         8    2  format version, 1
        10    1  kind: 1 data chunks, 2 page-map nodes
        11    1  zero
        12    4  epoch of the data key
        16   16  pack id, random
        32   32  salt of the pack's key
        64    n  frames, one after the other: length of the sealed part (4), sealed frame
      64+n    m  footer, sealed with number 0xFFFFFFFF
    64+n+m   16  trailer: length of the sealed footer (4), number of frames (4), magic "PERDPEND"
Frames are numbered from 0 and sealed with kind = that of the pack, object id = pack id.

FRAME  (plaintext, before sealing)
    offset size  field
         0    1  codec: 0 raw, 1 zstd
         1    1  zero
         2    2  number of chunks, c
         4    4  bytes of a chunk
         8 32*c  chunk ids
    8+32*c    p  payload: the chunks one after the other, compressed together

FOOTER  (plaintext, before sealing)
    offset size  field
         0    4  number of frames, f
         4    4  number of chunks in all, c
         8  4*f  where each frame begins in the pack: offset of the length before it
     8+4*f  2*f  number of chunks in each frame
     8+6*f 32*c  chunk ids, in order of frames and slots

RECORD  files `records/<sequence, 12 digits>`
    offset size  field
         0    8  magic "PERDRECD"
         8    2  format version, 1
        10    1  kind: 1 genesis, 2 generation, 3 tombstone, 4 attributes, 5 doom, 6 swap, 7 policy, 8 hurt
        11    1  zero
        12    4  epoch of the data key
        16    8  repository sequence, from 1
        24   32  BLAKE3 of the whole previous record; zero in the first
        56   16  VM id, random; zero where no VM is meant
        72    8  generation number in the VM, from 1; 0 where none is meant
        80   32  id of the parent generation; zero if there is none
       112   32  salt of the record's key
       144    4  length of the sealed body, n
       148    n  body: JSON (UTF-8), sealed with kind 16, number = sequence, object id = VM id
     148+n   64  Ed25519 signature of everything before it
The id of a generation is the BLAKE3 of its whole record.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from base.errors import IntegrityError
from store.keyring.layout import SIGNATURE_BYTES, VERSION, require_magic

ID_BYTES = 32
ZERO_ID = bytes(ID_BYTES)

CONFIG_MAGIC, PACK_MAGIC, PACK_END_MAGIC, RECORD_MAGIC = b"PERDREPO", b"PERDPACK", b"PERDPEND", b"PERDRECD"
CONFIG = struct.Struct("<8sH6x16s")
PACK_HEADER = struct.Struct("<8sHBxI16s32s")
PACK_TRAILER = struct.Struct("<II8s")
FRAME_LENGTH = struct.Struct("<I")
FRAME_HEADER = struct.Struct("<BxHI")
FOOTER_HEADER = struct.Struct("<II")
RECORD_HEADER = struct.Struct("<8sHBxIQ32s16sQ32s32sI")

PACK_DATA, PACK_NODES = 1, 2
CODEC_RAW, CODEC_ZSTD = 0, 1
FOOTER_NUMBER = 0xFFFFFFFF
RECORD_GENESIS, RECORD_GENERATION, RECORD_TOMBSTONE, RECORD_ATTRIBUTES, RECORD_DOOM, RECORD_SWAP = 1, 2, 3, 4, 5, 6
RECORD_POLICY = 7
RECORD_HURT = 8
SEALED_RECORD = 16
"""Kind under which record bodies are sealed; the kinds of packs stand for their frames and footers."""

MAX_FRAME = 16 << 20
"""A sealed frame longer than this is damage, not data: bounds what a reader allocates."""
MAX_FOOTER = 256 << 20
"""Of a sealed footer: ids of 8 million chunks."""
MAX_BODY = 256 << 20


@dataclass(frozen=True, slots=True)
class PackHeader:
    """Clear header of a pack."""

    kind: int
    epoch: int
    pack_id: bytes
    salt: bytes


@dataclass(frozen=True, slots=True)
class PackFooter:
    """What a pack holds. `offsets` uint32 (f,), `counts` uint16 (f,), `ids` uint8 (c, 32)."""

    offsets: NDArray[np.uint32]
    counts: NDArray[np.uint16]
    ids: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Frame:
    """A decoded frame header; `payload` is still compressed if `codec` says so."""

    codec: int
    chunk_size: int
    ids: NDArray[np.uint8]
    payload: memoryview


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """Clear header of a record."""

    kind: int
    epoch: int
    sequence: int
    previous: bytes
    vm_id: bytes
    number: int
    parent: bytes
    salt: bytes


def encode_config(repository_id: bytes) -> bytes:
    """The file that marks a folder as a repository."""
    return CONFIG.pack(CONFIG_MAGIC, VERSION, repository_id)


def decode_config(data: bytes, name: str) -> bytes:
    """The repository id. Raises IntegrityError, FormatVersionError."""
    require_magic(data, CONFIG_MAGIC, name, CONFIG.size)
    return bytes(CONFIG.unpack_from(data)[2])


def encode_pack_header(header: PackHeader) -> bytes:
    """64 bytes."""
    return PACK_HEADER.pack(PACK_MAGIC, VERSION, header.kind, header.epoch, header.pack_id, header.salt)


def decode_pack_header(data: bytes, name: str) -> PackHeader:
    """Raises IntegrityError, FormatVersionError."""
    require_magic(data, PACK_MAGIC, name, PACK_HEADER.size)
    _, _, kind, epoch, pack_id, salt = PACK_HEADER.unpack_from(data)
    if kind not in (PACK_DATA, PACK_NODES):
        raise IntegrityError(name, f"unknown kind of pack {kind}", offset=10)
    return PackHeader(kind, epoch, pack_id, salt)


def encode_pack_trailer(footer_bytes: int, frames: int) -> bytes:
    """16 bytes that end a complete pack."""
    return PACK_TRAILER.pack(footer_bytes, frames, PACK_END_MAGIC)


def decode_pack_trailer(data: bytes, size: int, name: str) -> tuple[int, int]:
    """(offset of the sealed footer, its length). `data` is the pack's last 16 bytes, `size` its length."""
    length, _, magic = PACK_TRAILER.unpack(data) if len(data) == PACK_TRAILER.size else (0, 0, b"")
    offset = size - PACK_TRAILER.size - length
    if magic != PACK_END_MAGIC or offset < PACK_HEADER.size or length > MAX_FOOTER:
        raise IntegrityError(name, "truncated or damaged: its trailer is not that of a complete pack", offset=size)
    return offset, length


def encode_frame(codec: int, chunk_size: int, ids: bytes, payload: bytes | memoryview) -> bytes:
    """Plaintext of a frame; `ids` are the chunk ids one after the other."""
    return b"".join((FRAME_HEADER.pack(codec, len(ids) // ID_BYTES, chunk_size), ids, payload))


def decode_frame(data: bytes, name: str, offset: int) -> Frame:
    """The parts of an opened frame, which was authenticated before: what is wrong here was written wrong."""
    if len(data) >= FRAME_HEADER.size:
        codec, count, chunk_size = FRAME_HEADER.unpack_from(data)
        start = FRAME_HEADER.size + count * ID_BYTES
        if codec in (CODEC_RAW, CODEC_ZSTD) and start <= len(data) and 0 < count * chunk_size <= MAX_FRAME:
            ids = np.frombuffer(data, np.uint8, count * ID_BYTES, FRAME_HEADER.size).reshape(count, ID_BYTES)
            return Frame(codec, chunk_size, ids, memoryview(data)[start:])
    raise IntegrityError(name, "frame header makes no sense", offset=offset)


def encode_footer(footer: PackFooter) -> bytes:
    """Plaintext of a pack's footer."""
    return b"".join(
        (
            FOOTER_HEADER.pack(len(footer.offsets), len(footer.ids)),
            footer.offsets.astype("<u4").tobytes(),
            footer.counts.astype("<u2").tobytes(),
            footer.ids.tobytes(),
        )
    )


def decode_footer(data: bytes, name: str) -> PackFooter:
    """Raises IntegrityError."""
    if len(data) >= FOOTER_HEADER.size:
        frames, chunks = FOOTER_HEADER.unpack_from(data)
        if len(data) == FOOTER_HEADER.size + 6 * frames + ID_BYTES * chunks:
            offsets = np.frombuffer(data, "<u4", frames, FOOTER_HEADER.size).astype(np.uint32)
            counts = np.frombuffer(data, "<u2", frames, FOOTER_HEADER.size + 4 * frames).astype(np.uint16)
            ids = np.frombuffer(data, np.uint8, chunks * ID_BYTES, FOOTER_HEADER.size + 6 * frames)
            ascending = bool((offsets[1:] > offsets[:-1]).all()) and (not frames or offsets[0] == PACK_HEADER.size)
            if int(counts.sum()) == chunks and ascending:
                return PackFooter(offsets, counts, ids.reshape(chunks, ID_BYTES))
    raise IntegrityError(name, "the pack's footer makes no sense")


def encode_record_header(header: RecordHeader, sealed_bytes: int) -> bytes:
    """148 bytes."""
    return RECORD_HEADER.pack(
        RECORD_MAGIC,
        VERSION,
        header.kind,
        header.epoch,
        header.sequence,
        header.previous,
        header.vm_id,
        header.number,
        header.parent,
        header.salt,
        sealed_bytes,
    )


def decode_record(data: bytes, name: str) -> tuple[RecordHeader, bytes, bytes]:
    """(header, sealed body, signature); the signature covers `data[:-64]`.

    Raises IntegrityError, FormatVersionError.
    """
    require_magic(data, RECORD_MAGIC, name, RECORD_HEADER.size)
    _, _, kind, epoch, sequence, previous, vm_id, number, parent, salt, length = RECORD_HEADER.unpack_from(data)
    if len(data) != RECORD_HEADER.size + length + SIGNATURE_BYTES or length > MAX_BODY:
        raise IntegrityError(name, f"record of {len(data)} bytes is truncated or damaged", offset=144)
    header = RecordHeader(kind, epoch, sequence, previous, vm_id, number, parent, salt)
    return header, data[RECORD_HEADER.size : -SIGNATURE_BYTES], data[-SIGNATURE_BYTES:]


def record_kind(data: bytes, name: str) -> int:
    """Kind of a record, from its clear header alone. Raises IntegrityError, FormatVersionError."""
    require_magic(data, RECORD_MAGIC, name, RECORD_HEADER.size)
    return int(RECORD_HEADER.unpack_from(data)[2])


def record_id(data: bytes) -> bytes:
    """BLAKE3 of a whole record: the link of the chain, and the id of a generation."""
    return blake3(data).digest()


def pack_name(pack_id: bytes) -> str:
    """Storage name of a pack."""
    return f"packs/{pack_id.hex()}"


def record_name(sequence: int) -> str:
    """Storage name of a record."""
    return f"records/{sequence:012d}"
