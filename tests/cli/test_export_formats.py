"""Exports that other programs open: judged by qemu-img."""

import subprocess

from store_fixtures import image

PAGE = 4096


def test_a_region_as_a_qcow2_image(shell):
    data = image(1, 700)
    data += bytes(-len(data) % PAGE)
    shell.write("a", data + bytes(64 << 20))
    shell("import", "web", "ram=a")
    said = shell.json("export", "web@1", "ram", "out.qcow2", "--format", "qcow2")
    compared = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", "a", "out.qcow2"]
    subprocess.run(compared, cwd=shell.root, check=True, stdout=subprocess.DEVNULL)
    size = (shell.root / "out.qcow2").stat().st_size
    assert said["written_bytes"] == size < len(data) + (2 << 20)  # what is zero is not in it
    shell("export", "web@1", "ram", "out.qcow2", "--format", "qcow2", code=1)
    shell("export", "web@1", "out.qcow2", "--format", "qcow2", code=2)
    shell("export", "web@1", "ram", "-", "--format", "qcow2", code=2)


def test_an_image_that_cannot_be_read_to_its_end_is_not_there(shell):
    shell.write("a", image(2, 700))
    packs = shell.json("show", shell.json("import", "web", "ram=a")["id"])["packs"]
    for name in packs:
        path = shell.repository / "packs" / name
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole)
    before = sorted(shell.root.iterdir())
    refused = shell("export", "web@1", "ram", "out.qcow2", "--format", "qcow2", code=1)
    assert any(f"packs/{name}" in refused.stderr.decode() for name in packs)
    assert sorted(shell.root.iterdir()) == before


def test_without_qemu_img_that_is_said(shell):
    shell.write("a", image(3, 7))
    shell("import", "web", "ram=a")
    refused = shell("export", "web@1", "ram", "out", "--format", "qcow2", code=1, PATH="/nonexistent")
    assert b"install package qemu-utils" in refused.stderr
    assert not (shell.root / "out").exists()
