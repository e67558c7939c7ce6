"""The LMDB environment: one open per process, never across fork, and damage found before it is mapped."""

import fcntl
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import traceback
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from base.errors import ConflictError, LockedError, StorageError
from store.index import environment, examination, handles, probe
from store.index.chunks import LOCATION, Index
from store.index.environment import Environment, IndexLostError, file_system, is_network

KEY = b"k" * 32
NAMES = ("meta", *Index.DATABASES)


def opened(folder, **more):
    return Environment(folder, NAMES, mac_key=KEY, **more)


def put(env, key, value):
    with env.write() as txn:
        txn.put(key, value, db=env.database("meta"))


def get(env, key):
    with env.read() as txn:
        value = txn.get(key, db=env.database("meta"))
        return None if value is None else bytes(value)


def in_child(work):
    """Exit status of a forked child that runs `work` and exits with 0 if it gives True."""
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            status = 0 if work() else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def killed_writer(folder, *, entries=3000):
    """An index with content whose last process was killed."""

    def work():
        env = opened(folder)
        put(env, b"name", b"value")
        index = Index(env, KEY)
        ids = np.random.default_rng(1).integers(0, 256, (entries, 32), np.uint8)
        locations = np.zeros(entries, LOCATION)
        locations["pack"] = 1
        with env.write() as txn:
            index.add(txn, ids, locations)
        os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(in_child(work)) == signal.SIGKILL


def reboot(folder):
    """Make the marker say that it was written before the machine was last booted."""
    lock = folder / "lock"
    lock.write_text(lock.read_text().replace(examination.boot_id(), "another boot"))


