"""A program that makes short runs of several methods and meshes, in a single process or in one of several.

Usage: python -m tests.helpers.processes SPEC OUT

SPEC is JSON: {"processes": "" or ADDRESS:PORT,COUNT,INDEX, "data_dir": ..., "steps": ..., "runs": {name: [method,
{key: value}]}}. The program writes {"losses": [...], "tokens": [...], "rows": [...]} for each run to OUT. "rows" holds
a list for each step, with the hash of every row of this process.
"""

import json
import sys
import zlib

import jax
import numpy as np

from kd_jax import main, train
from tests.helpers.runs import smoke


def losses(config, steps):
    run = train.build(config)
    state = run.init_state()
    found = {"losses": [], "tokens": [], "rows": []}
    for step in range(steps):
        rows = run.feed.next(step, state.params)
        state, sums = run.train_step(state, run.models.teacher_params, run.put(rows))
        found["losses"].append(float(sums["loss"][0]))
        found["tokens"].append(float(sums["tokens"][0]))
        found["rows"].append([zlib.crc32(np.ascontiguousarray(row).tobytes()) for row in rows["targets"]])
    return found


if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    main.join(spec["processes"])
    results = {}
    for name, (method, changes) in spec["runs"].items():
        results[name] = losses(smoke(method, spec["data_dir"], **changes), spec["steps"])
        jax.clear_caches()
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(results, file)
