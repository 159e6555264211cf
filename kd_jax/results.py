"""What a finished run leaves: a table, plots, samples side by side, and the student as a Hugging Face folder."""

import itertools
from pathlib import Path
from typing import Any

from kd_jax import data, evaluate, metrics, models


def finish(run: Any, params: Any, workdir: str) -> dict[str, dict[str, float]]:
    """Leaves a run's table, plots, samples and student in its work directory, and prints them.

    Args:
      run: a `train.Run`.
      params: the student's, trained.
      workdir: of the run, with its metrics.

    Returns:
      {"teacher": ..., "before": ..., "after": ...}, each what `Run.evaluate` returns.
    """
    lines = [line for line in metrics.read(workdir) if line["split"] == "eval"]
    result = {"before": lines[0], "after": lines[-1]}
    if run.models.teacher is not None:
        result = {"teacher": run.evaluate_teacher()} | result
    folder = Path(workdir)
    (folder / "table.md").write_text(result_table(result) + "\n")
    (folder / "samples.md").write_text(_samples(run, params))
    plots = metrics.plot(workdir)
    export = folder / "student"
    if not export.exists():
        models.save_pretrained(export, run.models.student, params, run.tokenizer)
    metrics.tqdm.write((folder / "samples.md").read_text())
    metrics.tqdm.write(result_table(result))
    metrics.tqdm.write("wrote " + ", ".join(str(path) for path in [*plots, folder / "samples.md", export]))
    return {who: {k: v for k, v in values.items() if k not in ("step", "split")} for who, values in result.items()}


def result_table(result: dict[str, dict[str, float]]) -> str:
    """teacher / student before / student after, a row a metric."""
    names = [n for n in result["after"] if n not in ("step", "split")]
    title = {"before": "student before", "after": "student after"}
    rows = [["held-out rows", *(title.get(who, who) for who in result)]]
    for name in names:
        rows.append([name, *(f"{values[name]:.4f}" if name in values else "" for values in result.values())])
    return metrics.table(rows)


def _samples(run: Any, params: Any, count: int = 5) -> str:
    rows = (
        dict(zip(batch, row, strict=True)) for batch in run.eval_batches() for row in zip(*batch.values(), strict=True)
    )
    chosen = list(itertools.islice((row for row in rows if row["loss_mask"].any()), count))
    prompts = [data.prompt_of(row["tokens"], row["loss_mask"]) for row in chosen]
    texts = {"reference": [run.tokenizer.decode(row["targets"][row["loss_mask"]].tolist()) for row in chosen]}
    who = {"student": (run.models.student, params)}
    if run.models.teacher is not None:
        who = {"teacher": (run.models.teacher, run.models.teacher_params)} | who
    room = max(1, min(run.config.sample_tokens, run.models.max_positions - max(map(len, prompts))))
    for name, (model, its_params) in who.items():
        texts[name] = evaluate.sample(
            model, its_params, run.tokenizer, prompts, max_new_tokens=room, seed=run.config.seed
        )
    blocks = []
    for row, prompt in enumerate(prompts):
        parts = "\n\n".join(f"**{name}**: {texts[name][row]}" for name in texts)
        blocks.append(f"### Row {row + 1}\n\n~~~\n{run.tokenizer.decode(prompt)}\n~~~\n\n{parts}\n")
    return "\n".join(blocks)
