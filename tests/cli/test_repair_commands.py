"""Check and repair as other programs use them: documents, exit codes, one-line errors."""

from store_fixtures import image


def flip(path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_check_reads_parts_of_the_data(shell):
    for number in range(4):
        shell.write("a", image(number, 100))
        shell("import", "vm", "ram=a")
    total = shell.json("check")["packs"]
    parts = [shell.json("check", "--read-data-subset", f"{part}/3") for part in (1, 2, 3)]
    assert sum(each["read_packs"] for each in parts) == total
    assert all(each["clean"] and each["packs"] == total for each in parts)
    some = shell.json("check", "--read-data-subset", "30%")
    assert 0 < some["read_packs"] < total
    assert 0 < some["read_bytes"] < some["bytes"]
    assert f"{some['read_packs']} of the packs" in shell("check", "--read-data-subset", "30%").stdout.decode()
    assert "no part" in shell.error("check", "--read-data-subset", "4/3", code=2)
    assert "exclude" in shell.error("check", "--read-data-subset", "1/3", "--read-data", code=2)
    assert "exclude" in shell.error("check", "--read-data-subset", "1/3", "--public-key", "x", code=2)


def test_a_missing_pack_is_a_finding_on_any_host_and_hurts_only_who_needs_it(shell):
    shell.write("a", image(1, 100))
    shell.write("b", image(2, 100))
    first = shell.json("import", "vm", "ram=a")["id"]
    shell("import", "vm", "ram=b", "--parent", "vm@1")
    packs = shell.json("show", "vm@2")["packs"]
    assert first
    (shell.repository / "packs" / packs[0]).unlink()
    for state in ("state", "elsewhere"):
        elsewhere = {"PERDURE_STATE_DIR": str(shell.root / state)}
        document = shell.json("check", code=3, **elsewhere)
        (finding,) = document["findings"]
        assert (finding["kind"], finding["object"]) == ("pack", f"packs/{packs[0]}")
        assert (finding["generations"], finding["regions"]) == (["vm@2"], ["ram"])
        assert shell("export", "vm@1", "ram", "-", **elsewhere).stdout == image(1, 100)
        shell.error("export", "vm@2", "ram", "out", code=1, **elsewhere)
