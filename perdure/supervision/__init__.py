"""The supervisor of one VM: launching it, its reboots, its captures, and going back."""
