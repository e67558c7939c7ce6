"""A description as a generation keeps it, for copies."""

import json
from pathlib import Path

import pytest

from base.errors import ConflictError
from vm import recorded
from vm.config import Description, Disk, Region, Size

DESCRIBED = Description(
    name="demo",
    memory=Size(256 << 20),
    kernel=Path("/boot/vmlinuz"),
    repository="/srv/repository",
    extra=("-nic", "user,model=virtio-net-pci"),
    regions=(Region("pm0", Size(64 << 20)),),
    disks=(Disk("one", Path("/srv/one"), "qcow2"),),
)


def through_json(description):
    return json.loads(json.dumps(recorded.encode(description)))


def test_a_copy_is_described_as_the_vm_was_but_for_its_name_and_where_it_is_kept():
    found = recorded.decode(through_json(DESCRIBED), "demo@1", "copy")
    assert (found.name, found.repository) == ("copy", None)
    assert found.disks == DESCRIBED.disks and found.regions == DESCRIBED.regions
    assert (type(found.memory), found.kernel, found.policy) == (Size, DESCRIBED.kernel, DESCRIBED.policy)


@pytest.mark.parametrize("argument", ["unix:/tmp/qmp,server=on", "socket,id=x,path=/tmp/x", "user,hostfwd=tcp::22-:22"])
def test_what_two_vms_cannot_both_have_needs_another_description(argument):
    described = Description(name="demo", memory=Size(256 << 20), extra=("-qmp", argument))
    with pytest.raises(ConflictError, match=r"two VMs cannot both have: name a VM.toml"):
        recorded.decode(through_json(described), "demo@1", "copy")


@pytest.mark.parametrize("document", [None, 7, {"name": "demo"}, {"name": "demo", "memory": 1, "of_later": 2}])
def test_a_generation_that_says_nothing_of_use_is_refused(document):
    with pytest.raises(ConflictError, match=r"demo@1.*: name a VM.toml"):
        recorded.decode(document, "demo@1", "copy")
