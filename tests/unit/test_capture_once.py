"""Capture once: a page that is written while it is captured is stored whole, under the id of what is stored."""

import mmap
import os
import tempfile
import threading

import numpy as np
from blake3 import blake3
from store_fixtures import place

from store.nodes import by_frame
from store.reader import GenerationReader

PAGES = 2000
MOST = 200
"""Generations until a page must have been caught while it was written; on a busy host that takes a few more."""


def test_a_racing_writer_never_gets_other_bytes_under_a_valid_id():
    """Pages change as fast as another thread can write them; every chunk that is stored must be what its id says."""
    with place() as where, where.open() as repository, tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.ftruncate(file.fileno(), PAGES * 4096)
        with mmap.mmap(file.fileno(), PAGES * 4096) as memory:
            pages = np.frombuffer(memory, np.uint8).reshape(PAGES, 4096)
            stop = threading.Event()

            def scribble(pages=pages):
                value = 0
                while not stop.is_set():
                    value = (value + 1) % 256
                    pages[:, :] = value

            writer_thread = threading.Thread(target=scribble)
            writer_thread.start()
            made = torn = 0
            try:
                while made < 4 or (not torn and made < MOST):
                    with repository.writer("vm") as writer:
                        draft = writer.region("ram", "image", PAGES * 4096)
                        writer.replace(draft, file.fileno())
                        generation = writer.commit("import")
                    made += 1
                    torn += torn_pages(repository, generation)
            finally:
                stop.set()
                writer_thread.join()
            del pages, scribble, writer_thread
        assert torn, "the writer never raced: this test shows nothing"


def torn_pages(repository, generation) -> int:
    """Pages of a generation that were written while they were captured; all of them must be what their ids say."""
    key, torn = repository.keys.id_key("chunk"), 0
    with GenerationReader(repository, generation) as reader:
        for _, ids in reader._leaves(reader.region("ram")):
            for pack, frame, _ in by_frame(repository.nodes.locate(ids)):
                found, chunks = repository.frames.frame(pack, frame)
                for name, chunk in zip(found, chunks, strict=True):
                    assert blake3(chunk.tobytes(), key=key).digest() == name.tobytes()
                    torn += len(np.unique(chunk)) > 1
    return torn
