"""Keys: their files, the slots that open them, and which key opens what."""
