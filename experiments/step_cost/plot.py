"""Plots memory and time of the loss over the number of tokens and over the size of the vocabulary.

The data is the JSON lines of `loss_cost.py`:

python -m experiments.step_cost.plot experiments/step_cost/sweep.jsonl experiments/step_cost/sweep.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

AXES = {"tokens": ("tokens", {"vocab": 32768}), "vocab": ("vocabulary", {"tokens": 4096})}
QUANTITIES = {"temp_mb": "planned temporary memory, MB", "cpu_s": "value and gradient, CPU seconds"}


def main() -> None:
    source, target = sys.argv[1:]
    lines = [json.loads(line) for line in Path(source).read_text().splitlines()]
    figure, panels = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    for column, (axis, (label, fixed)) in enumerate(AXES.items()):
        chosen = sorted((line for line in lines if fixed.items() <= line.items()), key=lambda line: line[axis])
        for row, (quantity, title) in enumerate(QUANTITIES.items()):
            panel = panels[row][column]
            for who, style in (("full", "s--"), ("chunked", "o-")):
                for loss in sorted({line["loss"] for line in chosen}):
                    points = [
                        (line[axis], line[f"{who}_{quantity}"])
                        for line in chosen
                        if line["loss"] == loss and f"{who}_{quantity}" in line
                    ]
                    if points:
                        panel.plot(*zip(*points, strict=True), style, label=f"{loss}, {who}")
            panel.set(
                xscale="log", yscale="log", xlabel=f"{label} ({', '.join(f'{k} {v:,}' for k, v in fixed.items())})"
            )
            panel.set_ylabel(title)
            panel.grid(alpha=0.3, which="both")
    panels[0][0].legend(fontsize=8)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main()
