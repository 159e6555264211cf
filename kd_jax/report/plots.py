"""Charts as lists of panels. A chart becomes one PNG file, or one SVG drawing per panel in a page."""

import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kd_jax import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # slow to import

Draw = Callable[["Axes"], None]
SPLITS = {"train": "losses", "eval": "evaluation", "samples": "sampling"}  # a split in metrics.jsonl -> its chart


@dataclasses.dataclass(frozen=True)
class Chart:
    """A set of panels with one legend.

    Attributes:
      name: the name of the file, without its suffix.
      panels: a dict from a panel's title to a function that draws on a pair of matplotlib axes.
      legend: (label, colour, line style) of each series that all panels show; empty if there is only one series.
      size: the width and height of a panel, in inches.
      columns: the number of panels beside each other in a file.
    """

    name: str
    panels: dict[str, Draw]
    legend: tuple[tuple[str, str, str], ...] = ()
    size: tuple[float, float] = (4.2, 3.0)
    columns: int = 3


def style(i: int) -> tuple[str, str]:
    """Returns the colour and line style of the i-th series."""
    return f"C{i % 10}", ("-", "--", ":", "-.")[i // 10 % 4]


def text(label: str) -> str:
    """Returns a label with escaped dollar signs, which would otherwise start a formula of matplotlib."""
    return label.replace("$", r"\$")


def css(colour: str) -> str:
    """Returns a matplotlib colour in the hexadecimal notation of web pages."""
    import matplotlib.colors  # slow to import

    return matplotlib.colors.to_hex(colour)


def save(chart: Chart, folder: Path) -> Path:
    """Saves all panels and the legend as a PNG file, and returns the path of the file."""
    import matplotlib.figure  # slow to import, and not always needed
    import matplotlib.lines

    columns = min(chart.columns, len(chart.panels))
    rows = math.ceil(len(chart.panels) / columns)
    handles = [
        matplotlib.lines.Line2D([], [], color=colour, ls=line, label=text(label))
        for label, colour, line in chart.legend
    ]
    lines_of_legend = math.ceil(len(handles) / 3)
    size = chart.size[0] * columns, chart.size[1] * rows + 0.2 * lines_of_legend
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    axes = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for panel, (title, draw) in zip(axes, chart.panels.items(), strict=False):
        _draw(panel, title, draw)
    for unused in axes[len(chart.panels) :]:
        unused.set_visible(False)
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
    path = folder / f"{chart.name}.png"
    figure.savefig(path, dpi=120)
    return path


def svg(chart: Chart) -> list[str]:
    """Returns each panel as an SVG element in which text stays text."""
    import matplotlib
    import matplotlib.figure

    elements = []
    for title, draw in chart.panels.items():
        figure = matplotlib.figure.Figure(figsize=chart.size, layout="constrained")
        _draw(figure.subplots(), title, draw)
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
            figure.savefig(
                buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")), transparent=True
            )
        document = buffer.getvalue()
        elements.append(document[document.index("<svg") :])
    return elements


def _draw(axes: "Axes", title: str, draw: Draw) -> None:
    axes.set_title(text(title), fontsize=10)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
    draw(axes)


def curves(workdir: str) -> list[Chart]:
    """Returns the curves of a run's metrics.jsonl as charts.

    The charts are losses (training), evaluation (held-out rows) and sampling (sampled responses). A weight or a
    coefficient is shown only if its value changes.
    """
    lines, charts = metrics.read(workdir), []
    for split, name in SPLITS.items():
        rows = [line for line in lines if line["split"] == split]
        names = dict.fromkeys(name for row in rows for name in row if name not in ("step", "split"))
        shown = [n for n in names if not _is_setting(n) or len({row[n] for row in rows if n in row}) > 1]
        points = {n: [(row["step"], row[n]) for row in rows if n in row] for n in shown}
        panels = {n.replace("_", " "): _curve(n, points[n], smoothed=split != "eval") for n in shown}
        if panels:
            charts.append(Chart(name, panels))
    return charts


def _curve(name: str, points: Sequence[tuple[int, float]], smoothed: bool) -> Draw:
    def draw(axes: "Axes") -> None:
        axes.plot(*zip(*points, strict=True), linewidth=0.6 if smoothed else 1.2, alpha=0.5, color="C0")
        steps, values = _smooth(points) if smoothed else zip(*points, strict=True)
        axes.plot(steps, values, color="C0", marker="o" if not smoothed or len(points) < 20 else None, markersize=3)
        axes.set(xlabel="step", yscale="log" if name == "perplexity" else "linear")

    return draw


def _is_setting(name: str) -> bool:
    return name.endswith(("/coefficient", "/weight"))


def _smooth(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Returns a running mean over a fiftieth of the curve."""
    steps, values = zip(*points, strict=True)
    window = max(1, len(values) // 50)
    kernel = np.ones(window) / window
    return list(steps[window - 1 :]), list(np.convolve(values, kernel, mode="valid"))


def by_place(places: Sequence[str], series: dict[str, Sequence[float | None]]) -> Chart:
    """Returns a chart of a divergence along the response, on given text and on the student's own text."""

    shown = [i for i in range(len(places)) if any(values[i] is not None for values in series.values())]

    def draw(axes: "Axes") -> None:
        for number, values in enumerate(series.values()):
            heights = [math.nan if (value := values[i]) is None else value for i in shown]
            axes.plot(heights, color=f"C{number}", marker="o", markersize=4)
        axes.set_xticks(range(len(shown)), [places[i] for i in shown])
        axes.set(xlabel="place in the response", ylabel="nats", ylim=(0, 1.05 * axes.get_ylim()[1]))

    legend = tuple((name, f"C{i}", "-") for i, name in enumerate(series))
    return Chart("along_the_response", {"KL(q || p) along the response": draw}, legend)
