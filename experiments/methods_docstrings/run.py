"""Trains every method from the same fine-tuned student on the docstrings, with equal tokens, seeds and sampler.

python -m kd_jax.main --config=configs/sft.py --workdir=runs/start --config.steps=300
python -m experiments.methods_docstrings.run --start=runs/start/student --out=experiments/methods_docstrings/results.jsonl

Each run appends a line to the file. Runs that are already in the file are skipped.
"""

import argparse
import importlib
import json
import os
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from configs.table import METHODS
from kd_jax import data, evaluate, metrics, train
from kd_jax.prefixes import rollouts

PROMPTS = 128  # number of held-out prompts that the student answers
PHASE = 16  # steps; minillm and distillm2 sample responses for this many steps at a time
# Tokens per step, which determine the number of steps. A second stream adds eight rows of 176 tokens to sixteen rows of
# about 73 tokens.
TOKENS, WITH_TEXT = 1160, {"distillm": 2568, "minillm": 2568}


def configured(method: str, seed: int, tokens: int, start: str):
    config = importlib.import_module(f"configs.{method}").get_config("docstrings")
    config.steps, config.seed = round(tokens / WITH_TEXT.get(method, TOKENS)), seed
    config.learning_rate.init_value = 1e-3
    config.student.init, config.student.path = "pretrained", start
    config.data.eval_rows = 256
    if method == "seqkd":
        config.prefixes.num_rows = config.steps * config.data.batch_size
    return config


def measure(run: train.Run, params, who: str = "student") -> dict[str, float]:
    """Measures a model on held-out rows, and on its own responses to their prompts."""
    model = run.models.student if who == "student" else run.models.teacher
    held_out = run.evaluate(params) if who == "student" else run.evaluate_teacher()
    rows = [
        dict(zip(batch, row, strict=True)) for batch in run.eval_batches() for row in zip(*batch.values(), strict=True)
    ]
    rows = [row for row in rows if row["loss_mask"].any()][:PROMPTS]
    prompts = [data.prompt_of(row["tokens"], row["loss_mask"]) for row in rows]
    references = [run.tokenizer.decode(row["targets"][row["loss_mask"]].tolist()) for row in rows]
    # The sampler of the config is not used, because the temperature and top-p of distillm2 would affect the measures.
    sampler = rollouts.Sampler(run.mesh, run.tokenizer, run.config.data.max_length, run.config.sampling.max_new_tokens)
    values, scores, reports = [], [], []
    for start in range(0, PROMPTS, 32):
        key = jax.random.fold_in(jax.random.key(1), start)
        drawn = sampler.rows(model, params, prompts[start : start + 32], key, "student")
        reports.append(sampler.report(drawn))
        for reference, (_, text) in zip(references[start:], sampler.text(drawn), strict=False):
            scores.append(evaluate.rouge_l(text, [reference]))
        both = model, params, run.models.teacher, run.models.teacher_params
        own = evaluate.own_batches(drawn, 32)
        values.append(evaluate.collect(*both, own, run.mesh, vocab_size=run.tokenizer.vocab_size))
    own = evaluate.summary({name: np.concatenate([part[name] for part in values]) for name in values[0]})
    own_text = {
        "rouge_l": statistics.mean(scores),
        "own_forward_kl": own["forward_kl"],
        "own_reverse_kl": own["reverse_kl"],
    }
    means = {name: statistics.mean(report[name] for report in reports) for name in reports[0]}
    return held_out | own_text | means


def trained(run: train.Run, budget: int) -> tuple[dict[str, float], object]:
    state, seconds, tokens, student_rows = run.init_state(), [], 0.0, 0.0
    observing = getattr(run.feed.source, "capacity", 0)
    while tokens < budget:
        step = len(seconds)
        if observing and step % max(1, run.config.steps // 5) == 0:
            run.feed.observe(run.evaluate(state.params)["cross_entropy"])
        begin = time.perf_counter()
        state, sums = run.train_step(state, run.models.teacher_params, run.batch(step, state.params))
        values = metrics.averages(jax.device_get(sums))
        seconds.append(time.perf_counter() - begin)
        tokens += values["tokens"]
        student_rows += run.feed.report.get("student_rows", 0.0)
        assert np.isfinite(values["loss"])
    # Whole phases, without the first phase, in which programs are compiled.
    measured = seconds[PHASE : len(seconds) // PHASE * PHASE]
    cost = {"seconds_a_step": statistics.mean(measured), "tokens": tokens, "steps": len(seconds)}
    return cost | {"student_rows": student_rows / len(seconds)}, state.params


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--start", required=True)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tokens", type=int, default=116_000)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/kd_jax/xla"))
    out = Path(args.out)
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    jobs = [(method, int(seed)) for seed in args.seeds.split(",") for method in args.methods.split(",")]
    for method, seed in [("teacher", 0), ("start", 0), *jobs]:
        if any((line["method"], line["seed"]) == (method, seed) for line in done):
            continue
        begin = time.perf_counter()
        run = train.build(
            configured("sft" if method in ("teacher", "start") else method, seed, args.tokens, args.start)
        )
        line = {"method": method, "seed": seed}
        if method == "teacher":
            line |= measure(run, run.models.teacher_params, "teacher")
        elif method == "start":
            line |= measure(run, run.init_state().params)
        else:
            cost, params = trained(run, args.tokens)
            line |= cost | measure(run, params)
        print(method, seed, f"{time.perf_counter() - begin:.0f} s", line, flush=True)
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
