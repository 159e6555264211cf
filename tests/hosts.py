"""python -m tests.hosts SPEC OUT: what tests/test_hosts.py looks at, by one of several processes or by one alone.

SPEC is JSON: {"processes": "" or ADDRESS:PORT,COUNT,INDEX, "data_dir": ..., "mesh": {...}, "folder": for what is written}.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from kd_jax import evaluate, main, metrics, models, sharding, train
from kd_jax.models.safetensors_io import Reader
from kd_jax.setup import folder
from tests.runs import smoke

TEACHER = "package:docstrings_teacher"


def bytes_read(mesh):
    """How much of the teacher's weights this process reads, and each slice how often; and the parameters."""
    read, seen = Reader.read, []

    def counted(self, name, index):
        values = read(self, name, index)
        seen.append((name, str(index), values.nbytes))
        return values

    Reader.read = counted
    model, params = models.load_pretrained(folder(TEACHER), shardings=lambda tree: sharding.tree_shardings(mesh, tree))
    Reader.read = read
    shares = [
        sum({str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}.values())
        for leaf in jax.tree.leaves(params)
    ]
    bits = np.dtype(np.float32).itemsize
    return model, params, {
        "read": sum(size for *_, size in seen), "reads": len(seen), "slices": len({entry[:2] for entry in seen}),
        "held": sum(shares) // bits, "whole": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }  # fmt: skip


def gathered(action):
    """The sizes of the arrays that processes gather while `action` runs, in order."""
    gather, sizes = models.huggingface_save.multihost_utils.process_allgather, []

    def counted(array, **options):
        sizes.append(array.size)
        return gather(array, **options)

    models.huggingface_save.multihost_utils.process_allgather = counted
    action()
    models.huggingface_save.multihost_utils.process_allgather = gather
    return sizes


def unequal(run, average):
    """Metrics of a step, and held-out averages, where the first rows count one token each and the last ones all they have."""
    random = np.random.default_rng(0)
    size, length = run.config.data.batch_size, run.config.data.max_length
    ids = random.integers(5, run.tokenizer.vocab_size, (size, length + 1)).astype(np.int32)
    place = np.arange(length)[None]
    counted = np.where(np.arange(size) < size // 2, 1, np.arange(size) * 3)[:, None]
    batch = {
        "tokens": ids[:, :-1], "targets": ids[:, 1:], "mask": np.ones((size, length), bool),
        "loss_mask": (place >= 8) & (place < 8 + counted),
    }  # fmt: skip
    share = size // jax.process_count()
    mine = {
        name: array[jax.process_index() * share : (jax.process_index() + 1) * share] for name, array in batch.items()
    }
    state = run.init_state()
    both = (run.models.student, state.params, run.models.teacher, run.models.teacher_params)
    means = evaluate.evaluate(*both, [mine], run.mesh, vocab_size=run.tokenizer.vocab_size)
    _, sums = run.train_step(state, run.models.teacher_params, run.put(mine))
    return {
        "train": metrics.averages(jax.device_get(sums)), "eval": means, "counted": int(mine["loss_mask"].sum()),
        "sums": {name: float(count) for name, (_, count) in jax.device_get(sums).items()},
    }  # fmt: skip


def look(spec):
    out = Path(spec["folder"])
    changes = {f"mesh__{name}": size for name, size in spec["mesh"].items()}
    found = {}
    for average in ("token", "sequence"):
        config = smoke("forward_kl", spec["data_dir"], objective__terms__distil__average=average, steps=4, **changes)
        run = train.build(config)
        found[average] = unequal(run, average)
    model, params, found["load"] = bytes_read(run.mesh)
    found["gathered"] = gathered(lambda: models.save_pretrained(out / "teacher", model, params, run.tokenizer))
    # tensor alone: every process holds a part of every row
    wide = train.build(smoke("forward_kl", spec["data_dir"], steps=4, mesh__data=1, mesh__tensor=len(jax.devices())))
    state, losses = wide.init_state(), []
    for step in range(4):
        state, sums = wide.train_step(state, wide.models.teacher_params, wide.batch(step, state.params))
        losses.append(float(sums["loss"][0]))
    return found | {"tensor": losses}


if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    main.join(spec["processes"])
    found = look(spec)
    Path(sys.argv[2]).write_text(json.dumps(found))
