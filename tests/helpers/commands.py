"""Helpers for processes that a test starts: their environment variables and a free port."""

import os
import socket


def environment(devices):
    return os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
