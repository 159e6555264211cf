"""Compares the time of a whole training step with a rule for tokens or rows with the time of the step without a rule.

python -m experiments.step_cost.rules_cost --out=experiments/step_cost/rules.jsonl

All steps are compiled first, and then run alternately in one process. A time is the minimum over the rounds.
"""

import argparse
import json
import time

import jax
import numpy as np
import optax

from kd_jax import models
from kd_jax.objectives import make_terms
from kd_jax.train_step import init_state, make_train_step

# The terms by name. The first is the one with which the others are compared.
TERMS = {
    "none": {},
    "threshold": {"tokens": {"name": "threshold", "of": "teacher_entropy", "at_least": 0.8, "divide_by": "all"}},
    "relative_confidence": {"tokens": {"name": "relative_confidence", "divide_by": "all"}},
    "accept": {"tokens": {"name": "accept", "k": 5, "otherwise": 0.01, "divide_by": "all"}},
    "top_fraction": {"tokens": {"name": "top_fraction", "of": "teacher_entropy", "fraction": 0.5, "divide_by": "kept"}},
    "confidence_product": {"tokens": {"name": "confidence_product", "alpha": 1.0, "beta": 1.0, "divide_by": "all"}},
    "prefix_gap": {"tokens": {"name": "prefix_gap", "gamma": 0.5, "divide_by": "all"}},
    "drop_lowest": {"row_gate": {"name": "drop_lowest", "of": "log_p", "fraction": 0.2}},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds after the warm-up")
    parser.add_argument("--only", default="", help="names of terms besides none; empty: all")
    parser.add_argument("--out", default="", help="file of JSON lines to which the results are appended")
    args = parser.parse_args()

    config = models.ModelConfig(
        family="llama", vocab_size=args.vocab, hidden_size=args.width, num_layers=args.layers, num_heads=9,
        num_kv_heads=3, intermediate_size=args.width * 8 // 3, tie_embeddings=True,
    )  # fmt: skip
    model, tx = models.from_config(config), optax.adamw(1e-4)
    numbers, shape = np.random.default_rng(0), (args.rows, args.length)
    ids = numbers.integers(0, args.vocab, (args.rows, args.length + 1)).astype(np.int32)
    everywhere = np.ones(shape, bool)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "mask": everywhere, "loss_mask": everywhere}
    params, teacher = model.init(jax.random.key(0)), model.init(jax.random.key(1))
    chosen = {name: spec for name, spec in TERMS.items() if not args.only or name in ("none", *args.only.split(","))}
    steps, flops = {}, {}
    for name, spec in chosen.items():
        terms = make_terms({"term": spec})
        state = init_state(params, tx, terms, jax.random.key(0))
        step = make_train_step(model, model, terms, tx, vocab_size=args.vocab, microbatches=args.microbatches)
        compiled = jax.jit(step).lower(state, teacher, batch).compile()
        steps[name] = compiled, state
        flops[name] = (compiled.cost_analysis() or {}).get("flops", 0.0)
    seconds = {name: [] for name in chosen}
    for turn in range(args.rounds + 1):
        for name, (compiled, state) in steps.items():
            start, wall = time.process_time(), time.perf_counter()
            jax.block_until_ready(compiled(state, teacher, batch))
            if turn:  # the first round is a warm-up
                seconds[name].append((time.process_time() - start, time.perf_counter() - wall))
    least = {name: [min(column) for column in zip(*times, strict=True)] for name, times in seconds.items()}
    for name, (cpu, wall) in least.items():
        line = {"term": name, **{key: value for key, value in vars(args).items() if key not in ("only", "out")}}
        line |= {"cpu_s": round(cpu, 4), "wall_s": round(wall, 4), "gflop": round(flops[name] / 1e9, 2)}
        line["ratio"] = round(cpu / least["none"][0], 3)
        print(json.dumps(line), flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
