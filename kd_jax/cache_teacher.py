"""python -m kd_jax.cache_teacher --config=configs/METHOD.py[:SETTING] --out=FOLDER --kind=hidden|top_k|samples [--k=N] ...

Runs the config's teacher, or with --member=NAME another frozen model, once over the rows for training and evaluation,
and writes the model's values at each counted token. A run with --config.teacher.cache=FOLDER then needs no teacher. If
the command is stopped, the same command writes the missing files.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from kd_jax import command_help

if __name__ == "__main__":  # the help is printed before the imports below, which take seconds
    command_help.answer("cache_teacher", sys.argv)

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree

from kd_jax import command, data, main, metrics, models, sharding, storage
from kd_jax.prefixes import responses
from kd_jax.run import hub_names
from kd_jax.run.build import make_mesh, make_objective
from kd_jax.run.cache import check_use, made_from, unpacked
from kd_jax.run.line_arrays import make_line_arrays
from kd_jax.run.models import load_models, load_tokenizer
from kd_jax.run.rows import check_length, load_rows
from kd_jax.run.view_prompts import described_view, load_texts
from kd_jax.settings import Config, Member, Settings, Teacher
from kd_jax.settings.value_types import WholeNumberParser
from kd_jax.storage import directory, remote
from kd_jax.storage.untrusted import clip, read_json
from kd_jax.teachers import Teacher as FrozenModel
from kd_jax.teachers import cache_files as files
from kd_jax.teachers import teacher_arrays
from kd_jax.teachers.cache_reading import check_manifest
from kd_jax.teachers.cached import KINDS, coarsen, draw, merged

flags.DEFINE_alias("out", "workdir")
KIND = flags.DEFINE_enum(
    "kind", "hidden", list(KINDS),
    "hidden: hidden states, which give the exact distributions; top_k: the k likeliest tokens and the mass of all other "
    "tokens; samples: k sampled tokens.",
)  # fmt: skip
K = flags.DEFINE(WholeNumberParser(), "k", 64, "With top_k or samples: the number of tokens stored at each position.")
MEMBER = flags.DEFINE_string(
    "member", "teacher", "The frozen model that is cached: teacher, or a name in config.members."
)
POWER = flags.DEFINE_float("power", 1.0, "With samples: the power of the teacher's probabilities to sample from.")
PART_ROWS = flags.DEFINE(WholeNumberParser(), "part_rows", 512, "The number of rows in a file.")

CHUNK_BYTES = 2**28  # the number of bytes of logits that a device holds at a time
# (params, batch, split) -> the values to store at each position, [B, L, ...] each
Read = Callable[[PyTree, dict[str, Array], str], dict[str, Array]]


def write(
    config: Config, folder: str, kind: str, k: int = 64, power: float = 1.0, part_rows: int = 512, quiet: bool = False,
    member: str = "teacher",
) -> files.Manifest:  # fmt: skip
    """Writes the missing parts of a cache.

    Args:
      config: a config of the runs that will use the cache. The cache depends on the training rows and the teacher, and,
        except for hidden states, on the temperature.
      folder: the cache's folder; created if the folder does not exist.
      kind: one of `teachers.cached.KINDS`.
      k: the number of tokens stored at each position, with top_k or samples.
      power: the power of the probabilities from which samples are taken.
      part_rows: the number of rows in a file. A file is written completely or not at all.
      quiet: whether to omit the progress bar.
      member: the frozen model that is cached: teacher, or a name in config.members.

    Returns:
      The manifest.

    Raises:
      ValueError: the config is wrong or cannot use a cache of this kind, or the folder has another cache.
    """
    settings = Settings.parse(config)
    terms, source = make_objective(settings)
    check_use(settings, terms, source, kind, k, member)
    options = _options_of(settings, member)
    hub_names.settle(settings)
    mesh = make_mesh(settings)
    loaded = load_models(settings, load_tokenizer(settings), mesh, True)
    tokenizer = loaded.tokenizer
    teacher = loaded.require_teacher() if member == "teacher" else loaded.member_models[member]
    params = loaded.teacher_params if member == "teacher" else loaded.member_params[member]
    _check_numbers(kind, k, power, part_rows, tokenizer.vocab_size)
    check_length(settings, loaded)
    splits = {"train": settings.data.train_split, "held_out": settings.data.eval_split}
    limits = {"train": 0, "held_out": settings.data.eval_rows}
    rows = {
        split: unpacked(load_rows(settings, tokenizer, name, limits[split])[0]) for split, name in splits.items()
    }  # fmt: skip
    line_arrays = {
        split: make_line_arrays(
            settings, loaded, rows[split], partial(load_texts, settings, name), {}, members=(member,)
        )
        for split, name in splits.items()
    }
    temperatures = {"train": settings.objective.temperature, "held_out": 1.0}  # evaluations have temperature 1
    cache_folder = remote.local_folder(folder)
    manifest: files.Manifest = {
        "version": files.VERSION,
        "kind": kind,
        "k": 0 if kind == "hidden" else k,
        "power": power if kind == "samples" else 1.0,
        "seed": settings.seed if kind == "samples" else 0,
        "hidden_size": teacher.config.embedding_size,
        "head": files.TIED if teacher.config.tie_embeddings else files.UNTIED,
        "teacher": {
            "path": options.path, "dtype": options.dtype, "weights": options.weights, "config": str(teacher.config),
            "fingerprint": responses.fingerprint(params, str(teacher.config)),
        },
        "splits": {
            split: files.describe_rows(of_split)
            | {"temperature": temperatures[split]}
            | ({"view": view} if (view := described_view(settings, member, of_split, splits[split])) else {})
            for split, of_split in rows.items()
        },
        "part_rows": part_rows,
        "head_hash": "",
    } | made_from(settings, tokenizer)  # fmt: skip
    if teacher.logit_cap is not None:  # without a cap the entry is absent, so that earlier caches stay valid
        manifest["logit_cap"] = teacher.logit_cap
    check_manifest(cache_folder / files.MANIFEST, manifest)  # a cache that could not be read is not written
    frozen = loaded.compared_teacher if member == "teacher" else loaded.members[member]
    read = _make_read(frozen, teacher, manifest, mesh)
    batch_size, first = settings.data.eval_batch_size, jax.process_index() == 0
    head = None
    if kind == "hidden":
        head = sharding.fetch_whole(teacher.stored_head(params)[0])
    with contextlib.ExitStack() as stack:
        if first:
            _check_folder(cache_folder, manifest)
            stack.enter_context(directory.alone(str(cache_folder)))
            _begin(cache_folder, manifest, tokenizer, head)
        sharding.barrier("the cache has a manifest")
        jobs = _share(cache_folder, manifest)
        total = sum(-(-max(sizes) * jax.process_count() // batch_size) for *_, sizes in jobs)
        bar = stack.enter_context(metrics.tqdm(total=total, desc="the teacher reads", unit="batch", disable=quiet))
        for split, part, sizes in jobs:
            records = _records(
                manifest, rows[split], line_arrays[split], split, part, max(sizes), partial(read, params),
                batch_size, settings.data.max_length, tokenizer.pad_id, mesh, bar.update,
            )  # fmt: skip
            if part is None:  # this process has no part, but all processes compute the parts of the other processes
                list(records)
            else:
                files.write_part(files.part_path(cache_folder, split, part), records, kind)
        sharding.barrier("all parts are written")
    if not quiet and first:
        tokens = {split: about["tokens"] for split, about in manifest["splits"].items()}
        size = sum(file.stat().st_size for file in cache_folder.rglob("*.array_record"))
        metrics.tqdm.write(f"{folder}: {tokens} tokens, {size / sum(tokens.values()):.1f} bytes per token.")
    return manifest


def _options_of(settings: Settings, member: str) -> Teacher | Member:
    """Returns the section of a config with the frozen model that is cached.

    Raises:
      ValueError: there is no such model, or only a cache of the model.
    """
    if member != "teacher" and member not in settings.members:
        known = ", ".join(("teacher", *settings.members))
        raise ValueError(f"--member={member} is no frozen model of the config, which has {known}.")
    section = "teacher" if member == "teacher" else f"members.{member}"
    options = settings.teacher if member == "teacher" else settings.members[member]
    if options.cache or not options.path:
        raise ValueError(
            f"{section}.path={options.path!r} and {section}.cache={options.cache!r}, but the model is needed to write a cache; "
            f"set {section}.path, and leave {section}.cache empty."
        )
    return options


def _check_numbers(kind: str, k: int, power: float, part_rows: int, vocab_size: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}.")
    if kind != "hidden" and not 1 <= k < vocab_size:
        raise ValueError(f"k={k} must be at least 1 and less than the vocabulary's {vocab_size} ids.")
    if not 0 < power <= 4:
        raise ValueError(f"power={power} must be above 0, and at most 4.")
    if part_rows < 1:
        raise ValueError(f"part_rows={part_rows} must be at least 1.")


def _check_folder(folder: Path, manifest: files.Manifest) -> None:
    """Checks that a folder has this cache, is empty, or does not exist.

    Raises:
      ValueError: the folder has another cache, or a file of another program.
    """
    if (folder / files.MANIFEST).exists():
        written = read_json(folder / files.MANIFEST)
        lines = files.differences(written, manifest | {"head_hash": written.get("head_hash")})
        if lines := [line for line in lines if not line.startswith("teacher.path: ")]:
            raise ValueError(
                f"{folder} has another cache. Choose another folder, or undo these changes:\n  "
                + "\n  ".join(lines[: files.SHOWN])
            )
    elif unknown := files.unknown_name(folder):
        raise ValueError(
            f"{folder} has a file that is not of a cache, {clip(unknown)}; choose an empty folder, or one that does not exist."
        )


def _begin(folder: Path, manifest: files.Manifest, tokenizer: data.Tokenizer, head: np.ndarray | None) -> None:
    """Deletes partial files of killed calls, and writes the output matrix, the tokenizer and, last, the manifest."""
    for path in files.partials(folder):
        path.unlink()
    if not (folder / files.MANIFEST).exists():
        if head is not None:
            manifest["head_hash"] = files.write_head(folder, manifest["head"], head)
        files.write_tokenizer(folder, tokenizer)
        files.write_manifest(folder, manifest)


def _share(folder: Path, manifest: files.Manifest) -> list[tuple[str, int | None, list[int]]]:
    """Returns the rounds in which the missing parts are written. In each round, each process writes at most one part.

    Returns:
      For each round: the split, this process's part or None, and the numbers of rows of all parts of the round.
    """
    all_parts, missing = files.all_parts(manifest), set(files.missing_parts(folder, manifest))
    is_missing = np.array([part in missing for part in all_parts])
    if jax.process_count() > 1:  # all processes use the list of the first process
        is_missing = np.asarray(multihost_utils.broadcast_one_to_all(is_missing))
    count, index, rounds = jax.process_count(), jax.process_index(), []
    for split, about in manifest["splits"].items():
        sizes = files.part_sizes(about["rows"], manifest["part_rows"])
        parts = [part for (name, part), wanted in zip(all_parts, is_missing, strict=True) if wanted and name == split]
        for start in range(0, len(parts), count):
            of_round = parts[start : start + count]
            own = of_round[index] if index < len(of_round) else None
            rounds.append((split, own, [sizes[part] for part in of_round]))
    return rounds


def _records(
    manifest: files.Manifest, rows: data.Rows, line_arrays: data.LineArrays | None, split: str, part: int | None, most_rows: int,
    read: Callable[[dict[str, Array], str], dict[str, Array]], batch_size: int, max_length: int, pad_id: int,
    mesh: jax.sharding.Mesh, done: Callable[[], object],
) -> Iterator[bytes]:  # fmt: skip
    """Yields the records of a part. All processes compute together as many batches as the largest part needs.

    Args:
      manifest: the manifest of the cache.
      rows: the rows of the split.
      line_arrays: the maker of the arrays of a model with a view, or None.
      split: 'train' or 'held_out'.
      part: the part of this process; None if the process has none in this round.
      most_rows: the number of rows of the largest part of the round.
      read: the function of `_make_read`, with the teacher's parameters.
      batch_size, max_length, pad_id, mesh: the settings of the batches.
      done: a function that is called after each batch.
    """
    share = batch_size // jax.process_count()
    first = 0 if part is None else part * manifest["part_rows"]
    indices = [] if part is None else range(first, min(first + manifest["part_rows"], len(rows)))
    for start in range(0, most_rows, share):
        of_batch = list(indices[start : start + share])
        batch = data.pad(rows, [(index,) for index in of_batch], share, max_length, pad_id)
        arrays = {"tokens": batch["tokens"], "mask": batch["mask"] > 0}
        if line_arrays is not None:
            arrays |= teacher_arrays(line_arrays.of_lines([(index,) for index in of_batch], share))
        arrays["index"] = np.array(of_batch + [0] * (share - len(of_batch)), np.int32)
        read_values = read(sharding.put_batch(mesh, arrays), split)
        values = {name: _own_rows(array, share) for name, array in read_values.items()}
        done()
        for batch_row, index in enumerate(of_batch):
            counted = batch["loss_mask"][batch_row]
            of_row = {name: array[batch_row][counted] for name, array in values.items()}
            yield files.record(
                manifest, split, rows, index, merged(of_row) if manifest["kind"] == "samples" else of_row
            )


def _own_rows(array: jax.Array, share: int) -> np.ndarray:
    """Returns this process's rows of a batch's array. This reverses `sharding.put_batch`."""
    shards = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    rows = np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])
    if len(rows) == share:
        return rows
    # `tensor` is wider than this process's devices, so the devices have rows of other processes.
    return sharding.fetch_whole(array)[jax.process_index() * share : (jax.process_index() + 1) * share]


def _make_read(frozen: FrozenModel, teacher: models.Model, manifest: files.Manifest, mesh: jax.sharding.Mesh) -> Read:
    """Returns the jitted function that computes the values to store, from `frozen`, whose model is `teacher`."""
    kind, k, vocab_size = manifest["kind"], manifest["k"], manifest["vocab_size"]

    def read(params: PyTree, batch: dict[str, Array], split: str) -> dict[str, Array]:
        hidden = frozen.outputs(sharding.for_lookup(mesh, params), batch).hidden
        assert hidden is not None  # a model has hidden states
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
            # The key of a token depends on the row and the position only, and not on the batch of the row.
            position_keys = lambda key: jax.vmap(partial(jax.random.fold_in, key))(start + jnp.arange(hidden.shape[1]))
            uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (k, 2), jnp.float32)))
            return draw(log_p, 1 - uniform(jax.vmap(position_keys)(keys)), manifest["power"])

        # A piece has some positions of every row, so that no row leaves its device.
        rows, length = hidden.shape[0] // (mesh.shape["data"] * mesh.shape["fsdp"]), hidden.shape[1]
        size = max(1, min(length, CHUNK_BYTES // (4 * max(rows, 1) * vocab_size)))
        pieces = -(-length // size)
        padded = jnp.pad(hidden, ((0, 0), (0, pieces * size - length), (0, 0)))
        divided = padded.reshape(hidden.shape[0], pieces, size, -1).swapaxes(0, 1)
        values = jax.lax.map(lambda args: piece(*args), (jnp.arange(pieces) * size, divided))
        joined = lambda array: array.swapaxes(0, 1).reshape(hidden.shape[0], pieces * size, *array.shape[3:])
        return jax.tree.map(lambda array: joined(array)[:, :length], values)

    return jax.jit(read, static_argnames="split", out_shardings=sharding.batch_sharding(mesh))


def remaining_results() -> str:
    """Returns a clause that names what remains of the cache after Ctrl-C."""
    count = len(list(remote.local_folder(str(main.WORKDIR.value)).glob("*/*.array_record")))
    return f"{count} complete files remain in {main.WORKDIR.value}, and the same command writes the missing files"


def run(argv: list[str]) -> None:
    command.start()
    logging.set_verbosity(logging.ERROR)
    if len(argv) > 1:
        sys.exit(f"kd_jax: {argv[1]!r} is no flag; flags look like --kind=top_k.")
    main.use_cache()
    arguments = str(main.WORKDIR.value), KIND.value, K.value, POWER.value, PART_ROWS.value
    member = MEMBER.value
    with main.ends_well(remaining_results):
        main.join(main.PROCESSES.value)
        main.check_same(main.CONFIG.value.to_dict(), *arguments, member)
        with storage.room(arguments[0]):
            write(main.CONFIG.value, *arguments, member=member)


if __name__ == "__main__":
    app.run(run, flags_parser=main.parse)
