"""The program of the processes that tests/training/test_hosts.py starts.

python -m tests.helpers.hosts SPEC OUT measures runs, in one of several processes or in a single process.
python -m tests.helpers.hosts main STEP FLAGS runs the command line and treats file:// like gs://. If STEP is not
empty, the program raises an error before that step.

SPEC is JSON: {"processes": "" or ADDRESS:PORT,COUNT,INDEX, "data_dir": ..., "mesh": {...}, "folder": of the
saved model, "workdirs": of the checkpoints, [...]}.
"""

import contextlib
import json
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
from absl import app

from configs import base
from kd_jax import evaluate, main, metrics, models, sharding, train
from kd_jax.models import folder, huggingface_save
from kd_jax.models.safetensors_io import Reader
from kd_jax.storage import checkpoint, remote
from tests.helpers.runs import smoke

# A rule that must see the tokens of all processes: processes that rank only their own tokens keep fewer.
KEPT = {"name": "top_fraction", "of": "teacher_entropy", "fraction": 0.3, "within": "batch", "divide_by": "kept"}


def load(mesh):
    """Loads the packaged teacher. Returns the model, the parameters and the sizes that this process reads and holds."""
    read, seen = Reader.read, []

    def counted(self, name, index):
        values = read(self, name, index)
        seen.append((name, str(index), values.nbytes))
        return values

    Reader.read = counted
    path = folder("package:docstrings_teacher")
    model, params = models.load_pretrained(path, shardings=lambda tree: sharding.tree_shardings(mesh, tree))
    Reader.read = read
    leaves = jax.tree.leaves(params)
    held = [sum({str(shard.index): shard.data.size for shard in leaf.addressable_shards}.values()) for leaf in leaves]
    found = {
        "read": sum(size for *_, size in seen), "reads": len(seen), "slices": len({entry[:2] for entry in seen}),
        "held": sum(held), "whole": sum(leaf.size for leaf in leaves),
    }  # fmt: skip
    return model, params, found


def save(path, model, params):
    """Saves a model. Returns the sizes of the arrays that the processes gather for this, in order."""
    gather, sizes = huggingface_save.multihost_utils.process_allgather, []

    def counted(array, **options):
        sizes.append(array.size)
        return gather(array, **options)

    huggingface_save.multihost_utils.process_allgather = counted
    models.save_pretrained(path, model, params, max_shard_bytes=2**20)
    huggingface_save.multihost_utils.process_allgather = gather
    return sizes


def unequal(run):
    """Runs a step and an evaluation on rows with unequal counts: 1 token in the first rows, up to 21 in the last."""
    random = np.random.default_rng(0)
    size, length = run.config.data.batch_size, run.config.data.max_length
    ids = random.integers(5, run.tokenizer.vocab_size, (size, length + 1)).astype(np.int32)
    rows, place = np.arange(size)[:, None], np.arange(length)[None]
    batch = {
        "tokens": ids[:, :-1], "targets": ids[:, 1:], "mask": place < length - rows,
        "loss_mask": (place >= 8) & (place < 8 + np.where(rows < size // 2, 1, 3 * rows)),
    }  # fmt: skip
    share = size // jax.process_count()
    mine = {name: array[jax.process_index() * share :][:share] for name, array in batch.items()}
    state = run.init_state()
    both = (run.models.student, state.params, run.models.teacher, run.models.teacher_params)
    means = evaluate.evaluate(*both, [mine], run.mesh, vocab_size=run.tokenizer.vocab_size)
    _, sums = run.train_step(state, run.models.teacher_params, run.put(mine))
    sums = jax.device_get(sums)
    return {
        "means": metrics.averages(sums) | {f"held out {name}": value for name, value in means.items()},
        "counts": {name: float(count) for name, (_, count) in sums.items()}, "own": int(mine["loss_mask"].sum()),
    }  # fmt: skip


def losses(run, steps):
    state, found = run.init_state(), []
    for step in range(steps):
        state, sums = run.train_step(state, run.models.teacher_params, run.batch(step, state.params))
        found.append(float(sums["loss"][0]))
    return found


def part(workdir, data_dir, changes):
    """Runs six steps of DistiLLM with a checkpoint after the third, or the last three from that checkpoint.

    Returns the losses, the rows and the final position of the data.
    """
    run = train.build(smoke("distillm", data_dir, steps=6, prefixes__threshold=0.9, **changes))
    found = {"losses": [], "rows": []}
    saved = checkpoint.has_steps(workdir)
    with checkpoint.open_manager(workdir, 1) as manager:
        state = checkpoint.restore(manager, run.abstract_state, run.feed)[0] if saved else run.init_state()
        for step in range(3 if saved else 0, 6):
            rows = run.feed.next(step, state.params)
            state, sums = run.train_step(state, run.models.teacher_params, run.put(rows))
            found["losses"].append(float(sums["loss"][0]))
            found["rows"].append([zlib.crc32(np.ascontiguousarray(row).tobytes()) for row in rows["targets"]])
            if step == 2:
                run.feed.observe(8.0)
                checkpoint.save(manager, 3, state, run.feed)
    position = run.feed.get_state()
    position["store"] = {name: array for name, array in position["store"].items() if name != "log_probs"}
    return found | {"position": json.loads(json.dumps(position))}


def look(spec):
    """Returns the results of `load`, `save`, `unequal` and `losses`, and of `part` for each work directory."""
    changes, found = {f"mesh__{name}": size for name, size in spec["mesh"].items()}, {}
    if spec["folder"]:
        config = smoke("forward_kl", spec["data_dir"], steps=4, **changes)
        base.set_terms(config, token=base.term(), sequence=base.term(average="sequence"), kept=base.term(tokens=KEPT))
        run = train.build(config)
        model, params, read = load(run.mesh)
        found = {"unequal": unequal(run), "load": read, "gathered": save(Path(spec["folder"]), model, params)}
        wide = dict(mesh__data=1, mesh__tensor=len(jax.devices()))
        found["tensor"] = losses(train.build(smoke("forward_kl", spec["data_dir"], steps=4, **wide)), 4)
    return found | {"parts": [part(workdir, spec["data_dir"], changes) for workdir in spec["workdirs"]]}


def like_gs():
    """Treats file:// like gs://: each process gets its own folder, and orbax writes to the work directory itself."""
    real, remote.BY_ORBAX = remote.work_directory, ("file",)

    @contextlib.contextmanager
    def work_directory(url, *its, **options):
        with real(url, *its, **options) as (folder, place):
            yield folder, place._replace(shared=url.removeprefix("file://"))

    remote.work_directory = work_directory


def command_line(raise_at):
    """Runs `kd_jax.main` with short timeouts and with an error before the step `raise_at` (0 for none)."""
    main.ARRIVE, main.HEARTBEAT = 8, 10
    put, steps = train.Run.put, iter(range(1, 10**9))

    def fail(run, batch):
        if next(steps) == raise_at:
            raise RuntimeError("something broke")
        return put(run, batch)

    train.Run.put = fail
    like_gs()
    app.run(main.main, flags_parser=main.parse)


if __name__ == "__main__":
    if sys.argv[1] == "main":
        raise_at = int(sys.argv[2] or 0)
        del sys.argv[1:3]
        command_line(raise_at)
    else:
        spec = json.loads(sys.argv[1])
        main.join(spec["processes"])
        Path(sys.argv[2]).write_text(json.dumps(look(spec)), encoding="utf-8")
