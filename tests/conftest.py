"""Eight CPU devices, set before JAX starts, and shapes that are checked where signatures give them."""

import os
import signal
import tempfile

import pytest
from jaxtyping import install_import_hook

from tests.helpers import checker  # noqa: F401  # the hook finds it by its name

# Most of a test's time is the compiler's. Without LLVM's optimisations it needs half of that time for the same program.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A shell makes its jobs in the background ignore Ctrl-C, and processes inherit that. Tests send it, also to such processes.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# A run that is stopped and resumed compiles its programs once.
_CACHE = tempfile.TemporaryDirectory()
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

# The pure core only: the hook breaks dataclasses that are pytrees. What is imported later keeps the hook.
PURE = ("logspace", "divergences", "assistants", "objectives", "head_loss")
install_import_hook([f"kd_jax.{name}" for name in PURE], "tests.helpers.checker.check")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Where the tests' runs build their datasets, once."""
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="module")
def one_device():
    """Runs use the first of the eight devices, unless they ask for a mesh."""
    import jax

    from kd_jax import sharding

    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sharding,
            "make_mesh",
            # data=-1, all that are left, is one here
            lambda data, fsdp, tensor: make_mesh(data, fsdp, tensor, jax.devices()[: abs(data) * fsdp * tensor]),
        )
        yield
