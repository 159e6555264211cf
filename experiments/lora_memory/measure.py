"""Prints the memory that a step of SmolLM2-135M is planned to need: all parameters, LoRA, and a frozen part.

    python experiments/lora_memory/measure.py

The step is compiled ahead of time for arrays without content, so no model is needed. The student has the sizes of
SmolLM2-135M, and learns from tokens alone, so that no teacher adds to the memory.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import qwix
from jaxtyping import PyTree

from kd_jax import models
from kd_jax.models.int8 import is_matrix
from kd_jax.models.trained import find_targets, select
from kd_jax.objectives import make_terms
from kd_jax.settings import Term, defaults
from kd_jax.sharding import path_name
from kd_jax.train_step import init_state, make_train_step

ROWS, LENGTH = 1, 512
CONFIG = models.ModelConfig(
    family="llama", vocab_size=49152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
    intermediate_size=1536, max_positions=2048, tie_embeddings=True, rope_theta=100000.0,
)  # fmt: skip
TERMS = make_terms({"labels": defaults(Term) | {"kind": "hard_labels"}})
TX = optax.adamw(1e-4)


def main() -> None:
    model = models.from_config(CONFIG)
    lora = models.Lora(16, 16.0, 0.0, False, find_targets(["all-linear"], model))
    lines = {
        "all parameters": (None, "float32"),
        "LoRA of rank 16, base in float32": (lora, "float32"),
        "LoRA of rank 16, base in bfloat16": (lora, "bfloat16"),
        "LoRA of rank 16, base in int8 and bfloat16": (lora, "int8"),
        "LoRA of rank 16 on q_proj and v_proj, bfloat16": (
            dataclasses.replace(lora, owners=find_targets(["q_proj", "v_proj"], model)),
            "bfloat16",
        ),
        "embedding and layers 0 to 19 frozen, bfloat16": (
            models.Chosen.of(r"embed/.*|layers/1?\d/.*", model),
            "bfloat16",
        ),
    }
    print("| trained | trained parameters | frozen MB | state MB | temporary MB | sum MB |\n|---|--:|--:|--:|--:|--:|")
    for name, (part, dtype) in lines.items():
        print(f"| {name} | {' | '.join(_measure(model, part, dtype))} |", flush=True)


def _measure(model: models.Model, part: models.Part | None, dtype: str) -> list[str]:
    """Returns the number of trained parameters, and the MB of frozen parameters, state, temporary arrays, and all."""
    params = model.abstract_params()
    trained, frozen = params, None
    if part is not None:
        trained = select(params, lambda name: not part.is_frozen(name))
        if isinstance(part, models.Lora):
            trained = jax.eval_shape(lambda key: part.init(key, model), jax.random.key(0))
        frozen = _in_type(select(params, part.is_frozen), dtype)
        model = dataclasses.replace(model, param_dtype="float32" if dtype == "float32" else "bfloat16")
    state = jax.eval_shape(lambda trained, key: init_state(trained, TX, TERMS, key), trained, jax.random.key(0))
    step = jax.jit(make_train_step(model, None, TERMS, TX, vocab_size=CONFIG.vocab_size, part=part), donate_argnums=0)
    array = lambda dtype: jax.ShapeDtypeStruct((ROWS, LENGTH), dtype)
    batch = {"tokens": array(jnp.int32), "targets": array(jnp.int32), "mask": array(bool), "loss_mask": array(bool)}
    frozen_params = None if part is None else {"student": frozen}
    planned = step.lower(state, frozen_params, batch).compile().memory_analysis()
    sizes = _bytes(frozen), _bytes(state), planned.temp_size_in_bytes
    return [
        f"{sum(leaf.size for leaf in jax.tree.leaves(trained)):,}",
        *(f"{size / 1e6:,.0f}" for size in (*sizes, sum(sizes))),
    ]


def _in_type(params: PyTree, dtype: str) -> PyTree:
    """Returns the shapes of frozen parameters in a type; with int8, the parameters outside the matrices in bfloat16."""

    def leaf_of(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> PyTree:
        if dtype == "int8" and is_matrix(path_name(path)):
            scale = jax.ShapeDtypeStruct((1, leaf.shape[1]), jnp.float32)
            return qwix.QArray(jax.ShapeDtypeStruct(leaf.shape, jnp.int8), scale)
        return jax.ShapeDtypeStruct(leaf.shape, "bfloat16" if dtype == "int8" else dtype)

    return jax.tree.map_with_path(leaf_of, params)


def _bytes(tree: PyTree) -> int:
    is_key = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if not is_key(leaf))


if __name__ == "__main__":
    main()
