"""What runs inside the VM: standard library only, one file to copy in."""
