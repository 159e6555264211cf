"""An ablation's runs as a table and plots: means and deviations over seeds."""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax import metrics

HIGHER = ("rouge_l", "exact_match", "accuracy", "top1_agreement", "finished")  # is better; of all else the lower


def write(
    axes: dict[str, tuple[Any, ...]], columns: list[str], done: list[dict[str, Any]], failed: list[str], folder: Path
) -> str:
    """Leaves results.jsonl, table.md, bars.png, curves.png and, of two axes of numbers, heatmap.png; returns the table.

    Args:
      axes: label -> values.
      columns: of the table, names of numbers.
      done: {"point", "seed", "before", "after"} of each finished run.
      failed: names of the runs that failed.
      folder: of the ablation.
    """
    names = [name for name in columns if any(name in line["after"] for line in done)]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in done), encoding="utf-8")
    text = table(done, names)
    if failed:
        text += "\n\nFailed, with the reason in error.txt of their folders: " + "; ".join(failed)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    if done and names:
        _bars(done, names, folder / "bars.png")
        _curves(done, names, folder)
        if len(axes) == 2 and all(isinstance(value, int | float) for values in axes.values() for value in values):
            _heatmap(done, names, list(axes.items()), folder / "heatmap.png")
    return text


def table(done: list[dict[str, Any]], names: list[str]) -> str:
    """Markdown, a row a point: mean ± deviation over the seeds, the best of each column in bold."""
    groups = _groups(done)
    if not groups:
        return "No run is finished."
    means = {name: {point: _mean(lines, name)[0] for point, lines in groups.items()} for name in names}
    best = {name: (max if name in HIGHER else min)(means[name], key=means[name].__getitem__) for name in names}
    rows = [[", ".join(done[0]["point"]), *names, "seeds"]]
    before = [line["before"] for line in done]
    rows.append(["(before)", *(_number([b[name] for b in before if name in b]) for name in names), ""])
    for point, lines in groups.items():
        cells = [_number([line["after"][name] for line in lines if name in line["after"]]) for name in names]
        cells = [f"**{cell}**" if best[name] == point else cell for name, cell in zip(names, cells, strict=True)]
        rows.append([point, *cells, str(len(lines))])
    return metrics.table(rows)


def _groups(done: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each point, by how it is called."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in done:
        groups.setdefault(", ".join(map(str, line["point"].values())), []).append(line)
    return groups


def _mean(lines: list[dict[str, Any]], name: str) -> tuple[float, float]:
    values = [line["after"][name] for line in lines if name in line["after"]]
    if not values:
        return float("nan"), 0.0
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _number(values: list[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def _figure(count: int, width: float, height: float) -> Any:
    import matplotlib.figure  # slow to import

    figure = matplotlib.figure.Figure(figsize=(width * count, height), layout="constrained")
    return figure, np.ravel(figure.subplots(1, count, squeeze=False))


def _bars(done: list[dict[str, Any]], names: list[str], path: Path) -> None:
    groups = _groups(done)
    figure, panels = _figure(len(names), 3.4, 1.2 + 0.32 * len(groups))
    for i, (name, axes) in enumerate(zip(names, panels, strict=True)):
        means, deviations = zip(*(_mean(lines, name) for lines in groups.values()), strict=True)
        axes.barh(list(groups), means, xerr=deviations, color="C0", alpha=0.8, height=0.7)
        axes.axvline(statistics.mean(line["before"][name] for line in done), color="C1", linestyle="--", label="before")
        axes.set(title=name.replace("_", " "))
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(labelleft=i == 0)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _curves(done: list[dict[str, Any]], names: list[str], folder: Path) -> None:
    """Each metric over the tokens trained on: the mean of a point's seeds, and a band of one deviation."""
    figure, panels = _figure(len(names), 4.2, 3.6)
    for colour, lines in enumerate(_groups(done).values()):
        label = ", ".join(map(str, lines[0]["point"].values()))
        runs = [_over_tokens(folder / line["folder"] / "run") for line in lines]
        for name, axes in zip(names, panels, strict=True):
            found = np.array([[(tokens, values[name]) for tokens, values in its_run] for its_run in runs])
            tokens, means = found.mean(axis=0).T
            deviation = found[..., 1].std(axis=0, ddof=1) if len(runs) > 1 else 0
            axes.plot(tokens, means, color=f"C{colour % 10}", linestyle="-" if colour < 10 else "--", label=label)
            axes.fill_between(tokens, means - deviation, means + deviation, color=f"C{colour % 10}", alpha=0.15)
            axes.set(title=name.replace("_", " "), xlabel="tokens")
            axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(folder / "curves.png", dpi=120)


def _over_tokens(workdir: Path) -> list[tuple[float, dict[str, float]]]:
    """The evaluations of a run, each with the tokens trained on before it."""
    tokens, found = 0.0, []
    for line in sorted(metrics.read(str(workdir)), key=lambda line: line["step"]):
        if line["split"] == "train":
            tokens += line["tokens"]
        elif line["split"] == "eval":
            found.append((tokens, line))
    return found


def _heatmap(done: list[dict[str, Any]], names: list[str], axes: list[tuple[str, Any]], path: Path) -> None:
    (row_label, rows), (column_label, columns) = axes
    figure, panels = _figure(len(names), 3.8, 3.4)
    for name, panel in zip(names, panels, strict=True):
        grid = np.full((len(rows), len(columns)), np.nan)
        for i, j in np.ndindex(grid.shape):
            lines = [line for line in done if list(line["point"].values()) == [rows[i], columns[j]]]
            grid[i, j] = _mean(lines, name)[0]
        image = panel.imshow(grid, cmap="viridis" if name in HIGHER else "viridis_r", origin="lower")
        for i, j in np.argwhere(~np.isnan(grid)):
            panel.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="center", fontsize=8, color="white")
        panel.set(title=name.replace("_", " "), xlabel=column_label, ylabel=row_label)
        panel.set_xticks(range(len(columns)), columns)
        panel.set_yticks(range(len(rows)), rows)
        figure.colorbar(image, ax=panel, shrink=0.8)
    figure.savefig(path, dpi=120)
