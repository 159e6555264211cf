"""Writes the results of a run: texts before and after training, a table, plots, a page, and the student's folder."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, PyTree

from kd_jax import evaluate, metrics, models, report, sharding
from kd_jax.models import peft
from kd_jax.prefixes import rollouts
from kd_jax.report import plots
from kd_jax.run.build import Run
from kd_jax.run.rule_weights import token_weights, with_rules
from kd_jax.settings import Sampling
from kd_jax.storage import read_json_lines, write_json_lines, write_whole
from kd_jax.storage.files import Json
from kd_jax.train_step import Batch

STUDENT, ADAPTER = "student", "adapter"
BEFORE, AFTER = "generations_before.jsonl", "generations.jsonl"


def begin(run: Run, params: PyTree, workdir: str) -> None:
    """Writes the student's texts before the first step. `finish` shows these texts beside the texts after training.

    Args:
      run: a `Run`.
      params: the trained parameters of the first state.
      workdir: the work directory of the run.
    """
    params = run.models.complete(params)
    written = _answers(run, run.models.student, params, token_weights(run, params, step=0))[0]
    if jax.process_index() == 0:
        write_json_lines(Path(workdir) / BEFORE, written)


def finish(run: Run, params: PyTree, workdir: str, quiet: bool = False) -> Json:
    """Writes a run's table, plots, samples, page and student, and prints the samples and the table.

    Args:
      run: a `Run`.
      params: the trained parameters of the last state.
      workdir: the work directory of the run, with its metrics.
      quiet: whether to print nothing.

    Returns:
      {"teacher": ..., "before": ..., "after": ...}, each a result of `Run.evaluate`. With a teacher there is also
      "by_place", the distance of the student from the teacher along the response. If the page cannot show the token
      weights of a term, there is also "without_weights", with a sentence for each of these terms. With several
      processes, only the first one has "before" and "after".
    """
    folder, first = Path(workdir), jax.process_index() == 0
    trained, params = params, run.models.complete(params)
    result: Json = {}
    if first:
        lines = [_numbers(line) for line in metrics.read(workdir) if line["split"] == "eval"]
        result = {"before": lines[0], "after": lines[-1]}
    weights = token_weights(run, params, step=run.config.steps)
    answers, own_values = _answers(run, run.models.student, params, weights)
    texts = {"after": answers}
    if first and (folder / BEFORE).exists():  # the file is missing in a run that an older version began
        texts = {"before": read_json_lines(folder / BEFORE)} | texts
    if run.models.teacher is not None:
        result = {"teacher": run.evaluate_teacher()} | result
        texts = {"teacher": _answers(run, run.models.teacher, run.models.teacher_params, alone=True)[0]} | texts
        places = {"given": evaluate.by_place(_first_batch(run, params)), "own": evaluate.by_place(own_values)}
        result["by_place"] = {"places": evaluate.PLACES, **places}
    if sentences := with_rules(run)[1]:
        result["without_weights"] = sentences
    _export(run, trained, params, folder)
    if first:
        _write(folder, result, texts)
        rows = {"counts": run.counts, "remarks": run.remarks}
        write_whole(folder / "rows.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
        if not quiet:
            metrics.tqdm.write((folder / "samples.md").read_text(encoding="utf-8"))
            metrics.tqdm.write((folder / "table.md").read_text(encoding="utf-8"))
            metrics.tqdm.write(f"wrote {folder / 'report.html'} and {folder / STUDENT}")
    sharding.barrier("the results are written")  # otherwise processes that leave early would time out at the exit
    return result


def result_table(result: dict[str, dict[str, float]]) -> str:
    """Returns a table with a row for each metric, and a column for teacher, student before and student after."""
    columns = {author: values for author, values in result.items() if author in report.AUTHORS}
    rows = [["held-out rows", *(report.AUTHORS[author] for author in columns)]]
    for name in result["after"]:
        rows.append([name, *(f"{values[name]:.4f}" if name in values else "" for values in columns.values())])
    return metrics.table(rows)


def _write(folder: Path, result: Json, texts: dict[str, list[Json]]) -> None:
    write_whole(folder / "result.json", json.dumps(result, indent=2) + "\n")
    write_whole(folder / "table.md", result_table(result) + "\n")
    rows = []
    for lines in zip(*texts.values(), strict=True):
        prompt = {name: lines[0][name] for name in ("prompt", "references")}
        answers = ({k: v for k, v in line.items() if k not in (*prompt, "seed")} for line in lines)
        rows.append(prompt | dict(zip(texts, answers, strict=True)))
    write_json_lines(folder / AFTER, rows)
    write_whole(folder / "samples.md", _samples(rows[:5], list(texts)))
    for chart in plots.curves(str(folder)):
        plots.save(chart, folder)
    report.write_environment(folder)
    report.write([folder])


def _export(run: Run, trained: PyTree, params: PyTree, folder: Path) -> None:
    """Writes the student as a complete model, with the products of LoRA added, and beside it the adapter of PEFT."""
    trainee, options = run.models.trainee, run.config.student
    exists = lambda name: sharding.from_first_process(int(jax.process_index() == 0 and (folder / name).exists()))
    if not exists(STUDENT):
        # The type of frozen parameters may be too coarse for the changes.
        dtype = None if trainee.part is None else np.float32
        models.save_pretrained(folder / STUDENT, run.models.student, params, run.tokenizer, dtype=dtype)
    if isinstance(trainee.part, models.Lora) and not exists(ADAPTER):
        base = options.path if options.init == "pretrained" else ""
        peft.save_adapter(folder / ADAPTER, trainee.part, trained, run.models.student, base)


def _answers(
    run: Run, model: models.Model, params: PyTree,
    weigh: Callable[[Batch], dict[str, Array]] | None = None, alone: bool = False,
) -> tuple[list[Json], dict[str, np.ndarray]]:  # fmt: skip
    """Returns a model's answers to the shown prompts, and the measures at each token of the answers.

    Unless `alone` is true, the measures compare the model with the teacher. `weigh` is the argument
    `token_weights` of `evaluate.assess`.
    """
    longest = max(len(example.prompt) for example in run.sample_examples)
    room = max(1, min(run.config.sample_tokens, run.models.max_positions - longest))
    sampling = Sampling(max_new_tokens=room)
    sampler = rollouts.make_sampler(run.mesh, run.tokenizer, run.config.data.max_length, sampling)
    teacher = None if alone else run.models.teacher
    return evaluate.assess(
        sampler, (model, params, teacher, None if alone else run.models.teacher_params), run.sample_examples,
        batch_size=run.config.data.eval_batch_size, seed=run.config.seed, chunk=run.config.loss.chunk or None,
        token_weights=weigh,
    )[1:]  # fmt: skip


def _first_batch(run: Run, params: PyTree) -> dict[str, np.ndarray]:
    """Returns the student's measures at each token of the first held-out batch, whose prompts are `Run.sample_examples`."""
    return evaluate.collect(
        run.models.student, params, run.models.teacher, run.models.teacher_params,
        itertools.islice(run.eval_batches(), 1), run.mesh, vocab_size=run.tokenizer.vocab_size,
        chunk=run.config.loss.chunk or None,
    )  # fmt: skip


def _samples(rows: list[Json], authors: list[str]) -> str:
    blocks = []
    for i, row in enumerate(rows, start=1):
        texts = {"reference": row["references"][0]} | {report.AUTHORS[name]: row[name]["response"] for name in authors}
        parts = "\n\n".join(f"**{name}**: {text}" for name, text in texts.items())
        blocks.append(f"### Row {i}\n\n~~~\n{row['prompt']}\n~~~\n\n{parts}\n")
    return "\n".join(blocks)


def _numbers(line: Json) -> dict[str, float]:
    return {name: value for name, value in line.items() if name not in ("step", "split")}
