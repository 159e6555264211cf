"""Checks the values of a config before anything is read: types, ranges, and divisibility."""

import operator
from typing import Any

import jax

from kd_jax import sharding
from kd_jax.storage.directory import flat
from kd_jax.value_types import check_types

PACKINGS = ("none", "rows", "stream")


def check_numbers(config: Any) -> None:
    """Checks the numbers and choices of a config, before anything is read.

    Raises:
      ValueError: a value is out of range or of the wrong type; the message names the key.
    """
    check_declared(config)
    least = {
        "seed": 0,
        "steps": 1,
        "eval_every": 1,
        "eval_prompts": 0,
        "checkpoint_every": 1,
        "log_every": 1,
        "keep_checkpoints": 1,
        "max_skipped": 0,
        "microbatches": 1,
    }
    least |= {"data.batch_size": 1, "data.eval_batch_size": 1, "data.eval_rows": 0, "sample_tokens": 1, "loss.chunk": 0}
    least |= {
        "sampling.max_new_tokens": 1,
        "sampling.rollouts_per_prompt": 1,
        "sampling.show_every": 0,
        "sampling.temperature": 0,
        "sampling.top_k": 0,
        "text.batch_size": 1,
    }
    for name, value in flat(config.to_dict()).items():
        most = 2**32 if name == "seed" else 2**31  # a step is an int32, and 32 bits of a seed are used
        if isinstance(value, int) and value >= most:
            raise ValueError(f"{name}={value} must be below {most}.")
    for name, low in least.items():
        if not (value := operator.attrgetter(name)(config)) >= low:  # written so that nan is refused
            raise ValueError(f"{name}={value} must be at least {low}.")
    for who in ("teacher", "student"):
        if config[who].dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"{who}.dtype={config[who].dtype!r} is not one of float32, bfloat16, float16.")
    if config.student.dtype == "float16":
        raise ValueError(
            "student.dtype='float16' is not supported: small gradients become 0 in float16, whose smallest number is 6e-8. "
            "Use bfloat16, which has the range of float32; teacher.dtype may be float16, since a teacher has no gradient."
        )
    for key, known in {"weights": ("float", "int8"), "sharding": tuple(sharding.LAYOUTS)}.items():
        if config.teacher[key] not in known:
            raise ValueError(f"teacher.{key}={config.teacher[key]!r} is not one of {', '.join(known)}.")
    policies = ["none", *(name for name in dir(jax.checkpoint_policies) if name.endswith("saveable"))]
    if config.student.remat not in policies:
        raise ValueError(f"student.remat={config.student.remat!r} is not one of {', '.join(policies)}.")
    if config.attention not in ("plain", "xla", "cudnn"):
        raise ValueError(f"attention={config.attention!r} is not one of plain, xla, cudnn.")
    if config.attention == "cudnn" and (
        jax.default_backend() != "gpu" or "float32" in (config.teacher.dtype, config.student.dtype)
    ):
        raise ValueError(
            "attention='cudnn' needs an NVIDIA GPU, student.dtype=bfloat16, and teacher.dtype bfloat16 or float16; 'plain' needs "
            "none of these."
        )
    profiled = tuple(config.profile_steps) or (1, config.steps)
    if len(profiled) != 2 or not 1 <= profiled[0] <= profiled[1] <= config.steps:
        raise ValueError(f"profile_steps={config.profile_steps} must be first and last of the {config.steps} steps.")
    if config.data.packing not in PACKINGS:
        raise ValueError(f"data.packing={config.data.packing!r} is not one of {', '.join(PACKINGS)}.")
    for name in ("data", "text"):
        size = config[name].batch_size
        if (name == "data" or config.text.name) and size % config.microbatches:
            raise ValueError(f"{name}.batch_size={size} does not divide into microbatches={config.microbatches}.")


def check_declared(config: Any) -> None:
    """Checks that a config has the keys that `configs/base.py` declares, and values of their types.

    Raises:
      ValueError: a key is missing, or a value has another type.
    """
    from configs import base  # imported here because the rest of kd_jax needs no configs

    check_types(base.get_config(), config, base.OPEN)
    for name, term in config.objective.terms.items():
        if term is not None:
            check_types(base.term(), term, base.OPEN, f"objective.terms.{name}.")
    for key in ("student.layers", "profile_steps"):
        value = operator.attrgetter(key)(config)
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in value):
            raise ValueError(f"{key}={value!r} must be a tuple of whole numbers, such as (0, 3, 6).")


def check_mesh(config: Any, mesh: jax.sharding.Mesh) -> None:
    """Checks that the mesh can divide the rows that are processed at a time."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    microbatch = config.data.batch_size // config.microbatches
    sizes = {"data.batch_size": microbatch, "data.eval_batch_size": config.data.eval_batch_size}
    if config.text.name:
        sizes["text.batch_size"] = config.text.batch_size // config.microbatches
    for name, rows in sizes.items():
        if rows % ways:
            raise ValueError(
                f"{name}={operator.attrgetter(name)(config)} leaves {rows} rows at a time (microbatches={config.microbatches}), "
                f"which the mesh cannot divide over data x fsdp = {ways} devices; choose a multiple."
            )
