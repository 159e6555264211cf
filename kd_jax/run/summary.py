"""The lines that a run prints first: its method, models, data, devices and step."""

from typing import Any

import jax

from kd_jax.data.counts import sentence, warnings
from kd_jax.run.build import Run
from kd_jax.train_step import TrainState


def of(run: Run, state: TrainState) -> str:
    """Returns one line with the devices, the mesh, the parameter counts and the row counts."""
    device = jax.devices()[0]
    mesh = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    teacher = f"teacher {_count(run.models.teacher.abstract_params())}" if run.models.teacher else "no teacher"
    if run.models.writer:
        writer = _count(run.models.writer.model.abstract_params())
        teacher = f"teacher {writer}, of which only its text is used, since its tokenizer is another one"
    if run.models.cached:
        teacher = f"{run.models.cached.described(run.config.teacher.path)}, without texts and KLs on the student's own"
    rows = "; ".join(sentence(split, counts) for split, counts in run.counts.items())
    return (
        f"{len(jax.devices())} {device.platform} device(s), {jax.process_count()} process(es) | mesh {mesh} | {teacher}, "
        f"student {_count(state.params)} parameters | {rows} | step {int(state.step)} of {run.config.steps}"
    )


def too_long(run: Run) -> list[str]:
    """Returns a warning, with advice, for each split in which many prompts or responses are too long."""
    options = run.config.data
    other = {"drop": "cut, which truncates the prompts", "cut": "drop, which leaves such rows out"}[
        options.long_prompts
    ]
    advice = {
        "prompts": f"Raise data.max_prompt_length={options.max_prompt_length}, and data.max_length={options.max_length} with it; "
        f"or set data.long_prompts to {other}.",
        "responses": f"Raise data.max_length={options.max_length}, or lower data.max_prompt_length="
        f"{options.max_prompt_length}.",
    }
    return [line for split, counts in run.counts.items() for line in warnings(split, counts, **advice)]


def _count(params: Any) -> str:
    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:.2f}M"
