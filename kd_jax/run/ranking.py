"""Ranks the rows of a dataset for a curriculum by scores of the student before training, which are stored for later runs."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from kd_jax import data, evaluate, metrics, models, resolve, sharding
from kd_jax.data import orders
from kd_jax.prefixes import Source, responses, rollouts
from kd_jax.run.checks import check_room
from kd_jax.run.models import Models, initial_key
from kd_jax.settings import Sampling, Settings, name_of
from kd_jax.storage import directory, read_json_lines, remote, storing, write_json_lines, write_whole
from kd_jax.storage.files import Json
from kd_jax.teachers.cache_files import describe_rows

RANKING_VERSION = 1
SCORES = ("rouge_l", "cross_entropy")
FILE = "scores.jsonl"
Order = orders.curriculum | orders.shuffled


def check_order(config: Settings, source: Source) -> None:
    """Checks the order of the rows against the rows and the steps of a config.

    Raises:
      ValueError: the order is unknown, a number is out of range, or the order cannot be combined with other keys.
    """
    order = _make_order(config)
    if isinstance(order, orders.shuffled):
        return
    options, sampling = config.data, config.sampling
    if order.stages > config.steps:
        raise ValueError(
            f"data.order: stages={order.stages} is more than steps={config.steps}; set fewer stages, or more steps."
        )
    if options.name == "text" or options.packing != "none":
        raise ValueError(
            f"data.order={name_of(options.order)!r} ranks rows with prompts and responses, but data.name={options.name!r} and "
            f"data.packing={options.packing!r}; set data.packing='none' and a dataset with prompts, or data.order.name='shuffled'."
        )
    one_by_one = not source.authors or (source.authors == ("student",) and source.every == source.epochs == 1)
    if "teacher" in source.origins or source.capacity or not one_by_one or sampling.rollouts_per_prompt > 1:
        raise ValueError(
            f"data.order={name_of(options.order)!r} has stages of the run, so that each step must read one batch of the dataset. "
            f"This is not so with prefixes={config.prefixes!r} and sampling.rollouts_per_prompt={sampling.rollouts_per_prompt}. Set "
            f"prefixes.name to 'data', to 'mixture', or to 'student' with every=1 and epochs=1, and rollouts_per_prompt=1; or set "
            f"data.order.name='shuffled'."
        )
    check_room(config)


def load_order(
    config: Settings, tokenizer: data.Tokenizer, loaded: Models, mesh: jax.sharding.Mesh, rows: data.Rows
) -> Callable[[int], int] | None:
    """Returns the argument `order` of `data.batches` for a config. For a curriculum the rows are ranked first.

    The scores of the rows are computed with the student's initial parameters, unless they are on disk.

    Args:
      config: the config of the run.
      tokenizer: the tokenizer of the rows.
      loaded: the models of the run.
      mesh: the mesh of the models.
      rows: the training rows.

    Raises:
      ValueError: a row has no prompt, a score is not finite, or there are more stages than rows.
    """
    order = _make_order(config)
    if isinstance(order, orders.shuffled):
        return None
    if order.stages > len(rows):
        raise ValueError(f"data.order: stages={order.stages} is more than the {len(rows)} training rows.")
    if empty := int(np.sum(rows.prompt_lengths == 0)):
        raise ValueError(
            f"{empty} of the {len(rows)} rows of data.name={config.data.name!r} have an empty prompt, to which the student "
            f"cannot answer for data.order={name_of(config.data.order)!r}; remove these rows, or choose another template."
        )
    scores = _load_scores(config, tokenizer, loaded, mesh, rows)
    ranking = orders.easy_first(scores["rouge_l"], scores["cross_entropy"])
    return order.row_at(ranking, batch_size=config.data.batch_size, total_steps=config.steps, seed=config.seed)


def score_rows(
    rows: data.Rows, sampler: rollouts.Sampler, model: models.Model, params: PyTree, *, batch_size: int,
    chunk: int | None = None, progress: rollouts.Progress = iter,
) -> list[dict[str, float]]:  # fmt: skip
    """Returns the scores of each row: rouge_l and cross_entropy. All processes call this function together.

    Args:
      rows: rows with prompts and responses, of which exactly the responses count.
      sampler: the sampler of the model's answers, usually greedy.
      model: the model.
      params: the model's parameters.
      batch_size: the number of rows that are scored at a time.
      chunk: the argument of `evaluate.collect`.
      progress: a function that adds a progress bar to an iterable.

    Returns:
      For each row, rouge_l of the model's answer against the row's response, in [0, 100], and cross_entropy, the mean of
        -log q over the tokens of the response and its end token, in nats.
    """
    tokenizer = sampler.tokenizer
    share = batch_size // jax.process_count()
    own_rows = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    scores: list[dict[str, float]] = []
    for start in progress(range(0, len(rows), batch_size)):
        part = range(start, min(start + batch_size, len(rows)))
        prompts = [rows[i][: rows.prompt_lengths[i]].tolist() for i in part]
        answers = evaluate.respond(sampler, model, params, prompts, batch_size=batch_size, seed=0)
        batch = data.pad(rows, [(i,) for i in part], batch_size, sampler.max_length, tokenizer.pad_id)
        batch["mask"] = batch["mask"] > 0
        own = {name: array[own_rows] for name, array in batch.items()}
        values = evaluate.collect(
            model, params, None, None, [own], sampler.mesh, vocab_size=tokenizer.vocab_size, chunk=chunk
        )["cross_entropy"].astype(np.float64)  # fmt: skip
        counts = batch["loss_mask"].sum(axis=1)[: len(part)]
        means = np.add.reduceat(values, np.cumsum(counts) - counts) / counts
        for i, (_, answer), mean in zip(part, sampler.text(answers), means, strict=True):
            response = tokenizer.decode(tokenizer.strip_ends(rows[i][rows.prompt_lengths[i] :].tolist()))
            scores.append({"rouge_l": evaluate.rouge_l(answer, [response]), "cross_entropy": float(mean)})
    return scores


def _make_order(config: Settings) -> Order:
    try:
        order = resolve.build(config.data.order, orders)
    except ValueError as error:
        raise ValueError(f"data.order: {error}") from error
    if not isinstance(order, Order):
        raise ValueError(
            f"data.order={name_of(config.data.order)!r} is no order of kd_jax.data.orders, which has {', '.join(orders.__all__)}."
        )
    return order


def _load_scores(
    config: Settings, tokenizer: data.Tokenizer, loaded: Models, mesh: jax.sharding.Mesh, rows: data.Rows
) -> dict[str, np.ndarray]:
    """Returns the scores of `score_rows` by name, from the file of an earlier run or computed now."""
    options, student = config.data, loaded.student
    params = loaded.complete(loaded.init_student(initial_key(config)))
    only_responses = dataclasses.replace(rows, first_counted=rows.prompt_lengths, counted=None)
    settings: Json = {
        "max_new_tokens": config.sampling.max_new_tokens, "max_length": options.max_length,
        "student": str(student.config), "dtype": config.student.dtype, "rows": describe_rows(only_responses),
        "tokenizer": tokenizer.fingerprint(), "ends": tokenizer.end_ids,
    }  # fmt: skip
    made_from = responses.fingerprint(params, [RANKING_VERSION, settings])
    address = f"{options.data_dir or data.DEFAULT_DIR}/kd_jax_rankings/{made_from}"
    greedy = Sampling(max_new_tokens=config.sampling.max_new_tokens, temperature=0.0)
    sampler = rollouts.make_sampler(mesh, tokenizer, options.max_length, greedy)
    make_scores = lambda: score_rows(
        only_responses, sampler, student, params, batch_size=options.eval_batch_size, chunk=config.loss.chunk or None,
        progress=lambda it: metrics.tqdm(it, desc="ranking of the rows", unit="batch"),
    )  # fmt: skip
    with remote.folder_beside(address, writes=jax.process_index() == 0) as folder:
        _write_scores(folder, make_scores, settings | {"path": config.student.path, "data": options.name})
    sharding.barrier("the folder of the ranking is copied")  # no process reads before the folder is copied
    path = remote.local_file(f"{address}/{FILE}")
    metrics.tqdm.write(f"the ranking of the rows: {path}")
    lines = read_json_lines(path)
    if len(lines) != len(rows) or any(set(line) != set(SCORES) for line in lines):
        raise ValueError(
            f"{path} has not the scores of the {len(rows)} training rows; delete this file, and the rows are ranked again."
        )
    try:
        return {name: np.array([line[name] for line in lines], float) for name in SCORES}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: a score is no number ({error}); delete this file, and the rows are ranked again."
        ) from error


def _write_scores(folder: Path, make_scores: Callable[[], list[dict[str, float]]], settings: Json) -> None:
    """Writes the scores as a file of JSON lines, unless the file exists. All processes compute, and the first writes."""
    first = jax.process_index() == 0
    if first:
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    # Another run on this machine may rank the same rows. This run then waits for the other run.
    with directory.alone(folder, wait=True) if first else contextlib.nullcontext():
        if sharding.from_first_process(first and (folder / FILE).exists()):
            return
        scores = make_scores()
        if infinite := sum(not np.isfinite(line["cross_entropy"]) for line in scores):
            raise ValueError(
                f"the student's cross-entropy is not finite on {infinite} of the {len(scores)} training rows, so that "
                f"data.order cannot rank the rows; check the student's parameters and student.dtype."
            )
        if first:
            write_whole(folder / "settings.json", json.dumps(settings, indent=2, default=str) + "\n")
            write_json_lines(folder / FILE, scores)
