"""python experiments/int8_teacher/measure.py FOLDER: what int8 changes of a teacher, its memory and its seconds on this machine.

The text is that of the setting `docstrings`: 64 held-out rows of up to 176 tokens, in the model's chat template.
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
    ours, (_, whole) = run.models.teacher_params, models.load_pretrained(folder)
    round_embedding = lambda tree: tree | {"embed": {"embedding": _rounded(tree["embed"]["embedding"].T).T}}
    bfloat16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), whole)
    for name, params in {
        "layers' matrices": ours,
        "embedding (and head)": round_embedding(whole),
        "both": round_embedding(ours),
        "all in bfloat16": bfloat16,
    }.items():
        print(json.dumps({"rounded": name} | quantisation.difference(run, params, whole)), flush=True)
    seconds(run.models.teacher, {"float32": whole, "int8": ours})


def _rounded(matrix):
    return models.dequantise(int8.quantise(jnp.array(matrix)), jnp.float32)


def seconds(model, both):
    """Of a pass over 4 x 128 tokens and of 32 tokens drawn for 2 prompts of 32: minima of interleaved rounds."""
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
