"""The section of a report page about one folder of a run, an evaluation or an ablation."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_jax import storage
from kd_jax.report import comparison, plots
from kd_jax.report.comparison import rouge_line
from kd_jax.storage.files import Json

COLUMNS = ("forward_kl", "reverse_kl", "own_reverse_kl", "cross_entropy", "rouge_l", "top1_agreement", "number_match")
AUTHORS = {"teacher": "teacher", "before": "student before", "after": "student after"}  # for a run


@dataclasses.dataclass(frozen=True)
class Text:
    """An author's answer to a prompt.

    Attributes:
      who: the author.
      text: the text.
      rouge_l: the ROUGE-L score, in [0, 100].
      pieces: each token's part of the text; or empty.
      kl: KL(q || p) at each token, in nats; or empty.
      weights: the weight of each token under each term that has a rule, by the name of the term.
    """

    who: str
    text: str
    rouge_l: float
    pieces: tuple[str, ...] = ()
    kl: tuple[float, ...] = ()
    weights: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Generation:
    """A prompt, its references, and the answers to the prompt."""

    prompt: str
    references: tuple[str, ...]
    texts: tuple[Text, ...]


@dataclasses.dataclass(frozen=True)
class Section:
    """The section of a folder on the page.

    Attributes:
      name: the name of the folder.
      kind: the kind: run, evaluation or ablation.
      verdict: the results, in sentences.
      cards: the most important numbers, as (title, pairs of (author, number)).
      tables: tables in Markdown.
      charts: the charts.
      generations: the generated texts.
      notes: sentences about the generated texts.
      config: the config as JSON.
      environment: the environment, as name -> value.
      lines: lines of `comparison`, with which the folder is compared to other folders of the same kind.
      workdirs: the work directories of the lines, if the lines are runs.
    """

    name: str
    kind: str
    verdict: tuple[str, ...]
    cards: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    tables: tuple[str, ...]
    charts: tuple[plots.Chart, ...]
    generations: tuple[Generation, ...]
    notes: tuple[str, ...]
    config: str
    environment: Json
    lines: tuple[Json, ...]
    workdirs: tuple[Path, ...]


def read(folder: Path, name: str) -> Section:
    """Returns the section of a folder, with the given name.

    Raises:
      ValueError: the folder does not exist, or has no finished run, evaluation or ablation.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}.")
    if (folder / "config.json").exists() and "axes" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        return _ablation(folder, name)
    if (folder / "result.json").exists():
        return _run(folder, name)
    if "given" in (_lines_of(folder / "results.jsonl") or [{}])[-1]:
        return _evaluation(folder, name)
    raise ValueError(
        f"{folder} has no result.json of a finished run, results.jsonl of an evaluation, or config.json of an ablation."
    )


def _section(folder: Path, name: str, kind: str, config: Json, **parts: Any) -> Section:
    environment, table = folder / "environment.json", folder / "table.md"
    defaults: dict[str, Any] = dict(cards=(), generations=(), notes=(), workdirs=())
    return Section(
        name=name, kind=kind, config=json.dumps(config, indent=2),
        environment=json.loads(environment.read_text(encoding="utf-8")) if environment.exists() else {},
        tables=(table.read_text(encoding="utf-8"),) if table.exists() else (), **defaults | parts,
    )  # fmt: skip


