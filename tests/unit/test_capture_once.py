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
            try:
                generations = []
                for _ in range(4):
                    with repository.writer("vm") as writer:
                        draft = writer.region("ram", "image", PAGES * 4096)
                        writer.replace(draft, file.fileno())
                        generations.append(writer.commit("import"))
            finally:
                stop.set()
                writer_thread.join()
            del pages, scribble, writer_thread
        key = repository.keys.id_key("chunk")
        torn = 0
        for generation in generations:
            with GenerationReader(repository, generation) as reader:
                for _, ids in reader._leaves(reader.region("ram")):
                    for pack, frame, _ in by_frame(repository.nodes.locate(ids)):
                        found, chunks = repository.frames.frame(pack, frame)
                        for name, chunk in zip(found, chunks, strict=True):
                            assert blake3(chunk.tobytes(), key=key).digest() == name.tobytes()
                            torn += len(np.unique(chunk)) > 1
        assert torn, "the writer never raced: this test shows nothing"
