"""Making a repository, and the mark by which a folder is known as one."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from base.disk import Disk
from base.errors import (
    ConflictError,
    RepositoryMissingError,
)
from store import format as layout
from store.chunker import PackingSettings
from store.keyring.keys import Keys
from store.records import (
    GenesisBody,
    encode_record,
    now,
)
from store.storage import LocalStorage, ObjectMissingError


def create(
    path: Path, files: dict[str, bytes], keys: Keys, settings: PackingSettings, disk: Disk | None = None
) -> None:
    """Make a repository in a folder that does not exist or is empty. `files` are its key slot and keyring.

    It is complete before its mark `config` is published: what is left by a crash before that is no repository.
    Raises ConflictError (something is there), StorageError.
    """
    if (path / "config").exists():
        raise ConflictError(f"{path} is a repository already")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConflictError(f"{path} is not an empty folder: choose another place for the repository")
    made = not path.exists()
    storage = LocalStorage(path, disk)
    try:
        for folder in reversed([each for each in (path, *path.parents) if not each.exists()]):
            storage.disk.mkdir(folder)
            storage.disk.fsync_directory(folder.parent)
        storage.make_folders()
        for name, data in files.items():
            storage.put(name, data)
        genesis = GenesisBody(
            time=now(), level=settings.level, frame_bytes=settings.frame_bytes, pack_bytes=settings.pack_bytes
        )
        record = encode_record(keys, layout.RECORD_GENESIS, 1, layout.ZERO_ID, genesis)
        storage.put(layout.record_name(1), record)
        storage.put("config", layout.encode_config(keys.repository_id))
    except BaseException:
        _remove_made(path, keep=not made)
        raise


def read_mark(path: Path) -> bytes:
    """The repository id. Raises RepositoryMissingError, IntegrityError, FormatVersionError."""
    storage = LocalStorage(path)
    try:
        data = storage.get_range("config", 0, layout.CONFIG.size + 1)
    except ObjectMissingError:
        raise RepositoryMissingError(f"no repository at {path}: make one with `perdure -r {path} init`") from None
    finally:
        storage.close()
    return layout.decode_config(data, str(path / "config"))


def _remove_made(path: Path, *, keep: bool) -> None:
    """Undo a half-made repository, in a folder that was not there or empty."""
    with suppress(OSError):
        (path / "config").unlink(missing_ok=True)  # first: what has it is a repository
        for folder in LocalStorage.FOLDERS:
            if (path / folder).exists():
                for each in (path / folder).iterdir():
                    each.unlink()
                (path / folder).rmdir()
        for each in path.iterdir():  # the mark under its temporary name
            each.unlink()
        if not keep:
            path.rmdir()
