"""The error of a teacher in int8.

The distributions of the teacher in int8 are compared with the distributions of the same teacher in float.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kd_jax import models, sharding
from kd_jax.divergences import forward_kl
from kd_jax.head_loss import token_sum
from kd_jax.run.build import Run

FILE = "teacher_int8.json"
NEEDED = ("tokens", "mask", "loss_mask")


def error(run: Run) -> dict[str, float]:
    """Returns the error of a run's int8 teacher on the first held-out batch.

    The float teacher is read one layer at a time.

    Args:
      run: a `Run`.

    Returns:
      The numbers of `difference`; {} if the teacher is not in int8, or if the config turns the report off.
    """
    ours = run.config.teacher
    if not (ours.int8_report and ours.path and ours.weights == "int8") or run.models.teacher is None:
        return {}
    place = partial(sharding.tree_shardings, run.mesh, layout=ours.sharding)

    def layer(i: int) -> Any:
        load = partial(models.load_pretrained, models.folder(ours.path), dtype=ours.dtype, shardings=place)
        return load(only=f"layers/{i}/")[1]["layers"][str(i)]

    params = run.models.teacher_params
    return _difference(run, params, params, layer, run.models.teacher.abstract_params())


def difference(run: Run, params: Any, whole: Any) -> dict[str, float]:
    """Returns the difference that other parameters of a run's teacher make on the first held-out batch.

    Args:
      run: a `Run`.
      params: the rounded parameters.
      whole: the parameters before rounding.

    Returns:
      kl: KL(float || int8) in nats, averaged over the counted tokens.
      top1_agreement: the share of the counted tokens for which both have the same most likely token.
      largest_difference: the largest difference of a log-probability of any id, in nats. Log-probabilities are compared
        because logits are defined only up to a constant.
      tokens: the number of counted tokens.
      bytes, float_bytes: the sizes of all parameters on all devices, rounded and before rounding.
    """
    return _difference(run, params, whole, lambda i: whole["layers"][str(i)], whole)


def _difference(run: Run, params: Any, outer: Any, layer: Callable[[int], Any], sizes: Any) -> dict[str, float]:
    """Returns `difference`, from unrounded parameters in two parts: `layer` gives the layers, `outer` all others."""
    teacher, batch, chunk = run.models.teacher, next(run.eval_batches()), run.config.loss.chunk or None
    placed = run.put({name: batch[name] for name in NEEDED})
    inputs = placed["tokens"], placed["mask"]
    hidden = teacher.hidden_by_layers(sharding.for_lookup(run.mesh, outer), layer, *inputs)
    heads = teacher.stored_head(outer)[0], hidden
    values = _values(teacher, params, heads, placed, vocab_size=run.tokenizer.vocab_size, chunk=chunk, mesh=run.mesh)
    found = sharding.fetch_whole(values)[sharding.fetch_whole(placed["loss_mask"])]
    return {
        "kl": float(found[:, 0].mean(dtype=np.float64)),
        "top1_agreement": float(found[:, 1].mean()),
        "largest_difference": float(found[:, 2].max()),
        "tokens": len(found),
        "bytes": _bytes(params),
        "float_bytes": _bytes(sizes),
    }


def sentence(found: dict[str, float]) -> str:
    """Returns the result of `error` as one line of text."""
    return (
        f"int8 teacher beside itself in float, on {found['tokens']:,} tokens: KL(float || int8) {found['kl']:.2e} nats a token, "
        f"top-1 agreement {found['top1_agreement']:.2%}, largest |difference| of a log-probability "
        f"{found['largest_difference']:.3f} nats | {found['bytes'] / 1e6:,.1f} MB in place of {found['float_bytes'] / 1e6:,.1f}"
    )


@partial(jax.jit, static_argnames=("teacher", "vocab_size", "chunk", "mesh"))
def _values(teacher: Any, params: Any, whole: Any, batch: dict[str, Array], mesh: Any, **options: Any) -> Array:
    def values(log_p: Array, log_q: Array) -> Array:
        agree = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)
        largest = jnp.abs(jnp.where(log_p > -jnp.inf, log_p - log_q, 0)).max(axis=-1)
        return jnp.stack([forward_kl(log_p, log_q), agree.astype(log_q.dtype), largest], axis=-1)

    whole_head, whole_hidden = whole
    hidden = teacher.hidden(sharding.for_lookup(mesh, params), batch["tokens"], batch["mask"])
    head, tied = teacher.stored_head(params)
    counted = jnp.repeat(batch["loss_mask"][..., None].astype(jnp.float32), 3, axis=-1)
    return token_sum(
        values, hidden, head, whole_hidden, whole_head, counted, tied=(tied, tied), mesh=mesh, **options
    )[1]  # fmt: skip


def _bytes(params: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
