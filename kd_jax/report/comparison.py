"""Compares several runs: means and standard deviations over seeds, as a table and as charts."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_jax import metrics
from kd_jax.data.words import DESCRIBED
from kd_jax.report.plots import Chart, Draw, style, text
from kd_jax.settings import Config

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # slow to import

# For these numbers higher is better, for all other numbers lower.
HIGHER = ("rouge_l", "exact_match", "number_match", "accuracy", "top1_agreement", "finished")
TITLES = {
    "forward_kl": "KL(p || q)", "reverse_kl": "KL(q || p)", "own_forward_kl": "KL(p || q), own text",
    "own_reverse_kl": "KL(q || p), own text", "rouge_l": "ROUGE-L", "cross_entropy": "cross-entropy",
    "top1_agreement": "top-1 agreement",
}  # fmt: skip
Line = Mapping[str, Any]  # a run: {"point": {label: value}, "seed": ..., "before": numbers, "after": numbers}
Evaluations = list[tuple[float, dict[str, float]]]  # of a run: (tokens trained on, numbers) for each evaluation


def present(done: Sequence[Line], columns: Sequence[str]) -> list[str]:
    """Returns the columns for which at least one run has a number."""
    return [name for name in columns if any(name in line["after"] for line in done)]


def table(done: Sequence[Line], columns: Sequence[str]) -> str:
    """Returns a Markdown table with a row for each point: mean ± standard deviation over the seeds.

    The best mean of each column is in bold.
    """
    groups, names = grouped(done), present(done, columns)
    if not groups:
        return "No run is finished."
    best = {name: winner(groups, name) for name in names}
    rows = [[", ".join(done[0]["point"]), *names, "seeds"]]
    before = [[line["before"][name] for line in done if name in line["before"]] for name in names]
    if any(before):
        rows.append(["(before)", *map(number, before), ""])
    for point, lines in groups.items():
        cells = [number([line["after"][name] for line in lines if name in line["after"]]) for name in names]
        cells = [f"**{cell}**" if best[name] == point else cell for name, cell in zip(names, cells, strict=True)]
        rows.append([point, *cells, str(len(lines))])
    return metrics.table(rows)


def grouped(done: Sequence[Line]) -> dict[str, list[Line]]:
    """Returns the runs of each point, as a dict from the point's name."""
    groups: dict[str, list[Line]] = {}
    for line in done:
        groups.setdefault(named(line), []).append(line)
    return groups


def mean(lines: Sequence[Line], name: str) -> tuple[float, float]:
    """Returns the mean and standard deviation of a number after training. The mean is nan if no run has the number."""
    values = [line["after"][name] for line in lines if name in line["after"]]
    if not values:
        return float("nan"), 0.0
    return statistics.mean(values), _deviation(values) if len(values) > 1 else 0.0


def winner(groups: Mapping[str, Sequence[Line]], name: str) -> str:
    """Returns the point with the best mean."""
    means = {point: mean(lines, name)[0] for point, lines in groups.items()}
    known = {point: value for point, value in means.items() if value == value}  # nan differs from itself
    return (max if name in HIGHER else min)(known, key=known.__getitem__, default="")


def number(values: Sequence[float]) -> str:
    """Returns the mean ± standard deviation of the values as a string."""
    if not values:
        return ""
    deviation = f" ± {_deviation(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def rouge_line(counts: dict[str, int]) -> str:
    """Returns a sentence on the comparison of the references, from the counts of `scores.rouge_tokens`.

    Example:
      >>> rouge_line({"papers": 1200, "unicode": 0})
      'ROUGE-L compares 1,200 references by words of a to z and 0 to 9, stemmed, as in the papers.'
    """
    parts = [f"{counts[kind]:,} references by {text}" for kind, text in DESCRIBED.items() if counts[kind]]
    return f"ROUGE-L compares {'; and '.join(parts)}."


def _deviation(values: Sequence[float]) -> float:
    with np.errstate(invalid="ignore"):  # the deviation of an infinite perplexity is nan
        return float(np.std(values, ddof=1))


