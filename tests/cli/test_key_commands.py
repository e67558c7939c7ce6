"""Key slots, rotation and audits from the command line."""

import json
import os
import pty
import subprocess
import sys

from perdure_shell import KEY
from store_fixtures import image


def slots(shell, **environment):
    return [each["slot"] for each in shell.json("key", "list", **environment)["slots"]]


def slot_files(shell):
    return sorted(each.name for each in (shell.repository / "keys").iterdir())


def new_key_file(shell, name):
    return shell.write(name, os.urandom(32))


def test_a_passphrase_is_added_changed_and_removed(worded):
    (first,) = slots(worded)
    added = worded.json("key", "add", "--label", "second host", PERDURE_NEW_PASSWORD="two")
    assert (added["kind"], added["label"], added["keyring"], added["usable"]) == ("passphrase", "second host", 2, True)
    assert added["argon2id"] == {"memory_kib": 131072, "passes": 2, "lanes": 4}
    assert slots(worded) == [first, added["slot"]]
    assert worded.json("log", PERDURE_PASSWORD="two") == {"generations": []}
    worded.write("new", b"three\n")
    changed = worded.json("key", "change-passphrase", PERDURE_NEW_PASSWORD_FILE=str(worded.root / "new"))
    assert changed["replaced"] == first
    assert slots(worded) == [added["slot"], changed["slot"]]
    assert "wrong passphrase" in worded.error("log", code=12)
    text = worded("key", "remove", added["slot"][:6], PERDURE_PASSWORD="three").stdout.decode()
    assert f"removed key slot {added['slot']}; 1 left" in text
    assert "wrong passphrase" in worded.error("log", code=12, PERDURE_PASSWORD="two")
    said = worded.error("key", "remove", changed["slot"], code=1, PERDURE_PASSWORD="three")
    assert "no usable key slot would be left" in said
    assert slots(worded) == slot_files(worded) == [changed["slot"]]
    listed = worded("key", "list").stdout.decode()
    assert f"{changed['slot']}  passphrase" in listed and "128.0 MiB, 2 passes" in listed


def test_a_key_file_unlocks_in_place_of_a_passphrase(worded):
    file = new_key_file(worded, "two")
    made = worded.json("key", "add", "--key-file", "two", "--label", "robot")
    assert (made["kind"], made["label"]) == ("key file", "robot")
    none = {"PERDURE_PASSWORD": None}
    for words, environment in (
        (("--key-file", file, "log"), none),
        (("log", "--key-file", file), {"PERDURE_PASSWORD": "wrong"}),
        (("log",), {**none, "PERDURE_KEY_FILE": str(file)}),
    ):
        assert worded.json(*words, **environment) == {"generations": []}
    three = new_key_file(worded, "three")
    worded("--key-file", file, "key", "add", "--key-file", three, **none)  # the first unlocks, the second is new
    worded("key", "list", "--key-file", three, **none)
    worded("log", "--key-file", three, **none)
    assert "wrong key file" in worded.error("log", "--key-file", new_key_file(worded, "four"), code=12)
    said = worded.error("key", "change-passphrase", "--key-file", file, code=2, PERDURE_NEW_PASSWORD="x")
    assert "unlocked with a key file" in said


def test_a_repository_whose_first_slot_is_a_key_files(bare):
    file = new_key_file(bare, "file")
    said = bare("init", "--key-file", file).stdout.decode()
    assert "Keep the key file" in said
    assert "wrong key file" in bare.error("log", code=12)
    assert "wrong passphrase" in bare.error("log", code=12, PERDURE_KEY_FILE=None, PERDURE_PASSWORD="wrong")
    assert bare.json("log", "--key-file", file) == {"generations": []}


def test_what_is_no_key_file(shell):
    for data, said in (
        (bytes(31), "32 random bytes or more"),
        (b"", "32 random bytes or more"),
        (bytes((1 << 20) + 1), "at most 1 MiB"),
        (b"password" * 8, "is not random"),
    ):
        wrong = shell.write("wrong", data)
        assert said in shell.error("key", "add", "--key-file", wrong, code=2)
        assert said in shell.error("log", "--key-file", wrong, code=2)
    assert "cannot read key file" in shell.error("key", "add", "--key-file", "/nowhere", code=2)
    assert "cannot read key file" in shell.error("key", "add", "--key-file", shell.root, code=2)
    assert len(slots(shell)) == 1


