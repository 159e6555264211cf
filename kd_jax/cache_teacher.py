"""python -m kd_jax.cache_teacher --config=configs/METHOD.py[:SETTING] --out=FOLDER --kind=hidden|top_k|samples [--k=N] ...

Runs the config's teacher once over the rows for training and evaluation, and writes the teacher's values at each
counted token. A run with --config.teacher.cache=FOLDER then needs no teacher. A call that was stopped can be repeated
and resumes.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from kd_jax import command_help

if __name__ == "__main__":  # before the imports below, which take seconds
    command_help.answer("cache_teacher", sys.argv)

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax.experimental import multihost_utils
from jaxtyping import Array

from kd_jax import command, data, main, metrics, sharding, storage
from kd_jax.prefixes import responses
from kd_jax.run.build import make_mesh, make_objective
from kd_jax.run.cache import check_use, made_from
from kd_jax.run.models import load_models, load_tokenizer
from kd_jax.run.rows import check_length, load_rows
from kd_jax.settings import Config, Settings
from kd_jax.settings.value_types import WholeNumberParser
from kd_jax.storage import directory, remote
from kd_jax.storage.untrusted import clip, read_json
from kd_jax.teachers import cache_files as files
from kd_jax.teachers.cache_reading import check_manifest
from kd_jax.teachers.cached import KINDS, coarsen, draw, merged

flags.DEFINE_alias("out", "workdir")
KIND = flags.DEFINE_enum(
    "kind", "hidden", list(KINDS), "hidden: exact; top_k: k tokens and the rest; samples: k draws."
)
K = flags.DEFINE(WholeNumberParser(), "k", 64, "Tokens kept, or drawn, at each token, with kind top_k or samples.")
POWER = flags.DEFINE_float("power", 1.0, "With samples: the teacher's probabilities are drawn from to this power.")
PART_ROWS = flags.DEFINE(WholeNumberParser(), "part_rows", 512, "Rows of a file.")

CHUNK_BYTES = 2**28  # of logits that a device holds at a time


def write(
    config: Config, folder: str, kind: str, k: int = 64, power: float = 1.0, part_rows: int = 512, quiet: bool = False
) -> dict[str, Any]:
    """Writes the missing parts of a cache.

    Args:
      config: a config of the runs that will use the cache. The cache depends on the training rows and the teacher, and,
        except for hidden states, on the temperature.
      folder: the cache's folder; made if it does not exist.
      kind: one of `teachers.cached.KINDS`.
      k: the number of tokens kept or sampled at each position.
      power: the power of the probabilities from which samples are taken.
      part_rows: the number of rows in a file; a file is written completely or not at all.
      quiet: whether to omit the progress bar.

    Returns:
      The manifest.

    Raises:
      ValueError: the config is wrong or cannot use such a cache, or the folder has another cache.
    """
    settings = Settings.parse(config)
    terms, source = make_objective(settings)
    check_use(settings, terms, source, kind)
    if settings.teacher.cache or not settings.teacher.path:
        raise ValueError("a cache is made with the teacher itself: set teacher.path, and leave teacher.cache empty.")
    mesh = make_mesh(settings)
    loaded = load_models(settings, load_tokenizer(settings), mesh, True)
    tokenizer, teacher = loaded.tokenizer, loaded.require_teacher()
    _check_numbers(kind, k, power, part_rows, tokenizer.vocab_size)
    check_length(settings, loaded)
    rows = {
        "train": load_rows(settings, tokenizer, settings.data.train_split)[0],
        "held_out": load_rows(settings, tokenizer, settings.data.eval_split, settings.data.eval_rows)[0],
    }
    rows = {split: its.rows if isinstance(its, data.Packed) else its for split, its in rows.items()}
    temperatures = {"train": settings.objective.temperature, "held_out": 1.0}  # which evaluations are at
    where = remote.local_folder(folder)
    manifest: files.Manifest = {
        "version": files.VERSION,
        "kind": kind,
        "k": 0 if kind == "hidden" else k,
        "power": power if kind == "samples" else 1.0,
        "seed": settings.seed if kind == "samples" else 0,
        "hidden_size": teacher.config.hidden_size,
        "head": files.TIED if teacher.config.tie_embeddings else files.UNTIED,
        "teacher": {
            "path": settings.teacher.path, "dtype": settings.teacher.dtype, "weights": settings.teacher.weights,
            "config": str(teacher.config),
            "fingerprint": responses.fingerprint(loaded.teacher_params, str(teacher.config)),
        },
        "splits": {
            split: files.about_rows(its) | {"temperature": temperatures[split]} for split, its in rows.items()
        },
        "part_rows": part_rows,
        "head_hash": "",
    } | made_from(settings, tokenizer)  # fmt: skip
    check_manifest(where / files.MANIFEST, manifest)  # what is written can be read
    read = _make_read(teacher, manifest, mesh)
    batch_size, first = settings.data.eval_batch_size, jax.process_index() == 0
    head = None
    if kind == "hidden":
        head = sharding.fetch_whole(teacher.stored_head(loaded.teacher_params)[0])
    with contextlib.ExitStack() as stack:
        if first:
            _check_folder(where, manifest)
            stack.enter_context(directory.alone(str(where)))
            _begin(where, manifest, tokenizer, head)
        sharding.barrier("the cache is begun")
        jobs = _share(where, manifest)
        total = sum(-(-max(sizes) * jax.process_count() // batch_size) for *_, sizes in jobs)
        bar = stack.enter_context(metrics.tqdm(total=total, desc="the teacher reads", unit="batch", disable=quiet))
        for split, part, sizes in jobs:
            records = _records(
                manifest, rows[split], split, part, max(sizes), partial(read, loaded.teacher_params),
                batch_size, settings.data.max_length, tokenizer.pad_id, mesh, bar.update,
            )  # fmt: skip
            if part is None:  # the others' parts need all processes to compute
                list(records)
            else:
                files.write_part(files.part_path(where, split, part), records, kind)
        sharding.barrier("all parts are written")
    if not quiet and first:
        tokens = {split: about["tokens"] for split, about in manifest["splits"].items()}
        size = sum(file.stat().st_size for file in where.rglob("*.array_record"))
        metrics.tqdm.write(f"{folder}: {tokens} tokens, {size / sum(tokens.values()):.1f} bytes a token.")
    return manifest


def _check_numbers(kind: str, k: int, power: float, part_rows: int, vocab_size: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}.")
    if kind != "hidden" and not 1 <= k < vocab_size:
        raise ValueError(f"k={k} must be at least 1 and less than the vocabulary's {vocab_size} ids.")
    if not 0 < power <= 4:
        raise ValueError(f"power={power} must be above 0 and at most 4.")
    if part_rows < 1:
        raise ValueError(f"part_rows={part_rows} must be at least 1.")


def _check_folder(folder: Path, manifest: files.Manifest) -> None:
    """Checks that the folder belongs to this cache, begun or not. Folders of other contents are not touched."""
    if (folder / files.MANIFEST).exists():
        there = read_json(folder / files.MANIFEST)
        lines = files.differences(there, manifest | {"head_hash": there.get("head_hash")})
        if lines := [line for line in lines if not line.startswith("teacher.path: ")]:
            raise ValueError(
                f"{folder} has another cache. Choose another folder, or take these back:\n  "
                + "\n  ".join(lines[: files.SHOWN])
            )
    elif foreign := files.foreign(folder):
        raise ValueError(f"{folder} has something else in it ({clip(foreign)}); choose an empty or a new folder.")


def _begin(folder: Path, manifest: files.Manifest, tokenizer: data.Tokenizer, head: np.ndarray | None) -> None:
    """Clears away what a call that was killed has left, and writes what lies beside the parts, the manifest last."""
    for path in files.partials(folder):
        path.unlink()
    if not (folder / files.MANIFEST).exists():
        if head is not None:
            manifest["head_hash"] = files.write_head(folder, manifest["head"], head)
        files.write_tokenizer(folder, tokenizer)
        files.write_manifest(folder, manifest)


def _share(folder: Path, manifest: files.Manifest) -> list[tuple[str, int | None, list[int]]]:
    """This process's parts, one in each round that all processes work through together, and the sizes of all of the round's."""
    every, missing = files.all_parts(manifest), set(files.missing_parts(folder, manifest))
    wanted = np.array([part in missing for part in every])
    if jax.process_count() > 1:  # what the first process sees holds for all
        wanted = np.asarray(multihost_utils.broadcast_one_to_all(wanted))
    missing = [part for part, is_wanted in zip(every, wanted, strict=True) if is_wanted]
    count, index, jobs = jax.process_count(), jax.process_index(), []
    for split, about in manifest["splits"].items():
        sizes = files.part_sizes(about["rows"], manifest["part_rows"])
        parts = [part for its, part in missing if its == split]
        for start in range(0, len(parts), count):
            some = parts[start : start + count]
            mine = some[index] if index < len(some) else None
            jobs.append((split, mine, [sizes[part] for part in some]))
    return jobs


def _records(
    manifest: files.Manifest, rows: data.Rows, split: str, part: int | None, most: int, read: Callable[..., Any],
    batch_size: int, max_length: int, pad_id: int, mesh: jax.sharding.Mesh, done: Callable[[], Any],
) -> Iterator[bytes]:  # fmt: skip
    """The records of a part. All processes compute together as many batches as the largest of their parts needs."""
    share = batch_size // jax.process_count()
    first = 0 if part is None else part * manifest["part_rows"]
    mine = [] if part is None else range(first, min(first + manifest["part_rows"], len(rows)))
    for start in range(0, most, share):
        some = list(mine[start : start + share])
        batch = data.pad(rows, [(index,) for index in some], share, max_length, pad_id)
        placed = {name: batch[name] for name in ("tokens", "mask")}
        placed["index"] = np.array(some + [0] * (share - len(some)), np.int32)
        values = read(sharding.put_batch(mesh, placed | {"mask": batch["mask"] > 0}), split)
        values = {name: _own(array, share) for name, array in values.items()}
        done()
        for place, index in enumerate(some):
            counted = batch["loss_mask"][place]
            its = {name: array[place][counted] for name, array in values.items()}
            its = merged(its) if manifest["kind"] == "samples" else its
            yield files.record(manifest, split, rows, index, its)


def _own(array: jax.Array, share: int) -> np.ndarray:
    """Returns this process's rows of a batch's array, the reverse of `sharding.put_batch`."""
    shards = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    rows = np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])
    if len(rows) == share:
        return rows
    # Its devices have rows of others, since `tensor` is wider than what it has.
    return sharding.fetch_whole(array)[jax.process_index() * share : (jax.process_index() + 1) * share]


def _make_read(teacher: Any, manifest: files.Manifest, mesh: jax.sharding.Mesh) -> Callable[..., dict[str, jax.Array]]:
    """(params, batch, split) -> what is kept of each position, [B, L, ...]."""
    kind, k, vocab_size = manifest["kind"], manifest["k"], manifest["vocab_size"]

    def read(params: Any, batch: dict[str, Array], split: str) -> dict[str, Array]:
        hidden = teacher.hidden(sharding.for_lookup(mesh, params), batch["tokens"], batch["mask"])
        if kind == "hidden":
            return {"teacher_hidden": jax.lax.bitcast_convert_type(hidden.astype(jnp.bfloat16), jnp.uint16)}
        temperature = manifest["splits"][split]["temperature"]
        key = jax.random.fold_in(jax.random.key(manifest["seed"]), list(manifest["splits"]).index(split))
        keys = jax.vmap(partial(jax.random.fold_in, key))(batch["index"])

        def piece(start: Array, hidden: Array) -> dict[str, Array]:
            logits = teacher.project(params, hidden)[..., :vocab_size] / temperature
            log_p = jax.nn.log_softmax(logits, axis=-1)
            if kind == "top_k":
                ids = jax.lax.top_k(log_p, k)[1]
                return {"teacher_ids": ids, "teacher_log_probs": coarsen(log_p, ids)}
            at = lambda key: jax.vmap(partial(jax.random.fold_in, key))(start + jnp.arange(hidden.shape[1]))
            # The draws of a token are the same wherever its row is computed.
            uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (k, 2), jnp.float32)))(jax.vmap(at)(keys))
            return draw(log_p, 1 - uniform, manifest["power"])

        # A piece is some positions of every row, so that no row leaves its device.
        rows, length = hidden.shape[0] // (mesh.shape["data"] * mesh.shape["fsdp"]), hidden.shape[1]
        size = max(1, min(length, CHUNK_BYTES // (4 * max(rows, 1) * vocab_size)))
        pieces = -(-length // size)
        padded = jnp.pad(hidden, ((0, 0), (0, pieces * size - length), (0, 0)))
        split_up = padded.reshape(hidden.shape[0], pieces, size, -1).swapaxes(0, 1)
        found = jax.lax.map(lambda args: piece(*args), (jnp.arange(pieces) * size, split_up))
        whole = lambda array: array.swapaxes(0, 1).reshape(hidden.shape[0], pieces * size, *array.shape[3:])[:, :length]
        return jax.tree.map(whole, found)

    return jax.jit(read, static_argnames="split", out_shardings=sharding.batch_sharding(mesh))


def kept() -> str:
    """Returns a clause that names what remains of the cache after Ctrl-C."""
    count = len(list(remote.local_folder(str(main.WORKDIR.value)).glob("*/*.array_record")))
    return f"{count} complete files are kept in {main.WORKDIR.value}, and the same command goes on"


def run(argv: list[str]) -> None:
    command.start()
    logging.set_verbosity(logging.ERROR)
    if len(argv) > 1:
        sys.exit(f"kd_jax: {argv[1]!r} is no flag; options look like --kind=top_k.")
    main.use_cache()
    told = str(main.WORKDIR.value), KIND.value, K.value, POWER.value, PART_ROWS.value
    with main.ends_well(kept):
        main.join(main.PROCESSES.value)
        main.check_same(main.CONFIG.value.to_dict(), *told)
        with storage.room(told[0]):
            write(main.CONFIG.value, *told)


if __name__ == "__main__":
    app.run(run, flags_parser=main.parse)