def charts(
    axes: Mapping[str, Sequence[object]], columns: Sequence[str], done: Sequence[Line], workdirs: Sequence[Path] = ()
) -> list[Chart]:
    """Returns bar charts, curves over the trained tokens, and heat maps if there are two axes of numbers.

    Args:
      axes: a dict from each axis's label to its values.
      columns: the names of the numbers to show.
      done: the finished runs.
      workdirs: the work directory of each finished run, for the curves; empty to omit the curves.
    """
    names, groups = present(done, columns), grouped(done)
    if not names:
        return []
    bars = {title(name): _bars(groups, done, name) for name in names}
    charts = [Chart("bars", bars, size=(4.2, 1.2 + 0.3 * len(groups)), columns=2)]
    runs: dict[str, list[Evaluations]] = {point: [] for point in groups}
    for line, workdir in zip(done, workdirs, strict=bool(workdirs)):
        runs[named(line)].append(over_tokens(workdir))
    if workdirs:
        legend = tuple((point, *style(i)) for i, point in enumerate(groups)) if len(groups) > 1 else ()
        charts.append(Chart("curves", {title(name): curve(runs, name) for name in names}, legend, columns=2))
    if len(axes) == 2 and all(isinstance(value, int | float) for values in axes.values() for value in values):
        panels = {title(name): _heatmap(groups, name, list(axes.items())) for name in names}
        charts.append(Chart("heatmap", panels, columns=2))
    return charts


def axes_of(config: Config) -> dict[str, tuple[object, ...]]:
    """Returns an ablation's axes as a dict from labels to values."""
    return {label: tuple(values) for label, _, values in config["axes"]}


def named(line: Line) -> str:
    """Returns the name of a run's point."""
    return ", ".join(map(str, line["point"].values()))


def title(name: str) -> str:
    """Returns the name of a number in the form of a title."""
    return TITLES.get(name, name.replace("_", " "))


def over_tokens(workdir: Path) -> Evaluations:
    """Returns the evaluations of a run, each with the number of tokens trained on before the evaluation."""
    tokens, evaluations = 0.0, []
    for line in sorted(metrics.read(str(workdir)), key=lambda line: line["step"]):
        if line["split"] == "train":
            tokens += line["tokens"]
        elif line["split"] == "eval":
            evaluations.append((tokens, line))
    return evaluations


def curve(runs: Mapping[str, Sequence[Evaluations]], name: str) -> Draw:
    """Returns the function that draws a number over tokens.

    The function draws, for each point, the mean of the seeds and a band of one standard deviation.
    """

    from matplotlib.ticker import EngFormatter  # slow to import

    def draw(axes: "Axes") -> None:
        for i, runs_of_point in enumerate(runs.values()):
            curves = [[(tokens, values[name]) for tokens, values in run if name in values] for run in runs_of_point]
            shortest = min(map(len, curves))
            array = np.array([run[:shortest] for run in curves]).reshape(len(curves), shortest, 2)
            tokens, means = array.mean(axis=0).T
            deviation = array[..., 1].std(axis=0, ddof=1) if len(curves) > 1 else 0
            colour, line = style(i)
            axes.plot(tokens, means, color=colour, linestyle=line)
            axes.fill_between(tokens, means - deviation, means + deviation, color=colour, alpha=0.15)
        axes.set(xlabel="tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))

    return draw


def _bars(groups: Mapping[str, Sequence[Line]], done: Sequence[Line], name: str) -> Draw:
    def draw(axes: "Axes") -> None:
        means, deviations = zip(*(mean(lines, name) for lines in groups.values()), strict=True)
        best = winner(groups, name)
        colours = ["C2" if point == best else "C0" for point in groups]
        axes.barh(list(map(text, groups)), means, xerr=deviations, color=colours, alpha=0.8, height=0.7)
        before = [line["before"][name] for line in done if name in line["before"]]
        if before:
            axes.axvline(statistics.mean(before), color="C1", linestyle="--", label="before")
            axes.legend(fontsize=8)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", labelsize=8)

    return draw


def _heatmap(groups: Mapping[str, Sequence[Line]], name: str, axes: list[tuple[str, Sequence[object]]]) -> Draw:
    (row_label, rows), (column_label, columns) = axes
    grid = np.array([[mean(groups.get(f"{row}, {column}", ()), name)[0] for column in columns] for row in rows])

    def draw(panel: "Axes") -> None:
        panel.grid(visible=False)
        image = panel.imshow(grid, cmap="viridis" if name in HIGHER else "viridis_r", origin="lower", aspect="auto")
        low, high = image.get_clim()
        for i, j in np.argwhere(~np.isnan(grid)):
            bright = image.cmap((grid[i, j] - low) / max(high - low, 1e-12))[1] > 0.6
            colour = "black" if bright else "white"
            panel.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="center", fontsize=8, color=colour)
        panel.set(xlabel=column_label, ylabel=row_label)
        panel.set_xticks(range(len(columns)), list(map(str, columns)))
        panel.set_yticks(range(len(rows)), list(map(str, rows)))
        panel.figure.colorbar(image, ax=panel, shrink=0.8)

    return draw
