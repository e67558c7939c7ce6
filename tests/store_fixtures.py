"""Repositories for tests: real LMDB, real files, cheap Argon2."""

import os
import random
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from store.chunker import PackingSettings
from store.creation import create
from store.keyring.files import read_key_files
from store.keyring.layout import Argon2Parameters
from store.keyring.slots import new_keyring, unlock
from store.repository import Repository

PASSPHRASE = b"correct horse battery staple"
SETTINGS = PackingSettings(pack_bytes=1 << 20)
CHEAP = Argon2Parameters(time=1, memory_kib=64, lanes=1)


@cache
def _keyring():
    return new_keyring(PASSPHRASE, CHEAP)


class Place:
    """A repository and this host's state for it, in one temporary folder."""

    def __init__(self, root: Path, settings: PackingSettings | None) -> None:
        self.root, self.path, self.state = root, root / "repository", root / "state"
        if settings is not None:
            made = _keyring()
            create(self.path, made.files, made.keys, settings)

    @classmethod
    def at(cls, root: Path) -> "Place":
        """One that is there already."""
        return cls(root, None)

    def open(self, **options) -> Repository:
        """As another process on this host would open it."""
        return Repository(self.path, unlock(read_key_files(self.path), PASSPHRASE), self.state, **options)

    def elsewhere(self, **options) -> Repository:
        """As a host would open it that has never seen it."""
        state = Path(tempfile.mkdtemp(dir=self.root))
        return Repository(self.path, unlock(read_key_files(self.path), PASSPHRASE), state, **options)


@contextmanager
def place(settings: PackingSettings = SETTINGS):
    """A fresh repository, removed afterwards."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        yield Place(Path(root), settings)


@contextmanager
def memory_file(content: bytes):
    """A descriptor of a sparse file: whole zero pages are holes."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.ftruncate(file.fileno(), len(content))
        for at in range(0, len(content), 4096):
            piece = content[at : at + 4096]
            if any(piece):
                os.pwrite(file.fileno(), piece, at)
        yield file.fileno()


def add(repository, vm, regions, parent=None, dirty=None, cause="import"):
    """A generation from bytes by region name; `dirty` extents by region name."""
    with repository.writer(vm, parent) as writer:
        for name, content in regions.items():
            draft = writer.region(name, "image", len(content))
            with memory_file(content) as descriptor:
                writer.replace(draft, descriptor, (dirty or {}).get(name))
        return writer.commit(cause)


def index_made_anew(where) -> None:
    """Another process of this host throws the index away and fills it again, as `perdure repair` does."""
    code = (
        "import sys; from pathlib import Path; from store_fixtures import Place\n"
        "where = Place.at(Path(sys.argv[1]))\n"
        "with where.open() as repository: repository.environment.discard()\n"
        "with where.open(): pass\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    subprocess.run([sys.executable, "-c", code, str(where.root)], env={**os.environ, "PYTHONPATH": paths}, check=True)


def content(repository, generation, name) -> bytes:
    """A region through `restore` into a file, and the same through `read` and `verify`."""
    from store.reader import GenerationReader

    with GenerationReader(repository, generation) as reader, tempfile.TemporaryFile(dir="/dev/shm") as file:
        region = reader.region(name)
        os.ftruncate(file.fileno(), region.root.length)
        reader.restore(region, file.fileno(), "test")
        reader.verify(region, file.fileno(), "test")
        found = os.pread(file.fileno(), region.root.length + 1, 0)
        assert found == b"".join(reader.stream(region, 1 << 20))
        return found


def image(seed: int, pages: int) -> bytes:
    """A mix of zero, repeated, compressible and random pages; the last may be short."""
    rng = random.Random(seed)
    kinds = [
        lambda: bytes(4096),
        lambda: bytes([rng.randrange(4)]) * 4096,
        lambda: rng.randbytes(64) * 64,
        lambda: rng.randbytes(4096),
    ]
    data = b"".join(rng.choice(kinds)() for _ in range(pages))
    return data[: len(data) - rng.choice([0, 0, 100])] if pages else data
