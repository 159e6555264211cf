"""Measures `kd_jax.models.generate` on random weights. `transformers_generate.py` runs the same shapes.

python -m experiments.generation_speed.ours --size=smollm2

Every token is sampled from the whole distribution at temperature 1, and no row ends early. Prints a JSON line with the
minimum CPU and wall seconds of a call. An earlier call compiles the program.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np

from kd_jax.models import ModelConfig, from_config, generate

SIZES = json.loads((Path(__file__).parent / "sizes.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=list(SIZES), default="smollm2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--calls", type=int, default=5)
    args = parser.parse_args()

    model = from_config(ModelConfig(family="llama", **SIZES[args.size]))
    params = model.init(jax.random.key(0))
    prompts = np.random.default_rng(0).integers(model.config.vocab_size, size=(args.batch, args.prompt))
    mask = np.ones(prompts.shape, bool)

    def run(call: int) -> None:
        tokens, alive, _ = generate(
            model, params, prompts, mask, max_new_tokens=args.new, key=jax.random.key(call), eos_id=-1, pad_id=0
        )
        assert tokens.shape == (args.batch, args.new) and alive.all()

    run(0)
    seconds = []
    for call in range(args.calls):
        start, wall = time.process_time(), time.perf_counter()
        run(call)
        seconds.append((time.process_time() - start, time.perf_counter() - wall))
    cpu, wall = (round(min(column), 4) for column in zip(*seconds, strict=True))
    line = {"impl": "kd_jax", "parameters": sum(leaf.size for leaf in jax.tree.leaves(params))} | vars(args)
    print(json.dumps(line | {"cpu_s": cpu, "wall_s": wall, "jax": jax.__version__}))


if __name__ == "__main__":
    main()