def _run(folder: Path, name: str) -> Section:
    config, result = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("config.json", "result.json")
    )
    teacher, before, after = result.get("teacher", {}), result["before"], result["after"]
    tokens = comparison.over_tokens(folder)[-1][0]
    verdict = [f"The run took {config['steps']:,} steps, and the loss counted {tokens:,.0f} tokens."]
    cards = []
    for metric in comparison.present([result], COLUMNS):
        numbers = [(who, f"{result[key][metric]:.3f}") for key, who in AUTHORS.items() if metric in result.get(key, {})]
        cards.append((comparison.title(metric), tuple(numbers)))
        # A divergence from the teacher is 0 for the teacher itself.
        goal = 0.0 if metric in ("forward_kl", "reverse_kl", "own_reverse_kl") else teacher.get(metric)
        if goal is not None and metric in before and abs(before[metric] - goal) > 1e-9:
            share = (before[metric] - after[metric]) / (before[metric] - goal)
            progress = f"{share:.0%} of the way" if share >= 0.005 else "no nearer"
            verdict.append(
                f"{comparison.title(metric)} went from {before[metric]:.3f} to {after[metric]:.3f}, {progress} to the "
                f"teacher's {goal:.3f}."
            )
    charts = plots.curves(str(folder))
    if "by_place" in result:
        places, given, own = (result["by_place"][key] for key in ("places", "given", "own"))
        charts.insert(0, _by_place(places, given, own))
    generations = _generations(folder, AUTHORS)
    return _section(
        folder, name, "run", config, verdict=tuple(verdict), cards=tuple(cards), charts=tuple(charts),
        generations=tuple(generations), notes=tuple(result.get("without_weights", ())),
        lines=({"point": {"run": name}, "seed": config["seed"], "before": before, "after": after},),
        workdirs=(folder,),
    )  # fmt: skip


def _evaluation(folder: Path, name: str) -> Section:
    *seeds, results = _lines_of(folder / "results.jsonl")
    given, over_seeds, count = results["given"], results["seeds"], results["rows"]
    seed_word = "seed" if len(seeds) == 1 else "seeds"
    cards, verdict = [], [f"The evaluation has {count:,} prompts and {len(seeds)} generation {seed_word}."]
    for metric in (n for n in COLUMNS if n in over_seeds or n in given):
        mean, deviation = over_seeds.get(metric) or (given[metric], None)
        spread = "" if deviation is None else f" ± {deviation:.3f}"
        cards.append((comparison.title(metric), (("model", f"{mean:.3f}{spread}"),)))
    if "rouge_l_words" in results:  # absent from an evaluation by an older version
        verdict.append(rouge_line(results["rouge_l_words"]))
    charts: list[plots.Chart] = []
    if "own" in (places := results.get("by_place", {})):
        on_given, on_own = given["reverse_kl"], over_seeds["own_reverse_kl"][0]
        verdict.append(
            f"KL(q || p) is {on_given:.3f} on the given text and {on_own:.3f} on the model's own text. "
            f"The exposure bias is {on_own - on_given:+.3f} nats per token."
        )
        charts.append(_by_place(places["places"], places["given"], places["own"]))
    rows: list[Generation] = []
    for i, line in enumerate(_lines_of(folder / "generations.jsonl")):
        if i < count:  # all rows of the first seed come first, then all rows of the next seed
            rows.append(Generation(line["prompt"], tuple(line["references"]), ()))
        row = rows[i % count]
        texts = (*row.texts, _text(f"seed {line['seed']}", line))
        rows[i % count] = dataclasses.replace(row, texts=texts)
    compared = [{"point": {"evaluation": name}, "seed": s["seed"], "before": {}, "after": given | s} for s in seeds]
    without_seeds = [{"point": {"evaluation": name}, "seed": 0, "before": {}, "after": given}]
    return _section(
        folder, name, "evaluation", results["arguments"], verdict=tuple(verdict), cards=tuple(cards),
        charts=tuple(charts), generations=tuple(rows), lines=tuple(compared or without_seeds),
    )  # fmt: skip


