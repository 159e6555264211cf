"""What a run shows: metrics.jsonl, TensorBoard, a progress bar, tables, and plots of the curves."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm


def averages(sums: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """{name: sum / count} as Python numbers; a mean over nothing is left out."""
    return {name: float(total) / float(count) for name, (total, count) in sums.items() if float(count)}


class Writer:
    """Appends metrics to `metrics.jsonl` and to TensorBoard files in a work directory.

    One JSON object a line: {"step": ..., "split": "train", "eval" or "speed", name: value, ...}.
    """

    def __init__(self, workdir: str, first_step: int):
        """Opens the files, dropping lines of steps after `first_step`: the run continues from there."""
        folder = Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        # Without a checkpoint the run starts over, and evaluates at step 0 again.
        lines = [line for line in read(workdir) if line["step"] <= first_step] if first_step else []
        partial = folder / "metrics.jsonl.partial"
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
        partial.rename(path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()
        self._board.close()


def read(workdir: str) -> list[dict[str, Any]]:
    """The lines of a work directory's metrics.jsonl; one cut off by a kill is left out."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def progress(total: int, initial: int, quiet: bool = False) -> tqdm:
    """A bar over steps with the time left; `set_postfix` adds loss and tokens per second."""
    return tqdm(
        total=total, initial=initial, desc="train", unit="step", dynamic_ncols=True, disable=quiet, mininterval=1
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned Markdown with the first row as the head; all columns but the first to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])


def plot(workdir: str) -> list[Path]:
    """Draws the curves of metrics.jsonl: losses.png (training), evaluation.png (held-out rows) and sampling.png (what was drawn).

    Weights and coefficients are drawn where they change.

    Returns:
      The files written.
    """
    import matplotlib.figure  # slow to import, and only needed once

    lines = read(workdir)
    written = []
    for split, file in (("train", "losses.png"), ("eval", "evaluation.png"), ("samples", "sampling.png")):
        rows = [line for line in lines if line["split"] == split]
        names = dict.fromkeys(name for row in rows for name in row if name not in ("step", "split"))
        names = [n for n in names if not _is_setting(n) or len({row[n] for row in rows if n in row}) > 1]
        if not names:
            continue
        columns = min(3, len(names))
        height = math.ceil(len(names) / columns)
        figure = matplotlib.figure.Figure(figsize=(4.2 * columns, 3.0 * height), layout="constrained")
        for name, axes in zip(names, np.ravel(figure.subplots(height, columns, squeeze=False)), strict=False):
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points, strict=True), linewidth=1.2 if split == "eval" else 0.6, alpha=0.5, color="C0")
            steps, smooth = zip(*points, strict=True) if split == "eval" else _smooth(points)
            axes.plot(
                steps, smooth, color="C0", marker="o" if split == "eval" or len(points) < 20 else None, markersize=3
            )
            axes.set(title=name.replace("_", " "), xlabel="step", yscale="log" if name == "perplexity" else "linear")
            axes.grid(alpha=0.3)
        for axes in figure.axes[len(names) :]:
            axes.set_visible(False)
        written.append(Path(workdir) / file)
        figure.savefig(written[-1], dpi=120)
    return written


def _is_setting(name: str) -> bool:
    return name.endswith(("/coefficient", "/weight"))


def _smooth(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """A running mean over a fiftieth of the curve."""
    steps, values = zip(*points, strict=True)
    window = max(1, len(values) // 50)
    kernel = np.ones(window) / window
    return list(steps[window - 1 :]), list(np.convolve(values, kernel, mode="valid"))
