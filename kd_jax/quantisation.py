"""What a teacher's weights in int8 change: its distributions beside those of the same teacher in float."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kd_jax import models, sharding
from kd_jax.compare import compare
from kd_jax.divergences import forward_kl
from kd_jax.setup import folder

FILE = "teacher_int8.json"
NEEDED = ("tokens", "mask", "loss_mask")


def error(run: Any) -> dict[str, float]:
    """The error of a run's int8 teacher on the first held-out batch, for which it is loaded in float beside it, and let go.

    Args:
      run: a `train.Run`.

    Returns:
      As `difference`; {} where the teacher is not in int8, or the config does without.
    """
    ours = run.config.teacher
    if not (ours.int8_report and ours.path and ours.weights == "int8") or ours.cache:
        return {}
    place = partial(sharding.tree_shardings, run.mesh, layout=ours.sharding)
    _, whole = models.load_pretrained(folder(ours.path), dtype=ours.dtype, shardings=place)
    return difference(run, run.models.teacher_params, whole)


def difference(run: Any, params: Any, whole: Any) -> dict[str, float]:
    """What other parameters of a run's teacher change on the first held-out batch.

    Args:
      run: a `train.Run`.
      params: the rounded ones.
      whole: those that they came from.

    Returns:
      kl: KL(float || int8) in nats, averaged over the tokens that count.
      top1_agreement: the share of them where both have the same likeliest token.
      largest_difference: of the log-probability of any id, in nats: logits have no zero until they are normalised.
      tokens: so many.
      bytes, float_bytes: of all parameters, wherever they are.
    """
    teacher, batch, chunk = run.models.teacher, next(run.eval_batches()), run.config.loss.chunk or None
    placed = run.put({name: batch[name] for name in NEEDED})
    values = _values(teacher, params, whole, placed, vocab_size=run.tokenizer.vocab_size, chunk=chunk, mesh=run.mesh)
    found = sharding.fetch_whole(values)[sharding.fetch_whole(placed["loss_mask"])]
    return {
        "kl": float(found[:, 0].mean(dtype=np.float64)),
        "top1_agreement": float(found[:, 1].mean()),
        "largest_difference": float(found[:, 2].max()),
        "tokens": len(found),
        "bytes": _bytes(params),
        "float_bytes": _bytes(whole),
    }


def sentence(found: dict[str, float]) -> str:
    """`error` in a line."""
    return (
        f"int8 teacher beside itself in float, on {found['tokens']:,} tokens: KL(float || int8) {found['kl']:.2e} nats a token, "
        f"top-1 agreement {found['top1_agreement']:.2%}, largest |difference| of a log-probability "
        f"{found['largest_difference']:.3f} nats | {found['bytes'] / 1e6:,.1f} MB in place of {found['float_bytes'] / 1e6:,.1f}"
    )


@partial(jax.jit, static_argnames=("teacher", "vocab_size", "chunk", "mesh"))
def _values(teacher: Any, params: Any, whole: Any, batch: dict[str, Array], **options: Any) -> Array:
    def values(log_p: Array, seen: Array, log_q: Array) -> Array:
        agree = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)
        largest = jnp.abs(jnp.where(log_p > -jnp.inf, log_p - log_q, 0)).max(axis=-1)
        return jnp.stack([forward_kl(log_p, log_q), agree.astype(log_q.dtype), largest], axis=-1)

    counted = jnp.repeat(batch["loss_mask"][..., None].astype(jnp.float32), 3, axis=-1)
    return compare(values, teacher, params, teacher, whole, batch, counted, **options)[1]


def _bytes(params: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