def _ablation(folder: Path, name: str) -> Section:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    lines, columns = _lines_of(folder / "results.jsonl"), config["metrics"]
    groups = comparison.grouped(lines)
    verdict = [f"{len(lines)} runs of {len(groups)} points are finished."]
    for metric in comparison.present(lines, columns):
        with_metric = {point: runs for point, runs in groups.items() if comparison.present(runs, [metric])}
        verdict += _lead(metric, with_metric)
    runs = tuple(folder / line["folder"] / "run" for line in lines)
    workdirs = runs if all((run / "metrics.jsonl").exists() for run in runs) else ()
    charts = comparison.charts(comparison.axes_of(config), columns, lines, workdirs)
    first_seeds: dict[str, Path] = {}
    for line, run in zip(lines, runs, strict=True):
        first_seeds.setdefault(comparison.named(line), run)
    written = [(point, _generations(run, {"teacher": "teacher", "after": ""})) for point, run in first_seeds.items()]
    generations = merged(written)
    return _section(
        folder, name, "ablation", config, verdict=tuple(verdict), charts=tuple(charts), lines=tuple(lines),
        workdirs=workdirs, generations=tuple(generations),
    )  # fmt: skip


def _lead(name: str, groups: dict[str, list[comparison.Line]]) -> list[str]:
    """Returns a sentence with the best point, and a comparison of its lead with the standard deviations.

    The list is empty if there are fewer than two points with numbers.
    """
    if len(groups) < 2:
        return []
    best = comparison.winner(groups, name)
    second = comparison.winner({point: runs for point, runs in groups.items() if point != best}, name)
    if not best or not second:
        return []  # a metric is not a number
    (mean, deviation), (second_mean, second_deviation) = (comparison.mean(groups[p], name) for p in (best, second))
    lead = abs(second_mean - mean)
    comparative = "more" if lead > max(deviation, second_deviation) else "less"
    has_seeds = min(len(groups[best]), len(groups[second])) > 1
    certainty = f"{comparative} than their deviations" if has_seeds else "with one seed"
    return [f"{comparison.title(name)}: {best} is best with {mean:.3f}, {lead:.3f} ahead of {second}, {certainty}."]


def merged(several: Sequence[tuple[str, Sequence[Generation]]]) -> list[Generation]:
    """Returns the texts of several sets of generations, side by side for each prompt.

    A teacher's text that is the same in all sets appears only once.

    Args:
      several: pairs of (name, generations).
    """
    rows: dict[tuple[str, tuple[str, ...], int], list[tuple[str, Text]]] = {}
    for name, generations in several:
        counts: dict[tuple[str, tuple[str, ...]], int] = {}
        for generation in generations:
            row = (generation.prompt, generation.references)
            counts[row] = counts.get(row, 0) + 1  # a dataset may have a row twice
            rows.setdefault((*row, counts[row]), []).extend((name, text) for text in generation.texts)
    return [
        Generation(prompt, references, tuple(_side_by_side(texts)))
        for (prompt, references, _), texts in rows.items()
    ]  # fmt: skip


def _side_by_side(texts: Sequence[tuple[str, Text]]) -> list[Text]:
    teachers = {text.text: text for _, text in texts if text.who == "teacher"}
    same_teacher = len(teachers) == 1
    named = (
        dataclasses.replace(text, who=f"{name}: {text.who}".rstrip(": "))
        for name, text in texts
        if not (same_teacher and text.who == "teacher")
    )
    return [*(teachers.values() if same_teacher else ()), *named]


def _by_place(places: Sequence[str], given: Json, own: Json) -> plots.Chart:
    return plots.by_place(places, {"given text": given["reverse_kl"], "own text": own["reverse_kl"]})


def _generations(workdir: Path, authors: dict[str, str]) -> list[Generation]:
    """Returns the generations of a run's generations.jsonl, with the texts of the given authors."""
    return [
        Generation(
            line["prompt"],
            tuple(line["references"]),
            tuple(_text(who, line[key]) for key, who in authors.items() if key in line),
        )
        for line in _lines_of(workdir / "generations.jsonl")
    ]


def _text(who: str, line: Json) -> Text:
    weights = {name: tuple(values) for name, values in line.get("token_weights", {}).items()}
    pieces, kl = (tuple(line.get(key, ())) for key in ("pieces", "reverse_kl"))
    return Text(who, line["response"], line["rouge_l"], pieces, kl, weights)


def _lines_of(path: Path) -> list[Json]:
    return storage.read_json_lines(path) if path.exists() else []
