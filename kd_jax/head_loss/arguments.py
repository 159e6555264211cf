"""The arguments of `token_sum`: one model or several, and the check of all shapes."""

from collections.abc import Sequence
from typing import TypeVar, cast

from jaxtyping import Array

from kd_jax.head_loss.sweep import BATCH_AXES

Option = TypeVar("Option")
Arrays = Array | Sequence[Array]  # one array, or one array for each frozen model


def as_list(arrays: Arrays | None, several: bool) -> list[Array | None]:
    """Returns the arrays of the frozen models as a list; [None] without a teacher."""
    if arrays is None or isinstance(arrays, list | tuple):
        return list(arrays) if arrays is not None and several else [None]
    return [cast(Array, arrays)]


def per_model(option: Option | Sequence[Option], count: int) -> list[Option]:
    """Returns an option for each frozen model."""
    return list(option) if isinstance(option, list | tuple) else [cast(Option, option)] * count


def check_shapes(
    named: dict[str, tuple[Array | None, Array | None]], tied: tuple[bool, ...], token_arrays: dict[str, Array],
    devices: int,
) -> None:  # fmt: skip
    """Checks the shapes of all models' hidden states and heads, and of the arrays with a value per token."""
    arrays = {f"{model}_{part}": pair[i] for model, pair in named.items() for i, part in enumerate(("hidden", "head"))}
    shapes = {name: None if array is None else array.shape for name, array in (arrays | token_arrays).items()}
    shapes_in_words = ", ".join(f"{name} {shape}" for name, shape in shapes.items() if shape is not None)
    student, problem = shapes["student_hidden"] or (), ""
    if len(student) != 3 or 0 in student:
        problem = "student_hidden must be [B, L, D] with no side of 0"
    elif student[0] % devices:
        problem = f"the {student[0]} rows must divide over the {devices} devices of the mesh's axes {BATCH_AXES}"
    for model, (hidden, head) in named.items():
        if not problem and (hidden is None) != (head is None):
            problem = f"a teacher needs both {model}_hidden and {model}_head"
    for (model, (hidden, head)), is_tied in zip(named.items(), tied, strict=True):
        if problem or hidden is None or head is None:
            continue
        if hidden.ndim != 3 or hidden.shape[:2] != student[:2]:
            problem = f"{model}_hidden must have student_hidden's B and L"
        elif head.ndim != 2 or 0 in head.shape or head.shape[1 if is_tied else 0] != hidden.shape[-1]:
            axes = "V, D" if is_tied else "D, V"
            problem = f"{model}_head must be [{axes}] with the D of {model}_hidden, because tied={tied}"
    for name, array in token_arrays.items():
        if not problem and (
            array.shape[:2] != student[:2] or 0 in array.shape or (name == "coefficient" and array.ndim > 3)
        ):
            problem = f"{name} must begin with student_hidden's B and L"
    if problem:
        raise ValueError(f"token_sum: {problem}; got {shapes_in_words}.")
