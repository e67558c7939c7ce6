"""QEMU and its guest: launch, monitor, address map, regions, userfaultfd, guest channel."""
