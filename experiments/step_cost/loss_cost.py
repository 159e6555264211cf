"""Compares time and memory of the chunked loss with full logits, with the products alone, or with forward KL.

python -m experiments.step_cost.loss_cost --tokens=4096 --masked=0.1 --against=full --out=experiments/step_cost/losses.jsonl

On a mesh of virtual devices (XLA_FLAGS=--xla_force_host_platform_device_count=8), this measures what masking saves:
python -m experiments.step_cost.loss_cost --mesh=2,2,2 --masked=0.5 --against=unmasked
"""

import argparse
import functools
import inspect
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import assistants, divergences, head_loss, sharding
from kd_jax.head_loss import token_sum
from kd_jax.objectives import token_loss

KEYWORDS = {
    "alpha_divergence": {"alpha": 0.5},
    "alpha_beta": {"alpha": 0.2, "beta": 0.7},
    "alpha_mixture": {"alpha": -3.0},
    "renyi": {"alpha": 0.5},
    "tsallis": {"order": 0.7},
}


def losses() -> dict:
    """Returns a loss for every divergence, for forward KL from the teacher to every assistant, and for TAID."""
    bound = lambda module, name: functools.partial(getattr(module, name), **KEYWORDS.get(name, {}))
    made = {}
    for name in divergences.__all__:
        divergence = bound(divergences, name)
        if "target" in inspect.signature(divergence).parameters:
            made[name] = lambda log_p, log_q, target, divergence=divergence: divergence(log_p, log_q, target=target)
        else:
            made[name] = lambda first, second, target, divergence=divergence: divergence(first, second)
    for name in assistants.__all__:
        loss = token_loss(divergences.forward_kl, bound(assistants, name), ("teacher", "assistant"))
        made[name] = lambda log_p, log_q, target, loss=loss: loss(log_p, log_q, 0.3)
    taid = token_loss(
        divergences.forward_kl, assistants.geometric_mixture, ("assistant", "student"), stop_gradient=True
    )
    made["taid"] = lambda log_p, log_q, target: taid(log_p, log_q, jnp.float32(0.3))
    return made


def takes_logits(name: str) -> bool:
    """Returns True if a loss compares logits and not log-probabilities."""
    divergence = getattr(divergences, name, None)
    return divergence is not None and "teacher_logits" in inspect.signature(divergence).parameters


def full(loss, normalised, hs, ws, ht, wt, coefficient, target):
    """Returns the loss from logits of shape [B, L, V]."""
    sides = (jax.nn.log_softmax(logits) if normalised else logits for logits in (ht @ wt, hs @ ws))
    return jnp.sum(coefficient * loss(*sides, target))


