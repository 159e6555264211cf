"""Has each student of the ablation answer the papers' evaluation sets, and prints the table of all measures.

PYTHONPATH=. python experiments/methods_smollm2/texts.py --ablation=runs/methods_smollm2 --sets=FOLDER [--rows=16] [--shard=I/N]

The folder has MiniLLM's dolly, self-inst, vicuna and sinst as NAME.jsonl. As in training, the prompts use the models'
own chat template, and not Alpaca's template, which the files' prompts have. The results are appended to
texts_ROWS.jsonl in the folder of the ablation. Students that are already in this file are skipped.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from kd_jax import metrics
from kd_jax.evaluate import __main__ as command
from kd_jax.evaluate.arguments import parse
from kd_jax.report import comparison

SETS = ("dolly", "self-inst", "vicuna", "sinst")
OPTIONS = {
    "max_prompt_length": 160, "no_repeat_ngram_size": 6,
    "prompt_field": "instruction", "context_field": "input", "reference_field": "output", "template": "chat",
}  # fmt: skip
COLUMNS = {
    "forward_kl": "KL(p,q)", "reverse_kl": "KL(q,p)", "own_reverse_kl": "KL(q,p) own text", "total_variation": "TV",
    "cross_entropy": "cross-entropy", "top1_agreement": "top-1", "entropy": "entropy",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ablation", type=Path, required=True, help="work directory of the ablation")
    parser.add_argument(
        "--sets", type=Path, help="folder of the sets; without it, only the table of the existing results is printed"
    )
    parser.add_argument("--rows", type=int, default=16, help="number of rows of each set, from its start")
    parser.add_argument("--seeds", default="10", help="seeds of the samples")
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shard", default="0/1", help="I/N: every N-th student, starting at the I-th")
    args = parser.parse_args()
    if args.sets:
        write(args)
    print(table(args.ablation, args.rows))


def write(args: argparse.Namespace) -> None:
    """Has the students of this shard answer the prompts, and appends a line per student."""
    part, parts = map(int, args.shard.split("/"))
    mixed = args.ablation / f"sets_{args.rows}_{part}.jsonl"
    rows = [
        {"input": "", **json.loads(line)}
        for name in SETS
        for line in (args.sets / f"{name}.jsonl").read_text().splitlines()[: args.rows]
    ]
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    students = {"(start)": Path("runs/smollm2_start"), "(teacher)": Path("runs/smollm2_teacher")}
    students |= {path.parent.name: path.parent / "run" for path in sorted(args.ablation.glob("*/result.json"))}
    done = {line["student"] for line in read(args.ablation, args.rows)}
    for name, student in list(students.items())[part::parts]:
        if name in done:
            continue
        target = args.ablation / f"texts_{args.rows}" / name
        own = {key: getattr(args, key) for key in ("seeds", "max_new_tokens", "batch_size", "dtype")}
        options = OPTIONS | own | {"model": student, "data": mixed, "out": target}
        command.run(parse([f"--{key}={value}" for key, value in options.items()]))
        with (args.ablation / f"texts_{args.rows}.jsonl").open("a") as file:
            file.write(json.dumps({"student": name} | by_set(target / "generations.jsonl", args.rows)) + "\n")


def read(ablation: Path, rows: int) -> list[dict[str, Any]]:
    """Returns the lines that `write` appended."""
    file = ablation / f"texts_{rows}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def by_set(generations: Path, count: int) -> dict[str, float]:
    """Returns the mean ROUGE-L of each set and of all sets, and the mean number of words.

    Every seed uses the sets in the order of `SETS`.
    """
    written = [json.loads(line) for line in generations.read_text().splitlines()]
    size = count * len(SETS)
    means = {}
    for place, name in enumerate(SETS):
        some = [w["rouge_l"] for i, w in enumerate(written) if i % size // count == place]
        means[name] = sum(some) / len(some)
    means["all"] = sum(w["rouge_l"] for w in written) / len(written)
    means["words"] = sum(len(w["response"].split()) for w in written) / len(written)
    return means


def table(ablation: Path, rows: int) -> str:
    """Returns a row per student, mean ± deviation over the seeds: the measures of the runs, and ROUGE-L on the sets."""
    done = [json.loads(line) for line in (ablation / "results.jsonl").read_text().splitlines()]
    texts = {line["student"]: line for line in read(ablation, rows)}
    wanted = ("all", *SETS, "words")
    cells = lambda scores: [f"{scores[name]:.1f}" if name in scores else "" for name in wanted]
    ends = {"(teacher)": done[0]["teacher"], "(start)": done[0]["before"]}
    lines = [
        [name, *(f"{values[key]:.3f}" if key in values else "" for key in COLUMNS), *cells(texts.get(name, {})), ""]
        for name, values in ends.items()
    ]
    for name, runs in comparison.grouped(done).items():
        written = [texts[run["folder"]] for run in runs if run["folder"] in texts]
        numbers = [comparison.number([run["after"][c] for run in runs if c in run["after"]]) for c in COLUMNS]
        scores = [_spread([line[key] for line in written]) for key in wanted]
        lines.append([name, *numbers, *scores, str(len(runs))])
    return metrics.table([["student", *COLUMNS.values(), "ROUGE-L", *SETS, "words", "seeds"], *lines])


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    main()
