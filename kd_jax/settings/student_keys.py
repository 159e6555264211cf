"""Declares the keys of the student, and checks the keys that choose the trained part of the student."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kd_jax.settings.declare import key, section

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Lora:
    rank: int = key(0, "rank of the product that is added to each target matrix; 0: no LoRA", least=0)
    alpha: float = key(16.0, "numerator of the scale of the product", least=0)
    scaling: str = key(
        "rank", "rank: scale alpha / rank; root: alpha / sqrt(rank), called rsLoRA", choices=("rank", "root")
    )
    targets: tuple[str, ...] = key(
        ("all-linear",), "all-linear, names as in PEFT such as q_proj, or patterns of parameter paths"
    )
    dropout: float = key(0.0, "probability of dropout of each input of the product, during training only", least=0)
    path: str = key(
        "", "a folder with an adapter of PEFT to continue from, whose rank, alpha, scaling and targets are used"
    )


@dataclasses.dataclass(frozen=True)
class Student:
    init: str = key(
        "random", "random (sizes in config), pretrained (path), or layers (of the teacher)",
        choices=("random", "pretrained", "layers"),
    )  # fmt: skip
    path: str = key("", "for init=pretrained: a Hugging Face folder, or hf://ORG/NAME")
    layers: tuple[int, ...] = key(
        (), "for init=layers: indices of the teacher's layers to copy, counted from 0", numbers=True
    )
    config: Mapping[str, Any] = key({}, "for init=random: keywords of kd_jax.models.ModelConfig", is_open=True)
    dtype: str = key("float32", "number type of the computation; trained parameters are float32", choices=DTYPES)
    remat: str = key("none", "none, or a policy of jax.checkpoint_policies: values kept for the backward pass")
    lora: Lora = section(Lora, "low-rank factors beside frozen parameters; only the factors are trained")
    freeze: str = key("", "glob or regular expression of the paths of parameters that are not trained; empty: none")
    frozen_dtype: str = key("float32", "number type of the frozen parameters", choices=DTYPES)
    frozen_weights: str = key(
        "float", "float: as in frozen_dtype; int8: frozen matrices of the layers in int8", choices=("float", "int8")
    )


def check_part(student: Student) -> None:
    """Checks the keys that choose the part of the student that is trained.

    Raises:
      ValueError: two keys contradict each other, or a value has no effect; the message names the keys.
    """
    lora, default = student.lora, Lora()
    is_lora = bool(lora.rank or lora.path)
    changed = [name for name, value in vars(lora).items() if value != getattr(default, name)]
    if changed and not is_lora:
        raise ValueError(
            f"student.lora.{changed[0]}={getattr(lora, changed[0])!r} has no effect, because student.lora.rank is 0: set "
            f"student.lora.rank, such as 16."
        )
    if is_lora and student.freeze:
        raise ValueError(
            f"student.freeze={student.freeze!r} and student.lora: with LoRA all parameters of the student are frozen; leave "
            f"student.freeze empty, and choose the matrices by student.lora.targets."
        )
    if lora.rank and (not lora.targets or lora.alpha <= 0 or not all(isinstance(name, str) for name in lora.targets)):
        raise ValueError(
            f"student.lora.targets={lora.targets!r} must have at least one name, and student.lora.alpha={lora.alpha} must be "
            f"above 0."
        )
    if lora.dropout >= 1:
        raise ValueError(f"student.lora.dropout={lora.dropout} must be at least 0 and below 1.")
    for name in ("frozen_dtype", "frozen_weights"):
        if getattr(student, name) != getattr(Student(), name) and not (is_lora or student.freeze):
            raise ValueError(
                f"student.{name}={getattr(student, name)!r}, but no parameter of the student is frozen: set "
                f"student.lora.rank or student.freeze, or leave student.{name} at its default."
            )
