r"""Measures the bytes of each kind of cache, the student's gradient from it, and a short run from it.

The gradient and the run are compared with those of the online teacher.

PYTHONPATH=. python experiments/teacher_cache/measure.py \
  --teacher=FOLDER --student=FOLDER --data=FILE.jsonl.gz --out=runs/teacher_cache
"""

import argparse
import gzip
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from configs import forward_kl
from kd_jax import cache_teacher, divergences, metrics, train
from kd_jax.objectives import token_coefficients
from kd_jax.teachers import compare
from kd_jax.teachers.cached import sampled_forward_kl

CACHES = {
    "hidden": ("hidden", 1), "top_k, 16": ("top_k", 16), "top_k, 64": ("top_k", 64), "top_k, 256": ("top_k", 256),
    "samples, 64": ("samples", 64), "samples, 8 x 64": ("samples", 512),
}  # fmt: skip
TRAINED = ("online", "hidden", "top_k, 16", "top_k, 64", "samples, 64")


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("teacher", "student", "data", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--lines", type=int, default=400, help="number of lines to use, from the start of the data")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument(
        "--stages",
        default="write,gradients,runs,times",
        help="stages to run; results.jsonl has the results of the others",
    )
    args = parser.parse_args()
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    if not rows.exists():
        with gzip.open(args.data, "rt", encoding="utf-8") as file:
            rows.write_text("".join(line for line, _ in zip(file, range(args.lines), strict=False)), encoding="utf-8")

    def configured(cache: str = ""):
        config = forward_kl.get_config("dolly_smollm2")
        config.teacher.path, config.teacher.cache = args.teacher, cache
        config.student.init, config.student.path = "pretrained", args.student
        config.data.name = "jsonl"
        with config.unlocked():
            config.data.options = {
                "path": str(rows), "prompt_field": "instruction", "context_field": "context", "validation_fraction": 0.1,
            }  # fmt: skip
        config.data.data_dir = str(folder / "data")
        config.data.max_length, config.data.max_prompt_length, config.data.eval_rows = 112, 64, 24
        config.learning_rate.init_value, config.steps = 2e-4, args.steps
        return config

    folders = {name: str(folder / name.replace(", ", "_").replace(" ", "")) for name in CACHES}
    results = folder / "results.jsonl"
    lines = [{"cache": name} for name in ("online", *CACHES)]
    if results.exists():
        lines = [json.loads(line) for line in results.read_text().splitlines()]
    for stage in args.stages.split(","):
        {"write": write, "gradients": gradients, "runs": runs, "times": times}[stage](lines, configured, folders)
        results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(table(lines))


def write(lines: list, configured, folders: dict) -> None:
    """Writes the caches, and adds the bytes per token of each."""
    for line in lines[1:]:
        kind, k = CACHES[line["cache"]]
        manifest = cache_teacher.write(configured(), folders[line["cache"]], kind, k)
        tokens = sum(split["tokens"] for split in manifest["splits"].values())
        size = sum(file.stat().st_size for file in Path(folders[line["cache"]]).rglob("*.array_record"))
        line |= {"tokens": tokens, "bytes_per_token": size / tokens}


def gradients(lines: list, configured, folders: dict) -> None:
    """Adds the cosine and the relative distance between the gradient of two batches and the online gradient."""
    exact = {}
    for line in lines:
        name = line["cache"]
        run = train.build(configured(folders.get(name, "")))
        params = run.init_state().params
        batches = [run.batch(step, params) for step in range(2)]
        for of in ("forward_kl", "reverse_kl"):
            if name.startswith("samples") and of == "reverse_kl":
                continue
            divergence = sampled_forward_kl if name.startswith("samples") else getattr(divergences, of)

            def loss(params, batch, run=run, divergence=divergence):
                return compare(
                    lambda log_p, student_side, log_q: divergence(log_p, student_side), run.models.student, params,
                    run.models.compared_teacher, run.models.teacher_params, batch, token_coefficients("token", batch["loss_mask"]),
                    vocab_size=run.tokenizer.vocab_size,
                )[0]  # fmt: skip

            value_and_gradient = jax.jit(jax.value_and_grad(loss))
            values = [value_and_gradient(params, batch) for batch in batches]
            gradient = jax.tree.map(lambda *parts: sum(parts) / len(parts), *(g for _, g in values))
            if name == "online":
                exact[of] = gradient
            distance = optax.tree.norm(jax.tree.map(jnp.subtract, gradient, exact[of])) / optax.tree.norm(exact[of])
            cosine = optax.tree.vdot(gradient, exact[of]) / (optax.tree.norm(gradient) * optax.tree.norm(exact[of]))
            line[of] = {
                "value": float(sum(v for v, _ in values) / len(values)),
                "cosine": float(cosine), "distance": float(distance)
            }  # fmt: skip
            print(name, of, line[of], flush=True)


def runs(lines: list, configured, folders: dict) -> None:
    """Adds the losses of each run, and measures its student with the online teacher."""
    online = train.build(configured())
    for line in lines:
        name = line["cache"]
        if name not in TRAINED:
            continue
        run = online if name == "online" else train.build(configured(folders[name]))
        state, losses = run.init_state(), []
        for step in range(run.config.steps):
            state, sums = run.train_step(state, run.models.teacher_params, run.batch(step, state.params))
            losses.append(float(sums["loss"][0]))
        line |= {
            "losses": losses,
            "held_out": online.evaluate(state.params),
            "by_the_cache": run.evaluate(state.params),
        }
        print(name, line["losses"][-1], flush=True)


def times(lines: list, configured, folders: dict) -> None:
    """Adds the CPU seconds of a step: the median over five steps on one batch, after a first step."""
    for line in lines:
        name = line["cache"]
        if name not in TRAINED:
            continue
        run = train.build(configured(folders.get(name, "")))
        state, seconds = run.init_state(), []
        batch = run.batch(0, state.params)
        for _ in range(6):
            start = time.process_time()
            state, sums = run.train_step(state, run.models.teacher_params, batch)
            jax.block_until_ready((state, sums))
            seconds.append(time.process_time() - start)
        line["cpu_seconds_per_step"] = statistics.median(seconds[1:])
        print(name, line["cpu_seconds_per_step"], flush=True)


def table(lines: list) -> str:
    """Returns the results as Markdown tables."""
    rows = [["cache", "bytes a token", "KL(p,q): cosine", "distance", "KL(q,p): cosine", "distance"]]
    for line in lines[1:]:
        cells = [
            f"{line[of][what]:.5f}" if of in line else ""
            for of in ("forward_kl", "reverse_kl")
            for what in ("cosine", "distance")
        ]
        rows.append([line["cache"], f"{line['bytes_per_token']:.0f}", *cells])
    trained = [line for line in lines if "losses" in line]
    steps = [["step", *(line["cache"] for line in trained)]]
    steps += [[str(i + 1), *(f"{line['losses'][i]:.4f}" for line in trained)] for i in range(len(trained[0]["losses"]))]
    for what in ("forward_kl", "reverse_kl", "cross_entropy"):
        steps.append([f"held out: {what}", *(f"{line['held_out'][what]:.4f}" for line in trained)])
    if all("cpu_seconds_per_step" in line for line in trained):
        steps.append(["CPU seconds a step", *(f"{line['cpu_seconds_per_step']:.1f}" for line in trained)])
    return metrics.table(rows) + "\n\n" + metrics.table(steps)


if __name__ == "__main__":
    main()
