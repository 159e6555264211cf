"""A record of the environment in which a result was computed."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import jax

from kd_jax import storage
from kd_jax.storage.files import Json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "tokenizers", "numpy")


def write_environment(folder: Path) -> None:
    """Writes environment.json: date, command, commit, devices, processes, machine, and versions."""
    storage.write_whole(folder / "environment.json", json.dumps(_environment(), indent=2) + "\n")


def _environment() -> Json:
    kinds = [device.device_kind for device in jax.devices()]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(sys.argv),
        "commit": _commit(),
        "devices": ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)),
        "processes": jax.process_count(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "python": platform.python_version(),
    } | {name: importlib.metadata.version(name) for name in PACKAGES}


def _commit() -> str:
    """Returns the commit of the running checkout, or "unknown" outside a checkout.

    The suffix ", changed" means that tracked files differ from the commit.
    """
    folder = Path(__file__).parent
    try:
        commit, changes = (
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=10).stdout
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit.strip() + (", changed" if changes.strip() else "")
