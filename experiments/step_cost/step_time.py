"""Measures the time to compile a config's step, and the time that the input pipeline adds to the step.

python -m experiments.step_cost.step_time --config=configs/quickstart.py --cache=CACHE --out=experiments/step_cost/quickstart.jsonl

With an empty cache directory the compilation is cold. A second call with the same directory reads it from the cache.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from kd_jax import train
from kd_jax.prefixes.feed import Feed

CONFIG = config_flags.DEFINE_config_file("config")
CACHE = flags.DEFINE_string("cache", "", "directory of the compilation cache")
STEPS = flags.DEFINE_integer(
    "steps",
    64,
    "number of steps in a lap; should be much larger than 8, the number of batches that the pipeline prepares ahead",
)
LAPS = flags.DEFINE_integer("laps", 4, "number of laps of each kind, which alternate; 0: only compile")
OUT = flags.DEFINE_string("out", "", "file of JSON lines to which the result is appended")


def main(_: list[str]) -> None:
    jax.config.update("jax_compilation_cache_dir", CACHE.value or None)
    cached = bool(CACHE.value) and Path(CACHE.value).exists() and any(Path(CACHE.value).iterdir())
    run = train.build(CONFIG.value)
    batch = run.batch(0, None)
    inputs = run.abstract_state, run.models.teacher_params, batch
    marks = [time.perf_counter()]
    traced = run.train_step.trace(*inputs)
    marks.append(time.perf_counter())
    lowered = traced.lower()
    marks.append(time.perf_counter())
    lowered.compile()
    marks.append(time.perf_counter())
    line = {"cached": cached, "backend": jax.default_backend(), "command": " ".join(sys.argv[1:])}
    for name, begin, end in zip(("trace", "lower", "compile"), marks[:-1], marks[1:], strict=True):
        line[f"{name}_s"] = round(end - begin, 2)
    line["compile_in_all_s"] = round(marks[-1] - marks[0], 2)
    if LAPS.value:
        line |= laps(run, train.build(CONFIG.value).feed)
    print(json.dumps(line))
    if OUT.value:
        with open(OUT.value, "a") as file:
            file.write(json.dumps(line) + "\n")


def laps(run: train.Run, pipeline: Feed) -> dict:
    """Returns the wall seconds per step on the same batches, from the memory of the device and from the pipeline."""
    state, seconds = run.init_state(), {"memory": [], "pipeline": []}
    pipeline.next(0, None)  # the pipeline of `run` is one batch ahead
    for lap in range(LAPS.value + 1):
        loaded = iter([run.batch(0, None) for _ in range(STEPS.value)])
        sources = {"memory": lambda loaded=loaded: next(loaded), "pipeline": lambda: run.put(pipeline.next(0, None))}
        for name, source in sorted(sources.items(), reverse=lap % 2 == 1):
            start = time.perf_counter()
            for _ in range(STEPS.value):
                state, _ = run.train_step(state, run.models.teacher_params, source())
            jax.block_until_ready(state)
            if lap:  # the first lap is a warm-up
                seconds[name].append((time.perf_counter() - start) / STEPS.value)
    ratios = [one / other for one, other in zip(seconds["pipeline"], seconds["memory"], strict=True)]
    line = {f"{name}_step_s": round(statistics.median(times), 4) for name, times in seconds.items()}
    return line | {"pipeline_over_memory": round(statistics.median(ratios), 4)}


if __name__ == "__main__":
    app.run(main)
