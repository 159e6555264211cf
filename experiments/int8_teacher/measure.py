"""Measures the effect of int8 on a teacher's outputs, memory and seconds on this machine.

python experiments/int8_teacher/measure.py FOLDER

The text is 64 held-out rows of the setting `docstrings`, of up to 176 tokens, in the model's chat template.
"""

import importlib
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from kd_jax import models, train
from kd_jax.models import int8
from kd_jax.run import quantisation

ROUNDS = 5


def main(folder: str) -> None:
    config = importlib.import_module("configs.forward_kl").get_config("docstrings")
    changes = {"teacher.path": folder, "tokenizer.path": "", "data.template": "chat", "teacher.weights": "int8"}
    config.update_from_flattened_dict(changes | {"data.eval_batch_size": 64, "data.eval_rows": 64})
    run = train.build(config)
    int8_params, (_, float_params) = run.models.teacher_params, models.load_pretrained(folder)
    round_embedding = lambda tree: tree | {"embed": {"embedding": _rounded(tree["embed"]["embedding"].T).T}}
    bfloat16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), float_params)
    for name, params in {
        "layers' matrices": int8_params,
        "embedding (and head)": round_embedding(float_params),
        "both": round_embedding(int8_params),
        "all in bfloat16": bfloat16,
    }.items():
        print(json.dumps({"rounded": name} | quantisation.difference(run, params, float_params)), flush=True)
    seconds(run.models.teacher, {"float32": float_params, "int8": int8_params})


def _rounded(matrix):
    return models.dequantise(int8.quantise(jnp.array(matrix)), jnp.float32)


def seconds(model, both):
    """Prints the minimum seconds over interleaved rounds, for a pass over 4 x 128 tokens and for sampling.

    Sampling writes 32 tokens to each of 2 prompts of 32 tokens.
    """
    tokens = jax.random.randint(jax.random.key(0), (4, 128), 0, model.config.vocab_size)

    def draw(params, tokens):
        prompts = tokens[:2, :32]
        return models.generate(
            model, params, prompts, prompts >= 0, max_new_tokens=32, key=jax.random.key(0), eos_id=-1, pad_id=0
        )[0]

    for what, function in {"a pass": jax.jit(model.hidden), "a text": jax.jit(draw)}.items():
        programs = {name: function.lower(params, tokens).compile() for name, params in both.items()}
        best = dict.fromkeys(both, float("inf"))
        for _ in range(ROUNDS):
            for name, params in both.items():
                start = time.perf_counter()
                jax.block_until_ready(programs[name](params, tokens))
                best[name] = min(best[name], time.perf_counter() - start)
        memory = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}
        print(json.dumps({"what": what, "seconds": best, "ratio": best["int8"] / best["float32"], "temporary": memory}))


if __name__ == "__main__":
    main(sys.argv[1])
