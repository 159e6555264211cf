"""Distils a large language model into a small one, with any divergence, assistant, schedule and source of text.

The parts of the library may be used by attribute, such as `kd_jax.divergences.forward_kl`. A part is imported when it is
first used.
"""

import importlib
from types import ModuleType

_PARTS = (
    "assistants", "data", "divergences", "evaluate", "head_loss", "models", "objectives", "policy_gradient", "prefixes",
    "run", "schedules", "sharding", "teachers", "train", "train_step",
)  # fmt: skip


def __getattr__(name: str) -> ModuleType:
    if name in _PARTS:
        return importlib.import_module(f"kd_jax.{name}")
    raise AttributeError(f"module 'kd_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PARTS]
