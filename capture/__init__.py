"""Trackers and generations of a running VM."""
