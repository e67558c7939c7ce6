"""What every part stands on: errors, units, extents, durable disk operations. Imports nothing of ours."""
