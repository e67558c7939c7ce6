"""forget, protect and unprotect from the command line."""

import pytest
from store_fixtures import image


@pytest.fixture(autouse=True)
def four_generations(shell):
    shell.write("a", image(1, 5))
    for tag in ("one", "two", "three", "four"):
        shell("import", "vm", "ram=a", "--tag", tag)


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


def test_mistakes(shell):
    assert "keep" in shell.error("forget", "vm", code=2)
    assert "not both" in shell.error("forget", "vm@1", "--keep-last", 1, code=2)
    assert "span" in shell.error("forget", "vm", "--keep-within", "soon", code=2)
    assert "count" in shell.error("forget", "vm", "--keep-last", -1, code=2)
    assert "nobody" in shell.error("forget", "nobody", "--keep-last", 1, code=1)
    assert numbers(shell) == [1, 2, 3, 4]
