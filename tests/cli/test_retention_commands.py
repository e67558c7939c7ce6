"""forget, protect and unprotect from the command line."""

import shlex
import shutil

import pytest
from perdure_shell import ROOT, Shell
from store_fixtures import image


@pytest.fixture(scope="module")
def four_generations(tmp_path_factory):
    made = Shell(tmp_path_factory.mktemp("four"))
    made("init")
    made.write("a", image(1, 5))
    for tag in ("one", "two", "three", "four"):
        made("import", "vm", "ram=a", "--tag", tag)
    return made.root


@pytest.fixture
def shell(four_generations, tmp_path):
    return Shell(shutil.copytree(four_generations, tmp_path / "copy"))


def numbers(shell) -> list[int]:
    return [each["generation"] for each in shell.json("log", "vm")["generations"]]


def test_forget_by_rules(shell):
    done = shell.json("forget", "vm", "--keep-last", 1, "--keep-tag", "two", "--dry-run")
    assert [each["generation"] for each in done["forgotten"]] == [3, 1]
    assert [(each["generation"], each["reasons"]) for each in done["kept"]] == [
        (4, ["newest", "last"]),
        (2, ["tag two"]),
    ]
    assert numbers(shell) == [1, 2, 3, 4]
    text = shell("forget", "vm", "--keep-last", 1, "--keep-tag", "two").stdout.decode()
    assert "vm@3" in text and "forgotten" in text
    assert numbers(shell) == [2, 4]
    assert "forgotten" in shell.error("show", "vm@1", code=1)
    assert shell.json("check", "--read-data")["clean"]
    assert shell("export", "vm@2", "ram", "-").stdout == image(1, 5)


def test_protected_generations_stay(shell):
    assert shell.json("protect", "vm@1")["protected"]
    assert [each["protected"] for each in shell.json("log", "vm")["generations"]] == [True, False, False, False]
    shell("forget", "vm", "--keep-last", 1)
    assert numbers(shell) == [1, 4]
    assert "unprotect" in shell.error("forget", "vm@1", code=1)
    shell("unprotect", "vm@1")
    shell("forget", "vm@1")
    assert numbers(shell) == [4]
    assert shell.json("log", PERDURE_STATE_DIR=str(shell.root / "elsewhere"))["generations"][0]["generation"] == 4


def test_policies_are_applied_by_every_client(shell):
    assert shell.json("policy", "show") == {"policies": []}
    shell("policy", "set", "--keep-last", 2)
    shell("policy", "set", "vm", "--keep-last", 1, "--keep-tag", "two", "--keep-within", "0h", "--quota", "1GiB")
    shell.write("b", image(2, 5))
    for _ in range(3):
        shell("import", "other", "ram=b")
    elsewhere = str(shell.root / "elsewhere")
    text = shell("policy", "show", PERDURE_STATE_DIR=elsewhere).stdout.decode()
    assert "every other VM  last 2" in text and "last 1, within 0h, tag two" in text and "1.0 GiB" in text
    shown = shell.json("policy", "show", "vm")["policies"][0]
    assert (shown["own"], shown["keep_last"], shown["keep_tags"]) == (True, 1, ["two"])
    assert (shown["keep_within"], shown["quota_bytes"]) == ("0h", 1 << 30)
    assert 0 < shown["used_bytes"] < 1 << 20
    assert shell.json("policy", "show", "other")["policies"][0]["own"] is False

    planned = shell.json("forget", "--all", "--dry-run", PERDURE_STATE_DIR=elsewhere)
    assert [(each["vm"], each["generation"]) for each in planned["forgotten"]] == [("other", 1), ("vm", 3), ("vm", 1)]
    assert numbers(shell) == [1, 2, 3, 4]
    assert shell.json("forget", "vm", "--dry-run")["forgotten"] == planned["forgotten"][1:]
    done = shell.json("forget", "--all", PERDURE_STATE_DIR=elsewhere)
    assert done["forgotten"] == planned["forgotten"]
    assert numbers(shell) == [2, 4]
    assert [each["generation"] for each in shell.json("log", "other")["generations"]] == [2, 3]

    shell("policy", "remove", "vm")
    assert shell.json("policy", "show", "vm")["policies"][0]["keep_last"] == 2
    shell("policy", "remove")
    assert "keep" in shell.error("forget", "vm", code=2)
    assert shell.json("forget", "--all")["forgotten"] == []
    assert "no policy" in shell.error("policy", "remove", "vm", code=1)


def test_a_quota_refuses_an_import_by_name(shell):
    shell("policy", "set", "vm", "--quota", "40KiB")
    shell.write("a", image(3, 50))
    message = shell.error("import", "vm", "ram=a", code=1)
    assert all(each in message for each in ("VM vm", "40.0 KiB", "perdure forget", "perdure policy set"))
    assert numbers(shell) == [1, 2, 3, 4]
    assert shell.json("check", "--read-data")["clean"]
    assert "everything" in shell("policy", "show", "vm").stdout.decode()
    assert "keep" in shell.error("forget", "vm", code=2)  # a quota says nothing of what to keep
    shell("policy", "set", "vm", "--quota", "4MiB")
    assert shell.json("import", "vm", "ram=a")["forgotten"] == []


def test_the_commands_of_the_readme(shell):
    for _ in range(3):
        shell("import", "demo", "ram=a")
    chapter = (ROOT / "README.md").read_text().split("\n## Retention\n")[1].split("\n## ")[0]
    lines = [shlex.split(line, comments=True) for line in chapter.split("```sh\n")[1].split("```")[0].splitlines()]
    assert len(lines) >= 8
    for perdure, *words in lines:
        assert perdure == "perdure"
        shell(*words)
    assert [each["protected"] for each in shell.json("log", "demo")["generations"]] == [False, True, False]


def test_mistakes(shell):
    assert "or give --all" in shell.error("forget", code=2)
    assert "or give --all" in shell.error("forget", "vm", "--all", code=2)
    assert "policy set" in shell.error("forget", "--all", "--keep-last", 1, code=2)
    assert "what to keep" in shell.error("policy", "set", "vm", code=2)
    assert "VM name" in shell.error("policy", "set", "../vm", "--keep-last", 1, code=2)
    assert "size" in shell.error("policy", "set", "vm", "--quota", "much", code=2)
    assert "nobody" in shell.error("policy", "show", "nobody", code=1)
    assert "keep" in shell.error("forget", "vm", code=2)
    assert "not both" in shell.error("forget", "vm@1", "--keep-last", 1, code=2)
    assert "span" in shell.error("forget", "vm", "--keep-within", "soon", code=2)
    assert "count" in shell.error("forget", "vm", "--keep-last", -1, code=2)
    assert "nobody" in shell.error("forget", "nobody", "--keep-last", 1, code=1)
    assert numbers(shell) == [1, 2, 3, 4]