def test_rotation(shell):
    shell.write("a", image(1, 40))
    shell("import", "vm", "ram=a")
    shell("key", "export-public", "old public key")
    shell("key", "add", "--key-file", new_key_file(shell, "two"), "--label", "two")
    own, two = slots(shell)
    done = shell.json("key", "rotate")
    assert (done["epoch"], done["keyring"], done["replaced"], done["outdated_slots"]) == (2, 3, own, [two])
    assert slots(shell) == [two, done["slot"]]
    shell.write("b", image(2, 40))
    shell("import", "vm", "ram=b", "--parent", "vm@1")
    other = {"PERDURE_KEY_FILE": str(shell.root / "two"), "PERDURE_STATE_DIR": str(shell.root / "other host")}
    for environment in ({}, other):
        for number in (1, 2):
            assert shell("export", f"vm@{number}", "ram", "-", **environment).stdout == image(number, 40)
    assert shell.json("check", "--read-data", **other)["clean"]
    text = shell("key", "rotate").stdout.decode()
    assert "epoch 3 has begun" in text
    assert f"1 key slots of others still trust the signing key before: {two}" in text
    assert shell.json("check", "--public-key", "old public key")["clean"]


def test_several_changes_at_once(shell):
    """Put-if-absent decides; who loses is told, and leaves nothing."""
    files = [new_key_file(shell, f"key {number}") for number in range(6)]
    environment = {key: value for key, value in shell.environment.items() if value is not None}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "perdure", "key", "add", "--key-file", file],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for file in files
    ]
    errors = [process.communicate()[1] for process in running]
    added = [process.returncode == 0 for process in running]
    for done, error in zip(added, errors, strict=True):
        assert error == "" if done else "keys were changed by somebody else meanwhile" in error, error
        assert len(error.splitlines()) == (0 if done else 1)
    assert any(added)
    assert sorted(slots(shell)) == slot_files(shell)
    assert len(slots(shell)) == 1 + sum(added)
    for file, done in zip(files, added, strict=True):
        shell("log", code=0 if done else 12, PERDURE_KEY_FILE=str(file))


def test_mistakes_are_said_in_one_line(shell):
    shell("key", "add", "--key-file", new_key_file(shell, "two"))
    shell.write("public", b"nonsense")
    shell.write("there", b"")
    for words, code, said in (
        (("key", "remove", "xyz"), 2, "no key slot"),
        (("key", "remove", ""), 2, "no key slot"),
        (("key", "remove", "0" * 17), 2, "no key slot"),
        (("key", "add"), 12, "PERDURE_NEW_PASSWORD_FILE"),
        (("key", "add", "--label", "x" * 65, "--key-file", "two"), 2, "label"),
        (("key", "add", "--label", "a\nb", "--key-file", "two"), 2, "label"),
        (("key", "export-public", "there"), 1, "exists"),
        (("key", "export-public", "/nowhere/public"), 1, "/nowhere/public"),
        (("check", "--public-key", "public"), 2, "public holds no public key"),
        (("check", "--public-key", "nowhere"), 2, "cannot read nowhere"),
        (("check", "--public-key", "public", "--read-data"), 2, "exclude each other"),
        (("-r", "/nowhere", "key", "list"), 10, "no repository at /nowhere"),
    ):
        assert said in shell.error(*words, code=code), words
    unknown = "1" if all(each[0] != "1" for each in slots(shell)) else "2" * 16
    assert "no key slot has an id" in shell.error("key", "remove", unknown, code=1)
    said = shell.error("key", "add", code=2, PERDURE_NEW_PASSWORD_COMMAND="false")
    assert "PERDURE_NEW_PASSWORD_COMMAND" in said
    assert "the new passphrase is empty" in shell.error("key", "add", code=12, PERDURE_NEW_PASSWORD="")
    for words in (("key",), ("key", "nonsense"), ("key", "remove"), ("key", "rotate", "now")):
        assert b"usage" in shell(*words, code=2).stderr
    assert len(slots(shell)) == 2


def test_a_prefix_that_several_slots_have(shell):
    """With 17 slots, two ids begin alike."""
    for number in range(16):
        shell("key", "add", "--key-file", new_key_file(shell, f"key {number}"), "--quiet")
    first = [each[0] for each in slots(shell)]
    twice = next(each for each in first if first.count(each) > 1)
    assert "several key slots" in shell.error("key", "remove", twice, code=2)


def test_a_new_passphrase_is_asked_for_twice(shell):
    """On a terminal of its own."""

    def answer(first, second):
        parent, child = pty.openpty()
        environment = {key: value for key, value in shell.environment.items() if value is not None}
        process = subprocess.Popen(
            [sys.executable, "-m", "perdure", "key", "add"],
            env=environment, stdin=child, stdout=subprocess.PIPE, stderr=child, start_new_session=True,
        )  # fmt: skip
        os.close(child)
        said = b""
        for prompt, line in ((b"new passphrase: ", first), (b"once more: ", second)):
            while prompt not in said:
                said += os.read(parent, 1000)
            os.write(parent, line + b"\n")
        code = process.wait()
        os.close(parent)
        return code

    assert answer(b"one", b"two") == 2
    assert len(slots(shell)) == 1
    assert answer(b"typed", b"typed") == 0
    shell("log", PERDURE_KEY_FILE=None, PERDURE_PASSWORD="typed")


