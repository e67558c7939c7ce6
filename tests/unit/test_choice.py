"""The choice of a tracker is a pure decision with a reason that is shown to the user."""

import os
from dataclasses import replace

import pytest

from base.errors import ConflictError
from capture.choice import Choice, Facts, Kernel, choose, probe_facts, tracing_remedy

NEW = Kernel("6.12.9-amd64", "x86_64", pagemap_scan=True)
OLD = Kernel("6.1.0-56-amd64", "x86_64", pagemap_scan=False)
PLAIN = Facts(NEW, devices=("virtio-blk-pci", "nvdimm"), networks=("user",), block_drivers=("raw", "file"))


def test_before_linux_6_7_scan_is_chosen():
    choice = choose(replace(PLAIN, kernel=OLD))
    assert (choice.kind, choice.reason) == ("scan", "Linux 6.1 has no PAGEMAP_SCAN (6.7 does)")


def test_an_old_kernel_with_the_feature_ported_back_is_as_good_as_a_new_one():
    assert choose(replace(PLAIN, kernel=replace(OLD, pagemap_scan=True))).kind == "userfaultfd"


def test_a_new_kernel_is_tried_and_not_believed():
    choice = choose(replace(PLAIN, kernel=replace(NEW, pagemap_scan=False)))
    assert choice.kind == "scan" and "PAGEMAP_SCAN does not work here" in choice.reason


def test_userfaultfd_is_chosen_where_nothing_speaks_against_it():
    assert choose(PLAIN) == Choice("userfaultfd", "Linux 6.12.9-amd64 has PAGEMAP_SCAN", False, False)


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        (replace(PLAIN, kernel=replace(NEW, machine="aarch64")), "aarch64"),
        (replace(PLAIN, devices=("vfio-pci",)), "vfio-pci"),
        (replace(PLAIN, devices=("vhost-user-fs-pci",)), "vhost-user-fs-pci"),
        (replace(PLAIN, networks=("tap", "vhost-user")), "vhost-user"),
        (replace(PLAIN, networks=("vhost-vdpa",)), "vhost-vdpa"),
        (replace(PLAIN, block_drivers=("nvme", "raw")), "nvme"),
        (replace(PLAIN, block_drivers=("virtio-blk-vhost-vdpa",)), "virtio-blk-vhost-vdpa"),
        (replace(PLAIN, files=("/dev/kvm", "/dev/vfio/12")), "/dev/vfio/12"),
        (replace(PLAIN, access="QEMU (pid 7) may not be traced"), "pid 7"),
    ],
)
def test_what_speaks_against_it_is_named_and_an_override_does_not_overrule_it(facts, named):
    choice = choose(facts)
    assert choice.kind == "scan" and named in choice.reason
    with pytest.raises(ConflictError, match=r"the userfaultfd tracker cannot be used: .*choose tracker auto or scan"):
        choose(facts, "userfaultfd")
    assert choose(facts, "scan").kind == "scan"


@pytest.mark.parametrize(("scope", "said"), [(0, "as QEMU's user"), (1, "sysctl"), (2, "as root"), (3, "nobody may")])
def test_who_may_not_trace_qemu_is_told_what_to_do(scope, said):
    assert said in tracing_remedy(scope)


def test_the_emulated_nvme_controller_is_no_foreign_device():
    assert choose(replace(PLAIN, devices=("nvme", "nvme-ns"))).kind == "userfaultfd"


def test_scan_can_be_asked_for():
    assert choose(PLAIN, "scan").reason == "the configuration asks for it"


@pytest.mark.parametrize("device", ["virtio-balloon-pci", "virtio-mem-pci", "virtio-balloon-pci-non-transitional"])
def test_memory_that_can_be_discarded_is_noticed(device):
    assert choose(replace(PLAIN, devices=(device,))).discards


def test_facts_are_read_from_what_qemu_answers():
    facts = probe_facts(
        os.getpid(),
        devices=["child<virtio-balloon-pci>", "child<nvdimm>", "nvdimm"],
        block_nodes=[{"drv": "raw", "cache": {"direct": False}}, {"drv": "file", "cache": {"direct": True}}],
        networks="net0: index=0,type=nic,model=virtio-net-pci\r\n \\ n0: index=0,type=vhost-user,chardev=c\r\n",
        kernel=OLD,
    )
    assert facts.devices == ("nvdimm", "virtio-balloon-pci")
    assert facts.block_drivers == ("file", "raw") and facts.direct_io
    assert facts.networks == ("nic", "vhost-user")
    assert facts.kernel is OLD and facts.access is None
