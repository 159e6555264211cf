"""The error of a teacher in int8: the distributions are compared with the distributions of the same teacher in float."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

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
    options = run.config.teacher
    if not (options.int8_report and options.path and options.weights == "int8") or run.models.teacher is None:
        return {}
    shardings_of = partial(sharding.tree_shardings, run.mesh, layout=options.sharding)

    def layer(i: int) -> PyTree:
        load = partial(models.load_pretrained, models.folder(options.path), dtype=options.dtype, shardings=shardings_of)
        return load(only=f"layers/{i}/")[1]["layers"][str(i)]

    params = run.models.teacher_params
    return _difference(run, params, params, layer, run.models.teacher.abstract_params())


def difference(run: Run, params: PyTree, float_params: PyTree) -> dict[str, float]:
    """Returns the differences that rounded parameters of a run's teacher cause on the first held-out batch.

    Args:
      run: a `Run`.
      params: the rounded parameters.
      float_params: the parameters before rounding.

    Returns:
      kl: KL(float || int8) in nats, averaged over the counted tokens.
      top1_agreement: the share of the counted tokens for which both models have the same most likely token.
      largest_difference: the largest difference of a log-probability of any id, in nats. Log-probabilities are compared
        because logits are defined only up to a constant.
      tokens: the number of counted tokens.
      bytes, float_bytes: the sizes of all parameters on all devices, rounded and before rounding.
    """
    return _difference(run, params, float_params, lambda i: float_params["layers"][str(i)], float_params)


def _difference(
    run: Run, params: PyTree, outer: PyTree, layer: Callable[[int], PyTree], sizes: PyTree
) -> dict[str, float]:
    """Returns `difference`, from float parameters in two parts: `layer` gives the layers, `outer` all others.

    The tree `sizes` has the shapes and types of the float parameters.
    """
    teacher, batch, chunk = run.models.require_teacher(), next(run.eval_batches()), run.config.loss.chunk or None
    placed = run.put({name: batch[name] for name in NEEDED})
    inputs = placed["tokens"], placed["mask"]
    float_hidden = teacher.hidden_by_layers(sharding.for_lookup(run.mesh, outer), layer, *inputs)
    values = _values(
        teacher, params, float_hidden, teacher.stored_head(outer)[0], placed, vocab_size=run.tokenizer.vocab_size,
        chunk=chunk, mesh=run.mesh,
    )  # fmt: skip
    counted = sharding.fetch_whole(values)[sharding.fetch_whole(placed["loss_mask"])]
    return {
        "kl": float(counted[:, 0].mean(dtype=np.float64)),
        "top1_agreement": float(counted[:, 1].mean()),
        "largest_difference": float(counted[:, 2].max()),
        "tokens": len(counted),
        "bytes": _bytes(params),
        "float_bytes": _bytes(sizes),
    }


def sentence(values: dict[str, float]) -> str:
    """Returns the result of `error` as one line of text."""
    return (
        f"int8 teacher compared with the float teacher on {values['tokens']:,} tokens: KL(float || int8) {values['kl']:.2e} nats "
        f"per token, top-1 agreement {values['top1_agreement']:.2%}, largest |difference| of a log-probability "
        f"{values['largest_difference']:.3f} nats | {values['bytes'] / 1e6:,.1f} MB instead of {values['float_bytes'] / 1e6:,.1f} MB"
    )


@partial(jax.jit, static_argnames=("teacher", "vocab_size", "chunk", "mesh"))
def _values(
    teacher: models.Model, params: PyTree, float_hidden: Array, float_head: Array, batch: dict[str, Array], *,
    vocab_size: int, chunk: int | None, mesh: jax.sharding.Mesh,
) -> Array:  # fmt: skip
    """Returns KL(float || int8), the agreement of the top token, and the largest difference at each token, [B, L, 3]."""

    def values(log_p: Array, log_q: Array) -> Array:
        agree = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)
        largest = jnp.abs(jnp.where(log_p != -jnp.inf, log_p - log_q, 0)).max(axis=-1)
        return jnp.stack([forward_kl(log_p, log_q), agree.astype(log_q.dtype), largest], axis=-1)

    hidden = teacher.hidden(sharding.for_lookup(mesh, params), batch["tokens"], batch["mask"])
    (head, tied), cap = teacher.stored_head(params), teacher.logit_cap
    counted = jnp.repeat(batch["loss_mask"][..., None].astype(jnp.float32), 3, axis=-1)
    return token_sum(
        values, hidden, head, float_hidden, float_head, counted, tied=(tied, tied), soft_caps=(cap, cap), mesh=mesh,
        vocab_size=vocab_size, chunk=chunk,
    )[1]  # fmt: skip


def _bytes(params: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
