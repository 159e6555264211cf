"""Measures the seconds per step of every method of `config.py`, with sampling and without compilation.

PYTHONPATH=. python experiments/methods_smollm2/step_time.py methods-short[,DOLLY.jsonl.gz] OUT.jsonl [METHOD,METHOD,... [STEPS]]

Nothing else should run at the same time. Methods that are already in OUT are skipped. A method's line has wall and CPU
seconds of a step: the mean over STEPS steps (default: twelve) without the first.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import jax

from experiments.methods_smollm2 import config as methods
from kd_jax import main, train


def measure(config, steps: int) -> dict[str, float]:
    """Returns the wall and CPU seconds per step of a run that is not saved."""
    run = train.build(config)
    state = run.init_state()
    wall, cpu = [], []
    for step in range(steps):
        compiled = sum(compilations)
        start = time.perf_counter(), time.process_time()
        batch = run.batch(step, state.params)
        state, _ = run.train_step(state, run.models.teacher_params, batch)
        jax.block_until_ready(state)
        compiled = sum(compilations) - compiled
        wall.append(time.perf_counter() - start[0] - compiled)
        cpu.append(time.process_time() - start[1] - compiled)
    seconds = {"wall": statistics.mean(wall[1:] or wall), "cpu": statistics.mean(cpu[1:] or cpu), "steps": wall}
    return seconds | {"device": jax.devices()[0].device_kind}


if __name__ == "__main__":
    compilations: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compilations.append(seconds) if name.startswith("/jax/core/compile") else None
    )
    main.use_cache()
    ablation = methods.get_config(sys.argv[1])
    wanted = sys.argv[3].split(",") if len(sys.argv) > 3 else ablation.base.keys()
    out = Path(sys.argv[2])
    steps = int(sys.argv[4]) if len(sys.argv) > 4 else 12
    done = {json.loads(line)["method"] for line in out.read_text().splitlines()} if out.exists() else set()
    with out.open("a") as file:
        for name, base in ablation.base.items():
            if name in done or name not in wanted:
                continue
            file.write(json.dumps({"method": name} | measure(base, steps)) + "\n")
            file.flush()
            jax.clear_caches()
