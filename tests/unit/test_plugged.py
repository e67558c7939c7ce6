"""Which devices arguments name."""

from vm.plugged import ids


def test_ids_of_devices_in_either_form():
    argv = ["qemu", "-device", "nvdimm,memdev=m,id=nvdimm-pm0", "-device", '{"driver":"virtio-blk-pci","id":"disk-a"}']
    argv += ["-nic", "user,id=net", "-device", "pvpanic-pci", "-object", "id=x"]
    assert ids(argv) == {"nvdimm-pm0", "disk-a"}
    assert ids(["-device", "{not JSON", "-device", "[1]", "-device", "{}"]) == set()
