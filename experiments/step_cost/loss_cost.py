"""Time and memory of the chunked loss against full logits and against the matrix products alone, interleaved.

python -m experiments.step_cost.loss_cost --tokens=4096 --masked=0.1 --against=full --out=experiments/step_cost/loss.jsonl
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import assistants, divergences
from kd_jax.head_loss import token_sum
from kd_jax.objectives import token_loss

KEYWORDS = {
    "alpha_divergence": {"alpha": 0.5},
    "alpha_beta": {"alpha": 0.2, "beta": 0.7},
    "alpha_mixture": {"alpha": -3.0},
}


def losses() -> dict:
    """Every divergence, and forward KL from the teacher to every assistant, TAID and AMiD as their configs have them."""
    bound = lambda module, name: functools.partial(getattr(module, name), **KEYWORDS.get(name, {}))
    made = {name: token_loss(bound(divergences, name)) for name in divergences.__all__}
    for name in assistants.__all__:
        loss = token_loss(divergences.forward_kl, bound(assistants, name), ("teacher", "assistant"))
        made[name] = lambda log_p, log_q, loss=loss: loss(log_p, log_q, 0.3)
    taid = token_loss(
        divergences.forward_kl, assistants.geometric_mixture, ("assistant", "student"), stop_gradient=True
    )
    made["taid"] = lambda log_p, log_q: taid(log_p, log_q, jnp.float32(0.3))
    return made


def full(loss, hs, ws, ht, wt, coefficient):
    """The same number from [B, L, V] logits."""
    log_p, log_q = jax.nn.log_softmax(ht @ wt), jax.nn.log_softmax(hs @ ws)
    return jnp.sum(coefficient * loss(log_p, log_q))


def products(hs, ws, ht, wt, coefficient):
    """The four matrix products that no implementation can do without, on whole logits."""
    logits, teacher_logits = hs @ ws, ht @ wt
    d_ws = jnp.einsum("bld,blv->dv", hs, logits)
    return teacher_logits[..., 0].sum() + teacher_logits[..., -1].sum(), (logits @ ws.T, d_ws)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--student", type=int, default=256)
    parser.add_argument("--teacher", type=int, default=512)
    parser.add_argument("--masked", type=float, default=0.1)
    parser.add_argument("--chunk", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", default="full", choices=["full", "products", "nothing"])
    parser.add_argument("--only", default="")
    parser.add_argument("--out", default="")
    args = parser.parse_args()

    numbers = np.random.default_rng(0)
    shape = (8, args.tokens // 8)
    normal = lambda *s: jnp.asarray(numbers.normal(size=s) / s[-2 if len(s) == 2 else -1] ** 0.5, jnp.float32)
    arrays = (
        normal(*shape, args.student) * args.student**0.5, normal(args.student, args.vocab) * 2,
        normal(*shape, args.teacher) * args.teacher**0.5, normal(args.teacher, args.vocab) * 2,
        jnp.asarray(numbers.uniform(size=shape) >= args.masked, jnp.float32) / args.tokens,
    )  # fmt: skip
    chosen = {n: loss for n, loss in losses().items() if not args.only or n in args.only.split(",")}
    for name, loss in chosen.items():

        def ours(hs, ws, ht, wt, coefficient, loss=loss):
            return token_sum(loss, hs, ws, ht, wt, coefficient, chunk=args.chunk or None)[0]

        contenders = {"chunked": jax.value_and_grad(ours, argnums=(0, 1))}
        if args.against == "full":
            contenders["full"] = jax.value_and_grad(functools.partial(full, loss), argnums=(0, 1))
        if args.against == "products":
            contenders["products"] = products
        compiled = {who: jax.jit(function).lower(*arrays).compile() for who, function in contenders.items()}
        seconds = {who: [] for who in compiled}
        for function in compiled.values():
            jax.block_until_ready(function(*arrays))
        for _ in range(args.rounds):
            for who, function in compiled.items():
                start = time.process_time()
                jax.block_until_ready(function(*arrays))
                seconds[who].append(time.process_time() - start)
        line = {
            "loss": name,
            "tokens": args.tokens,
            "vocab": args.vocab,
            "student": args.student,
            "teacher": args.teacher,
        }
        line |= {"masked": args.masked, "chunk": args.chunk, "backend": jax.default_backend()}
        for who, function in compiled.items():
            line[f"{who}_cpu_s"] = round(min(seconds[who]), 4)
            line[f"{who}_temp_mb"] = round(function.memory_analysis().temp_size_in_bytes / 1e6, 2)
        for other in set(compiled) - {"chunked"}:
            line["time_ratio"] = round(line["chunked_cpu_s"] / line[f"{other}_cpu_s"], 3)
            line["memory_ratio"] = round(line[f"{other}_temp_mb"] / line["chunked_temp_mb"], 1)
        print(json.dumps(line), flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
