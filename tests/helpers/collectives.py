"""Reads the collective operations between devices from the HLO text of a compiled program."""

import re
from typing import NamedTuple

import jax
import optax

from configs import base
from kd_jax import models, sharding
from kd_jax.objectives import make_terms
from kd_jax.train_step import init_state, make_train_step

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1, "f64": 8, "s64": 8}
MESHES = ((8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8))


class Collective(NamedTuple):
    """One collective operation on one or more arrays."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]  # of the results, per device
    size: int  # total bytes of the results
    in_loop: bool


def read(text: str) -> list[Collective]:
    """Returns every collective of a compiled program, each with a flag that is true inside a while loop."""
    bodies: dict[str, list[str]] = {}
    current = ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = header[1]
        bodies.setdefault(current, []).append(line)
    calls = r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)"
    called = {name: set(re.findall(calls, "\n".join(lines))) for name, lines in bodies.items()}
    looped = set(re.findall(r"(?:body|condition)=%?([\w.\-]+)", text))
    while more := set().union(*(called.get(name, set()) for name in looped)) - looped:
        looped |= more
    found = []
    for name, lines in bodies.items():
        for line in lines:
            match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line)
            if match is None:
                continue
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            shapes = tuple(tuple(int(n) for n in dims.split(",") if n) for _, dims in arrays)
            size = sum(BYTES[kind] * _product(shape) for (kind, _), shape in zip(arrays, shapes, strict=True))
            found.append(Collective(match[2], shapes, size, name in looped))
    return found


def compiled_step(
    sizes: tuple[int, int, int], *, batch: int, length: int, vocab: int, width: int, teacher_width: int, chunk: int
) -> str:
    """Returns the HLO of a step of forward KL and a mixture on 8 devices. The models are Llamas of one layer."""
    mesh = sharding.make_mesh(*sizes)
    rest = dict(family="llama", vocab_size=vocab, num_layers=1, num_heads=8, head_dim=8)
    make = lambda hidden: models.from_config(
        models.ModelConfig(**rest, hidden_size=hidden, intermediate_size=2 * hidden)
    )
    student, teacher = make(width), make(teacher_width)
    mixture = base.term(assistant={"name": "arithmetic_mixture"}, pair=("teacher", "assistant"), weight=0.1)
    terms, tx = make_terms({"distil": base.term(), "mixture": mixture}), optax.adam(1e-3)
    step = make_train_step(student, teacher, terms, tx, vocab_size=vocab, chunk=chunk, mesh=mesh)
    key = jax.random.key(0)
    state = jax.eval_shape(lambda params, key: init_state(params, tx, terms, key), student.abstract_params(), key)
    place = lambda tree: sharding.with_shardings(tree, sharding.tree_shardings(mesh, tree))
    rows = sharding.batch_sharding(mesh)
    shape = lambda dtype: jax.ShapeDtypeStruct((batch, length), dtype, sharding=rows)
    inputs = {"tokens": shape("int32"), "targets": shape("int32"), "mask": shape("bool"), "loss_mask": shape("bool")}
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(sharding.tree_shardings(mesh, state), None))
    return jitted.lower(place(state), place(teacher.abstract_params()), inputs).compile().as_text()


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