@contextmanager
def child_process(folder, code):
    """A Python process with the environment of `folder` open as `env`, which answers on its stdout."""
    start = (
        "import sys; from pathlib import Path\n"
        "from store.index.environment import Environment, IndexLostError\n"
        f"env = Environment(Path({str(folder)!r}), {NAMES!r}, mac_key={KEY!r})\n"
        "print('open', flush=True)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", start + code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    try:
        assert child.stdout.readline() == "open\n"
        yield child
    finally:
        child.kill()
        child.communicate()


def test_what_was_written_is_there_after_reopening(tmp_path):
    with opened(tmp_path / "index") as env:
        put(env, b"a", b"1")
    with opened(tmp_path / "index") as env:
        assert get(env, b"a") == b"1"
        put(env, b"a", b"2")
        assert get(env, b"a") == b"2"


def test_only_its_owner_can_read_it(tmp_path):
    folder = tmp_path / "index"
    folder.mkdir(mode=0o755)
    with opened(folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(each.stat().st_mode) for each in folder.iterdir()} == {0o600}


def test_a_failed_transaction_changes_nothing(tmp_path):
    with opened(tmp_path) as env:
        put(env, b"a", b"1")
        with pytest.raises(KeyError), env.write() as txn:
            txn.put(b"a", b"2", db=env.database("meta"))
            raise KeyError
        assert get(env, b"a") == b"1"


def test_a_second_open_in_one_process_is_refused(tmp_path):
    with opened(tmp_path / "index"):
        (tmp_path / "other name").symlink_to(tmp_path / "index")
        for path in (tmp_path / "index", tmp_path / "other name"):
            with pytest.raises(ConflictError, match="open in this process"):
                opened(path)
    opened(tmp_path / "index").close()


def test_of_threads_that_open_at_once_one_wins(tmp_path):
    barrier, won, lost = threading.Barrier(8), [], []

    def race():
        barrier.wait()
        try:
            won.append(opened(tmp_path))
        except ConflictError as error:
            lost.append(error)

    threads = [threading.Thread(target=race) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert (len(won), len(lost)) == (1, 7)
    put(won[0], b"a", b"1")
    won[0].close()


def test_use_after_fork_is_refused_and_harms_nobody(tmp_path):
    with opened(tmp_path) as env:
        put(env, b"a", b"1")

        def work():
            for use in (lambda: get(env, b"a"), lambda: put(env, b"a", b"2"), env.flush, lambda: opened(tmp_path)):
                with pytest.raises(ConflictError, match="fork"):
                    use()
            env.close()
            return True

        assert in_child(work) == 0
        assert get(env, b"a") == b"1"
        put(env, b"a", b"3")


def test_use_after_close_is_refused(tmp_path):
    env = opened(tmp_path)
    env.close()
    env.close()
    with pytest.raises(ConflictError, match="closed"):
        get(env, b"a")


def test_processes_share_it(tmp_path):
    with opened(tmp_path) as env:
        code = (
            "sys.stdin.readline()\n"
            "with env.write() as txn:\n"
            "    print(bytes(txn.get(b'a', db=env.database('meta'))))\n"
            "    txn.put(b'a', b'2', db=env.database('meta'))\n"
            "print('done', flush=True)\n"
            "sys.stdin.readline()\n"
        )
        with child_process(tmp_path, code) as child:
            put(env, b"a", b"1")
            child.stdin.write("\n")
            child.stdin.flush()
            assert child.stdout.readline() == "b'1'\n"
            assert child.stdout.readline() == "done\n"
            assert get(env, b"a") == b"2"


def test_a_role_belongs_to_one_at_a_time(tmp_path):
    with opened(tmp_path) as env:
        with env.role("merge") as mine, env.role("merge") as second, env.role("other") as other:
            assert (mine, second, other) == (True, False, True)
        with env.role("merge") as again:
            assert again


def test_opening_waits_for_who_examines_it_but_not_for_ever(tmp_path):
    opened(tmp_path).close()
    with (tmp_path / "gate").open("w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        with pytest.raises(LockedError, match="opening the index"):
            opened(tmp_path, wait_s=0.05)
    opened(tmp_path).close()


def test_a_full_map_is_told_and_survived(tmp_path, monkeypatch):
    monkeypatch.setattr(handles, "MAP_SIZE", 1 << 20)
    with opened(tmp_path) as env:
        put(env, b"a", b"1")
        with pytest.raises(StorageError, match="limit") as caught:
            put(env, b"b", bytes(2 << 20))
        assert caught.value.path == str(env.path)
        assert get(env, b"a") == b"1"
        put(env, b"a", b"2")


@pytest.mark.parametrize(("free", "said"), [(1 << 20, "mdb_txn_commit"), (3, "the disk is full")])
def test_a_refused_write_is_told_and_survived(tmp_path, monkeypatch, free, said):
    def work():
        with opened(tmp_path) as env:
            put(env, b"a", b"1")
            facts = os.statvfs_result((4096, 4096, 1 << 20, free, free, 1, 1, 1, 0, 255))
            monkeypatch.setattr(environment.os, "statvfs", lambda _: facts)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
            with pytest.raises(StorageError, match=said) as caught:
                put(env, b"b", bytes(2 << 20))
            assert caught.value.path == str(env.path)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            put(env, b"b", bytes(2 << 20))
            return get(env, b"a") == b"1"

    assert in_child(work) == 0


def test_network_file_systems_are_refused(tmp_path, monkeypatch):
    mounts = (
        "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        "30 22 0:40 / /home rw - nfs4 server:/home rw\n"
        "31 30 0:41 / /home/a\\040b rw - tmpfs tmpfs rw\n"
        "32 22 0:42 / /mnt rw - ext4 /dev/vdb rw\n"
        "33 32 0:43 / /mnt rw - fuse.sshfs host:/ rw\n"
    )
    found = {
        path: file_system(Path(path), mounts) for path in ("/var/x", "/home/me", "/home/a b/x", "/homes", "/mnt/x")
    }
    assert found == {
        "/var/x": "ext4",
        "/home/me": "nfs4",
        "/home/a b/x": "tmpfs",
        "/homes": "ext4",
        "/mnt/x": "fuse.sshfs",
    }
    assert [
        is_network(each) for each in ("nfs4", "fuse.sshfs", "fuse", "9p", "ext4", "fuseblk", "tmpfs", "overlay")
    ] == [
        *[True] * 4,
        *[False] * 4,
    ]
    monkeypatch.setattr(environment, "file_system", lambda _: "nfs4")
    with pytest.raises(StorageError, match="local file system"):
        opened(tmp_path)


def test_after_an_orderly_end_or_a_kill_nothing_is_examined(tmp_path, monkeypatch):
    monkeypatch.setattr(examination, "probe", lambda *_: pytest.fail("was examined"))
    opened(tmp_path).close()
    reboot(tmp_path)
    opened(tmp_path).close()
    killed_writer(tmp_path)
    with opened(tmp_path) as env:
        assert get(env, b"name") == b"value"


def test_after_a_power_loss_it_is_examined_and_kept_if_sound(tmp_path):
    killed_writer(tmp_path)
    reboot(tmp_path)
    with opened(tmp_path) as env:
        assert get(env, b"name") == b"value"


def test_a_file_that_changed_after_an_orderly_end_is_examined(tmp_path, monkeypatch):
    with opened(tmp_path) as env:
        put(env, b"a", b"1")
    os.truncate(tmp_path / "index.lmdb", (tmp_path / "index.lmdb").stat().st_size - 4096)
    monkeypatch.setattr(examination, "probe", lambda *_: "was examined")
    with pytest.raises(IndexLostError, match="was examined"):
        opened(tmp_path)


@pytest.mark.parametrize("rebooted", [False, True])
@pytest.mark.parametrize("left", [0.01, 0.3, 0.6, 0.99])
def test_a_truncated_index_is_lost_and_made_anew(tmp_path, left, rebooted):
    killed_writer(tmp_path)
    if rebooted:
        reboot(tmp_path)
    path = tmp_path / "index.lmdb"
    os.truncate(path, int(path.stat().st_size * left))
    with pytest.raises(IndexLostError) as caught:
        opened(tmp_path)
    assert caught.value.object == str(path)
    with opened(tmp_path) as env:
        assert get(env, b"name") is None
        put(env, b"a", b"1")


def test_no_zeroed_page_escapes_the_probe(tmp_path):
    killed_writer(tmp_path / "whole", entries=300)
    whole = (tmp_path / "whole" / "index.lmdb").read_bytes()
    copy = tmp_path / "copy"
    sound = []
    for at in range(0, len(whole), 4096):
        shutil.copytree(tmp_path / "whole", copy)
        (copy / "index.lmdb").write_bytes(whole[:at] + bytes(4096) + whole[at + 4096 :])
        status = in_child(lambda: probe.problem(copy / "index.lmdb", KEY) is None)
        assert not os.WIFSIGNALED(status)
        if status == 0:
            sound.append(at)  # a free page: then everything must be there
            assert in_child(lambda: all_is_there(copy)) == 0
        shutil.rmtree(copy)
    assert len(sound) < len(whole) / 4096 / 2


def all_is_there(folder):
    ids = np.random.default_rng(1).integers(0, 256, (300, 32), np.uint8)
    with opened(folder) as env, env.read() as txn:
        found = Index(env, KEY).lookup(txn, ids)
    with opened(folder) as env:
        return bool((found["pack"] == 1).all()) and get(env, b"name") == b"value"


def test_the_probe_needs_the_key(tmp_path):
    killed_writer(tmp_path)
    assert in_child(lambda: probe.problem(tmp_path / "index.lmdb", KEY) is None) == 0
    assert in_child(lambda: "not what was stored" in probe.problem(tmp_path / "index.lmdb", b"x" * 32)) == 0


def test_a_probe_that_dies_or_hangs_is_a_lost_index(tmp_path, monkeypatch):
    killed_writer(tmp_path / "index")
    interpreter = tmp_path / "python"
    scripts = {"kill -BUS $$": "reader .SIGBUS", "exec tail -f /dev/null": "took more than", "exit 3": "status 3"}
    for script, said in scripts.items():
        interpreter.write_text(f"#!/bin/sh\n{script}\n")
        interpreter.chmod(0o755)
        shutil.copytree(tmp_path / "index", tmp_path / "copy")
        reboot(tmp_path / "copy")
        with monkeypatch.context() as patch:
            patch.setattr(examination.sys, "executable", str(interpreter))
            patch.setattr(examination, "_PROBE_SECONDS", 0.3)
            with pytest.raises(IndexLostError, match=said):
                opened(tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy")


def test_garbage_in_the_marker_or_the_file_is_survived(tmp_path):
    killed_writer(tmp_path)
    (tmp_path / "lock").write_bytes(b'{"state": "clo')
    with opened(tmp_path) as env:
        assert get(env, b"name") == b"value"
    (tmp_path / "index.lmdb").write_bytes(os.urandom(20000))
    with pytest.raises(IndexLostError, match="does not begin"):
        opened(tmp_path)
    opened(tmp_path).close()


def test_a_discarded_index_is_noticed_by_other_processes(tmp_path):
    code = (
        "sys.stdin.readline()\n"
        "for transaction in (env.read, env.write):\n"
        "    try:\n"
        "        with transaction(): print('not noticed', flush=True)\n"
        "    except IndexLostError as error: print('noticed', flush=True)\n"
        "env.close()\n"
        f"env = Environment(Path({str(tmp_path)!r}), {NAMES!r}, mac_key={KEY!r})\n"
        "with env.read() as txn: print(bytes(txn.get(b'a', db=env.database('meta'))), flush=True)\n"
    )
    with child_process(tmp_path, code) as child:
        env = opened(tmp_path)
        put(env, b"a", b"old")
        env.discard()
        with opened(tmp_path) as env:
            assert get(env, b"a") is None
            put(env, b"a", b"new")
            child.stdin.write("\n")
            child.stdin.flush()
            assert [child.stdout.readline() for _ in range(3)] == ["noticed\n", "noticed\n", "b'new'\n"]


def test_a_lock_file_left_by_a_discard_that_was_killed_is_not_used(tmp_path):
    code = (
        "def put(value):\n"
        "    with env.write() as txn: txn.put(b'a', value, db=env.database('meta'))\n"
        "for number in range(9): put(b'%d' % number)\n"
        "print('written', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    with child_process(tmp_path, code) as child:
        assert child.stdout.readline() == "written\n"
        before = (tmp_path / "index.lmdb-lock").stat().st_ino
        (tmp_path / "index.lmdb").unlink()
        with opened(tmp_path) as env:
            assert (tmp_path / "index.lmdb-lock").stat().st_ino != before
            for number in range(3):
                put(env, b"b", b"%d" % number)
                assert (get(env, b"a"), get(env, b"b")) == (None, b"%d" % number)


def test_two_that_discard_the_same_index_discard_it_once(tmp_path):
    code = "sys.stdin.readline()\nenv.discard()\nprint('done', flush=True)\nsys.stdin.readline()\n"
    with child_process(tmp_path, code) as child:
        env = opened(tmp_path)
        env.discard()
        with opened(tmp_path) as env:
            put(env, b"a", b"new")
            child.stdin.write("\n")
            child.stdin.flush()
            assert child.stdout.readline() == "done\n"
            assert get(env, b"a") == b"new"
