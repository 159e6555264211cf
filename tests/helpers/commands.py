"""Helpers for processes that a test starts: their environment variables and a free port."""

import os
import socket

# Compilation takes most of a test's time. These flags turn off LLVM's optimisations, parallel code generation and, where
# jaxlib still has others, the newer fusion emitters. tests/README.md has the times.
FAST_COMPILATION = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)


def xla_flags(devices):
    """Returns XLA's flags for a number of CPU devices."""
    return f"{FAST_COMPILATION} --xla_force_host_platform_device_count={devices}"


def environment(devices):
    return os.environ | {"XLA_FLAGS": xla_flags(devices)}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
