"""The disks of a VM that went back: images on a read-only export of a generation, until they are filled."""
