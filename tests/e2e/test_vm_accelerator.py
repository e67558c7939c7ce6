"""The accelerator that is found by trying: the probe's guest under a real QEMU, and what is made of its answer."""

import json
import os
import time
from pathlib import Path

import pytest

from vm import accelerator
from vm.accelerator import Choice, choose, probe
from vm.config import Description, Size
from vm.qemu import find_binary

pytestmark = pytest.mark.qemu

AUTO = Description(name="demo", memory=Size(64 << 20))


@pytest.fixture
def binary() -> Path:
    return find_binary("demo", "qemu-system-x86_64")


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A program in QEMU's place, and a device that can be opened in that of KVM."""
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(accelerator, "_KVM", device)
    runs = tmp_path / "runs"

    def make(text: str) -> Path:
        path = tmp_path / "qemu"
        path.write_text(f"#!/bin/sh\necho run >> {runs}\n{text}\n")
        path.chmod(0o755)
        return path

    make.runs = lambda: runs.read_text().count("run")
    return make


def test_the_probes_guest_counts_where_code_runs(binary, tmp_path):
    assert probe(binary, "tcg", "max", 60, tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_the_probes_guest_reports_only_after_it_has_counted(binary, tmp_path, monkeypatch):
    """It never comes to its end if it is sent around once more, so it is the count that is waited for."""
    counting = bytes.fromhex("b980f0fa02 ffc9 75fc")
    assert accelerator._ROM.count(counting) == 1
    endless = accelerator._ROM.replace(counting, bytes.fromhex("b980f0fa02 ffc9 ebfc"))
    monkeypatch.setattr(accelerator, "_ROM", endless)
    problem = probe(binary, "tcg", "max", 1.5, tmp_path)
    assert problem is not None and "without coming to" in problem


def test_a_qemu_that_refuses_gives_its_reason(binary, tmp_path):
    problem = probe(binary, "tcg", "no-such-cpu", 60, tmp_path)
    assert problem is not None and problem.startswith("QEMU ended at once: ") and "no-such-cpu" in problem
    assert "\n" not in problem
    assert probe(tmp_path / "none", "tcg", "max", 60, tmp_path) == (
        f"{tmp_path / 'none'} cannot be started: No such file or directory"
    )


def test_the_choice_on_this_machine_boots_or_says_why(binary, tmp_path):
    found = choose(AUTO, binary, tmp_path / "accelerator.json")
    if found.kind == "kvm":
        assert found.cpu == "host"
    else:
        assert found.cpu == "max" and found.reason.startswith("KVM is not usable: ")
    assert choose(AUTO, binary, tmp_path / "accelerator.json") == found


def test_a_guest_that_hangs_is_given_up_in_time_and_only_once_a_boot(script, tmp_path):
    hanging = script("exec sleep 1000")
    cache = tmp_path / "accelerator.json"
    started = time.monotonic()
    found = choose(AUTO, hanging, cache, timeout_s=0.3)
    assert time.monotonic() - started < 30
    assert (found.kind, found.cpu) == ("tcg", "max") and "without coming to" in found.reason
    assert choose(AUTO, hanging, cache, timeout_s=0.3) == found and script.runs() == 1

    known = json.loads(cache.read_text())
    cache.write_text(json.dumps(known | {"boot": "another"}))
    assert choose(AUTO, hanging, cache, timeout_s=0.3) == found and script.runs() == 2
    cache.write_text("{")
    assert choose(AUTO, hanging, cache, timeout_s=0.3) == found and script.runs() == 3
    os.utime(hanging, ns=(0, 0))  # QEMU was upgraded
    assert choose(AUTO, hanging, cache, timeout_s=0.3) == found and script.runs() == 4


def test_kvm_is_taken_where_it_works(script, tmp_path):
    working = script("printf K; exec sleep 1000")
    cache = tmp_path / "accelerator.json"
    assert choose(AUTO, working, cache) == Choice("kvm", "host", "KVM works here")
    named = Description(name="demo", memory=Size(64 << 20), cpu="EPYC")
    assert choose(named, working, cache) == Choice("kvm", "EPYC", "KVM works here")
    assert script.runs() == 2


def test_without_the_device_or_the_need_nothing_is_tried(script, tmp_path, monkeypatch):
    program, cache = script("exit 1"), tmp_path / "accelerator.json"
    for kind, cpu in (("tcg", "max"), ("kvm", "host")):
        described = Description(name="demo", memory=Size(64 << 20), accelerator=kind)
        assert choose(described, program, cache) == Choice(kind, cpu, "as described")
    monkeypatch.setattr(accelerator, "_KVM", tmp_path / "no-kvm")
    assert choose(AUTO, program, cache) == Choice(
        "tcg", "max", f"KVM is not usable: {tmp_path / 'no-kvm'} does not exist"
    )
    assert not cache.exists() and not (tmp_path / "runs").exists()
