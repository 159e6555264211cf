"""What each student of the ablation writes to the papers' evaluation sets, and the table of all that was measured.

PYTHONPATH=. python experiments/methods_smollm2/texts.py --ablation=runs/methods_smollm2 --sets=FOLDER [--rows=16] [--shard=I/N]

The folder has MiniLLM's dolly, self-inst, vicuna and sinst as NAME.jsonl. Their instructions are asked in the models' own
chat template, as in training, and not in Alpaca's, which stands in the files' prompts. Results go to texts_ROWS.jsonl in the
folder of the ablation; what is there is not done again.
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
    parser.add_argument("--ablation", type=Path, required=True, help="its work directory")
    parser.add_argument(
        "--sets", type=Path, help="where the sets are; without it the table of what is there is printed"
    )
    parser.add_argument("--rows", type=int, default=16, help="the first so many of each set")
    parser.add_argument("--seeds", default="10", help="of the draws")
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shard", default="0/1", help="I/N: every N-th student from the I-th on")
    args = parser.parse_args()
    if args.sets:
        write(args)
    print(table(args.ablation, args.rows))


def write(args: argparse.Namespace) -> None:
    """Has this shard's students write, and appends a line for each."""
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
    """What `write` has left."""
    file = ablation / f"texts_{rows}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def by_set(generations: Path, count: int) -> dict[str, float]:
    """Mean ROUGE-L and length in words of each set and of all; every seed goes through the sets in their order."""
    written = [json.loads(line) for line in generations.read_text().splitlines()]
    size = count * len(SETS)
    found = {}
    for place, name in enumerate(SETS):
        some = [w["rouge_l"] for i, w in enumerate(written) if i % size // count == place]
        found[name] = sum(some) / len(some)
    found["all"] = sum(w["rouge_l"] for w in written) / len(written)
    found["words"] = sum(len(w["response"].split()) for w in written) / len(written)
    return found


def table(ablation: Path, rows: int) -> str:
    """A row a student, mean ± deviation over its seeds: what the runs have measured, and ROUGE-L on the sets."""
    done = [json.loads(line) for line in (ablation / "results.jsonl").read_text().splitlines()]
    texts = {line["student"]: line for line in read(ablation, rows)}
    wanted = ("all", *SETS, "words")
    cells = lambda its: [f"{its[name]:.1f}" if name in its else "" for name in wanted]
    ends = {"(teacher)": done[0]["teacher"], "(start)": done[0]["before"]}
    lines = [
        [name, *(f"{its[column]:.3f}" if column in its else "" for column in COLUMNS), *cells(texts.get(name, {})), ""]
        for name, its in ends.items()
    ]
    for name, runs in comparison.grouped(done).items():
        written = [texts[run["folder"]] for run in runs if run["folder"] in texts]
        numbers = [comparison.number([run["after"][c] for run in runs if c in run["after"]]) for c in COLUMNS]
        scores = [_spread([its[key] for its in written]) for key in wanted]
        lines.append([name, *numbers, *scores, str(len(runs))])
    return metrics.table([["student", *COLUMNS.values(), "ROUGE-L", *SETS, "words", "seeds"], *lines])


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    main()
