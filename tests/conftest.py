"""Shared by all tests."""

import signal

from hypothesis import HealthCheck, settings

settings.register_profile("perdure", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("perdure")  # how long something takes on a busy machine is no error of it
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a job in the background ignores it, and so would its children
