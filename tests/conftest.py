"""Sets up eight CPU devices before JAX starts, and checks arrays against the shapes in the signatures."""

import atexit
import os
import signal
import tempfile

import pytest
from jaxtyping import install_import_hook

from tests.helpers import checker  # noqa: F401  # the import hook looks this module up by name
from tests.helpers.commands import xla_flags

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(devices=8)}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Background jobs of a shell ignore Ctrl-C, and their children inherit this. Some tests send Ctrl-C to a child.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Runs share a compilation cache, so that a resumed run does not compile again.
_CACHE = tempfile.TemporaryDirectory()
atexit.register(_CACHE.cleanup)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

# The hook checks only the pure core, because it breaks dataclasses that are pytrees. It affects later imports.
PURE = ("logspace", "divergences", "assistants", "objectives", "head_loss")
install_import_hook([f"kd_jax.{name}" for name in PURE], "tests.helpers.checker.check")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """The folder in which the runs of all tests build their datasets once."""
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="module")
def one_device():
    """Restricts runs to the first of the eight devices, unless a run asks for a mesh."""
    import jax

    from kd_jax import sharding

    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sharding,
            "make_mesh",
            # data=-1 means all remaining devices, which is one device here
            lambda data, fsdp, tensor: make_mesh(data, fsdp, tensor, jax.devices()[: abs(data) * fsdp * tensor]),
        )
        yield
