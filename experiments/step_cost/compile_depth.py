"""Measures the time to compile a step of models with few or many layers: the most that a scan over layers could save.

python -m experiments.step_cost.compile_depth --student=10 --teacher=30
"""

import argparse
import json
import time

import jax
import optax

from configs import base
from experiments.step_cost.peer_entry import model
from kd_jax.objectives import make_terms
from kd_jax.train_step import init_state, make_train_step

SMOLLM2 = dict(embed_dim=576, hidden_dim=1536, num_heads=9, num_kv_heads=3, head_dim=64)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--student", type=int, default=10, help="number of layers")
    parser.add_argument("--teacher", type=int, default=30, help="number of layers")
    args = parser.parse_args()
    student, teacher = (model(SMOLLM2 | {"num_layers": n}, 49152) for n in (args.student, args.teacher))
    terms, tx = make_terms({"distil": base.term()}), optax.adamw(1e-3)
    step = jax.jit(make_train_step(student, teacher, terms, tx, vocab_size=49152), donate_argnums=0)
    key = jax.random.key(0)
    state = jax.eval_shape(lambda params, key: init_state(params, tx, terms, key), student.abstract_params(), key)
    shape = lambda dtype: jax.ShapeDtypeStruct((8, 256), dtype)
    batch = {"tokens": shape("int32"), "targets": shape("int32"), "mask": shape("bool"), "loss_mask": shape("bool")}
    start = time.perf_counter()
    traced = step.trace(state, teacher.abstract_params(), batch)
    middle = time.perf_counter()
    traced.lower().compile()
    line = {"student_layers": args.student, "teacher_layers": args.teacher, "backend": jax.default_backend()}
    print(json.dumps(line | {"trace_s": round(middle - start, 2), "compile_s": round(time.perf_counter() - middle, 2)}))


if __name__ == "__main__":
    main()