def test_quiet_says_nothing(shell):
    for words in (("list",), ("add", "--key-file", new_key_file(shell, "two")), ("rotate",), ("export-public", "out")):
        assert shell("key", *words, "--quiet").stdout == b""
    assert shell("key", "export-public", "--quiet").stdout.startswith(b"-----BEGIN PUBLIC KEY-----\n")


def test_a_damaged_slot_is_listed_and_does_not_count_as_usable(shell):
    shell("key", "add", "--key-file", new_key_file(shell, "two"))
    own, two = slots(shell)
    path = shell.repository / "keys" / two
    path.write_bytes(path.read_bytes()[:-1])
    listed = {each["slot"]: each for each in shell.json("key", "list")["slots"]}
    assert (listed[own]["usable"], listed[two]["usable"]) == (True, False)
    assert "truncated or damaged" in listed[two]["problem"]
    assert "NOT USABLE" in shell("key", "list").stdout.decode()
    (finding,) = shell.json("check", code=3)["findings"]
    assert (finding["kind"], finding["object"]) == ("slot", f"keys/{two}")
    assert "no usable key slot would be left" in shell.error("key", "remove", own, code=1)
    assert shell.json("key", "remove", two)["slots"] == 1
    assert slots(shell) == slot_files(shell) == [own]


def test_an_auditor_without_a_passphrase(shell):
    shell.write("a", image(1, 40))
    shell("import", "vm", "ram=a")
    exported = shell.json("key", "export-public", "public")
    assert exported["pem"] in (shell.root / "public").read_text()
    assert exported["repository"] in (shell.root / "public").read_text()
    assert shell("key", "export-public").stdout.decode() == exported["pem"]
    shell("key", "rotate")
    shell.write("b", image(2, 40))
    shell("import", "vm", "ram=b", "--parent", "vm@1")
    auditor = {"PERDURE_KEY_FILE": None, "PERDURE_STATE_DIR": str(shell.root / "auditor")}
    check = ("check", "--public-key", "public")
    clean = shell.json(*check, **auditor)
    assert (clean["clean"], clean["records"], clean["generations"], clean["keyring"]) == (True, 3, 2, 2)
    assert clean["signing_keys"][0] == exported["public_key"]
    assert any("packs" in each for each in clean["not_verified"])
    assert not list((shell.root / "auditor").rglob("*lmdb*"))
    text = shell(*check, **auditor).stdout.decode()
    assert "3 records, 2 generations, keyring 2, 1 key slots: clean" in text
    assert "not verified without a passphrase" in text

    record = shell.repository / "records" / "000000000002"
    whole = record.read_bytes()
    record.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    (finding,) = shell.json(*check, code=3, **auditor)["findings"]
    assert finding == {
        "kind": "record",
        "object": "records/000000000002",
        "offset": None,
        "problem": "its signature is wrong: damaged, or written by somebody else",
        "generations": [],
        "regions": [],
    }
    assert "damaged: records/000000000002" in shell(*check, code=3, **auditor).stdout.decode()
    record.write_bytes(whole)
    (shell.repository / "records" / "000000000003").unlink()
    (finding,) = shell.json(*check, code=3, **auditor)["findings"]
    assert "gone though this host has seen it" in finding["problem"]
    stranger = {**auditor, "PERDURE_STATE_DIR": str(shell.root / "stranger")}
    assert shell.json(*check, **stranger)["clean"]


def test_an_auditor_with_the_key_of_another_repository(shell):
    pem = shell("key", "export-public").stdout
    other = {"PERDURE_REPOSITORY": str(shell.root / "another")}
    shell("init", **other)
    shell.write("public", pem)
    (finding,) = shell.json("check", "--public-key", "public", code=3, **other)["findings"]
    assert finding["kind"] == "keyring"
    assert "not signed by a key that is trusted" in finding["problem"]
    assert shell.error("check", "--public-key", "public", code=10, PERDURE_REPOSITORY=str(shell.root / "nowhere"))


def test_keys_that_were_put_back_are_refused_by_every_command(shell):
    shell("key", "add", "--key-file", new_key_file(shell, "two"))
    shell("key", "export-public", "public")
    assert shell.json("check", "--public-key", "public")["clean"]
    (shell.repository / "keyring" / "00000002").unlink()
    for words in (("log",), ("key", "list"), ("key", "rotate"), ("key", "export-public")):
        assert "which this host has seen" in shell.error(*words, code=1)
    findings = shell.json("check", "--public-key", "public", code=3)["findings"]
    assert any("which this host has seen" in each["problem"] for each in findings)


def test_what_others_may_read_says_no_secret(shell):
    """Output of every command, and what is stored, against the key file."""
    secret = KEY
    said = b"".join(shell("key", *words).stdout for words in (("list",), ("rotate", "--json"), ("export-public",)))
    stored = b"".join(path.read_bytes() for path in shell.repository.rglob("*") if path.is_file())
    for form in (secret, secret.hex().encode(), json.dumps(secret.decode("latin-1")).encode()):
        assert form not in said + stored
