"""Read all of an index file in a process that may die of it: python -m store.index.probe PATH, MAC key on stdin.

Status 0: it can be trusted. Otherwise a line on stdout says why not, or a signal does. First the file's structure
is verified without mapping it (lmdb.verify: every page reachable once, in order, counted, and free pages disjoint
from those in use, which a later writer depends on); then LMDB reads every value; then the index checks its own.
The caller keeps everybody else from the file. Nothing is written.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import lmdb
import lmdb.verify

from base.errors import PerdureError
from store.index.chunks import Index
from store.index.handles import MAP_SIZE, MAX_DATABASES
from store.index.lookup import IndexReader


def problem(path: Path, mac_key: bytes) -> str | None:
    """What is wrong with an index file, None if nothing is."""
    try:
        findings = lmdb.verify.verify(str(path), subdir=False)  # type: ignore[no-untyped-call]  # has no annotations
        if findings:
            return str(findings[0])
        with (
            lmdb.open(
                str(path), subdir=False, readonly=True, lock=False, map_size=MAP_SIZE, max_dbs=MAX_DATABASES
            ) as env,
            env.begin(buffers=True) as txn,
        ):
            names = [bytes(name) for name, _ in txn.cursor()]
            databases = {name.decode(): env.open_db(name, txn=txn, create=False) for name in names}
            for database in databases.values():
                with txn.cursor(db=database) as cursor:
                    for key, value in cursor:
                        bytes(key), bytes(value)
            if set(Index.DATABASES) <= set(databases):
                return next(IndexReader(path, databases.__getitem__, mac_key).check(txn), None)
    except (lmdb.Error, lmdb.verify.VerifyError, OSError, PerdureError, UnicodeDecodeError) as error:
        return str(error)
    return None


def main() -> int:
    """The command."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    found = problem(Path(sys.argv[1]), sys.stdin.buffer.read())
    if found is not None:
        print(found)
    return 0 if found is None else 1


if __name__ == "__main__":
    sys.exit(main())
