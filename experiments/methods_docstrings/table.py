"""Prints the table of README.md.

python -m experiments.methods_docstrings.table experiments/methods_docstrings/results.jsonl
"""

import json
import statistics
import sys
from pathlib import Path

from kd_jax.metrics import table

COLUMNS = {
    "forward_kl": "KL(p,q)", "reverse_kl": "KL(q,p)", "own_reverse_kl": "KL(q,p), own text", "cross_entropy": "cross-entropy",
    "rouge_l": "ROUGE-L", "finished": "finished", "student_rows": "student's rows", "steps": "steps", "tokens": "tokens",
    "seconds_a_step": "s a step",
}  # fmt: skip


def main() -> None:
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    rows = [["method", *COLUMNS.values(), "seeds"]]
    for method in dict.fromkeys(line["method"] for line in lines):
        runs = [line for line in lines if line["method"] == method]
        cells = []
        for name in COLUMNS:
            values = [run[name] for run in runs if name in run]
            if not values:
                cells.append("")
            elif name in ("tokens", "steps"):
                cells.append(f"{statistics.mean(values):,.0f}")
            elif name == "seconds_a_step":
                cells.append(f"{min(values):.3f}")
            elif name == "student_rows" or len(values) == 1:
                cells.append(f"{statistics.mean(values):.3f}")
            else:
                cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
        rows.append([method, *cells, str(len(runs))])
    print(table(rows))


if __name__ == "__main__":
    main()