def products(hs, ws, ht, wt, coefficient, target):
    """Computes the four matrix products that every implementation needs, on whole logits, as fast as XLA can."""
    hs, ht = (hidden.reshape(-1, hidden.shape[-1]) for hidden in (hs, ht))
    logits, teacher_logits = hs @ ws, ht @ wt
    d_ws = jax.lax.optimization_barrier(hs.T) @ logits
    return teacher_logits[..., 0].sum() + teacher_logits[..., -1].sum(), (logits @ ws.T, d_ws)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--student", type=int, default=256)
    parser.add_argument("--teacher", type=int, default=512)
    parser.add_argument(
        "--masked", type=float, default=0.1, help="share of the positions with coefficient 0, chosen at random"
    )
    parser.add_argument("--chunk", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds; 0: only compile, to read the memory")
    parser.add_argument("--against", default="full", choices=["full", "products", "forward_kl", "unmasked", "nothing"])
    parser.add_argument("--mesh", default="", help="sizes of data, fsdp and tensor; empty: one device")
    parser.add_argument("--only", default="")
    parser.add_argument("--out", default="")
    args = parser.parse_args()

    numbers = np.random.default_rng(0)
    shape = (8, args.tokens // 8)
    normal = lambda *s: jnp.asarray(numbers.standard_normal(s, np.float32))
    states = (
        normal(*shape, args.student), normal(args.student, args.vocab) * 2 / args.student**0.5,
        normal(*shape, args.teacher), normal(args.teacher, args.vocab) * 2 / args.teacher**0.5,
    )  # fmt: skip
    counted = jnp.asarray(numbers.uniform(size=shape) >= args.masked, jnp.float32) / args.tokens
    target = jnp.asarray(numbers.integers(0, args.vocab, shape))
    mesh, everywhere = None, jnp.full(shape, 1 / args.tokens)
    if args.mesh:
        mesh = sharding.make_mesh(*map(int, args.mesh.split(",")))
        rows, head = (
            sharding.batch_sharding(mesh),
            sharding.tree_shardings(mesh, {"head/kernel": states[1]})["head/kernel"],
        )
        places = (rows, head, rows, head, rows, rows, rows)
        *states, counted, everywhere, target = map(jax.device_put, (*states, counted, everywhere, target), places)
    gradient = functools.partial(jax.value_and_grad, argnums=(0, 1))

    made = losses()

    def chunked(name):
        on_logits = takes_logits(name)
        options = dict(chunk=args.chunk or None, mesh=mesh, normalised=not on_logits, store_blocks=on_logits)
        return gradient(lambda *arrays: token_sum(made[name], *arrays, **options)[0])

    for name, loss in made.items():
        if args.only and name not in args.only.split(","):
            continue
        contenders = {"chunked": (chunked(name), counted)}
        if args.against == "full":
            contenders["full"] = gradient(functools.partial(full, loss, not takes_logits(name))), counted
        if args.against == "products":
            contenders["products"] = products, counted
        if args.against == "unmasked":
            contenders["unmasked"] = chunked(name), everywhere
        if args.against == "forward_kl":
            contenders["forward_kl"] = chunked("forward_kl"), counted
        line = {key: vars(args)[key] for key in ("tokens", "vocab", "student", "teacher", "masked", "mesh")}
        ways = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        line["chunk_piece_block"] = head_loss.sweep.sizes_for(shape, args.vocab, args.chunk or None, ways)
        line = {"loss": name, **line, "backend": jax.default_backend()}
        line |= measure(
            {who: (function, (*states, weights, target)) for who, (function, weights) in contenders.items()},
            args.rounds,
        )
        print(json.dumps(line), flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps(line) + "\n")


def measure(contenders: dict, rounds: int) -> dict:
    """Measures planned temporary memory and the minimum seconds over alternating rounds.

    The first program is compared with the last one.
    """
    compiled = {who: jax.jit(function).lower(*arrays).compile() for who, (function, arrays) in contenders.items()}
    line = {f"{who}_temp_mb": round(run.memory_analysis().temp_size_in_bytes / 1e6, 2) for who, run in compiled.items()}
    seconds = {who: [] for who in compiled}
    before = memory_mb("VmRSS")
    for turn in range(rounds + 1 if rounds else 0):
        for who, run in compiled.items():
            start, wall = time.process_time(), time.perf_counter()
            jax.block_until_ready(run(*contenders[who][1]))
            if turn:
                seconds[who].append((time.process_time() - start, time.perf_counter() - wall))
        if not turn:  # the first round is a warm-up; the peak of memory is measured after it
            Path("/proc/self/clear_refs").write_text("5")
    for who, times in seconds.items():
        for name, column in zip(("cpu_s", "wall_s"), zip(*times, strict=True), strict=False):
            line[f"{who}_{name}"] = round(min(column), 4)
    if rounds and len(contenders) == 1:  # one program per process, as in `torch_losses.py`
        line |= {"impl": "kd_jax"} | {name: line[f"chunked_{name}"] for name in ("cpu_s", "wall_s")}
        line["peak_over_mb"] = round(memory_mb("VmHWM") - before, 1)
    ours, other = next(iter(contenders)), list(contenders)[-1]
    if other != ours:
        line["memory_ratio"] = round(line[f"{other}_temp_mb"] / line[f"{ours}_temp_mb"], 1)
        if rounds:
            line["time_ratio"] = round(line[f"{ours}_cpu_s"] / line[f"{other}_cpu_s"], 3)
            line["wall_ratio"] = round(line[f"{ours}_wall_s"] / line[f"{other}_wall_s"], 3)
    return line


def memory_mb(key: str) -> float:
    """Returns VmRSS, the resident memory of this process, or VmHWM, the peak of it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
