"""What each student of the ablation writes to the papers' evaluation sets: ROUGE-L, one row of a table a student.

python experiments/methods_smollm2/texts.py runs/methods_smollm2 FOLDER-OF-SETS [ROWS-OF-EACH [SEEDS]]

The folder has MiniLLM's dolly, self-inst, vicuna and sinst as NAME.jsonl. Their instructions are asked in the models' own
chat template, as in training, and not in Alpaca's, which stands in the files' prompts. Results go to texts_ROWS.jsonl in the
folder of the ablation; what is there is not done again.
"""

import json
import sys
from pathlib import Path

from kd_jax import metrics
from kd_jax.evaluate import __main__ as command

SETS = ("dolly", "self-inst", "vicuna", "sinst")
OPTIONS = {
    "batch_size": 32, "max_prompt_length": 160, "max_new_tokens": 48, "no_repeat_ngram_size": 6,
    "prompt_field": "instruction", "context_field": "input", "reference_field": "output", "template": "chat",
}  # fmt: skip


def main(ablation: str, folder: str, count: str = "16", seeds: str = "10") -> None:
    out = Path(ablation)
    mixed = out / f"sets_{count}.jsonl"
    lines_of = {name: (Path(folder) / f"{name}.jsonl").read_text().splitlines()[: int(count)] for name in SETS}
    rows = [{"input": "", **json.loads(line)} for some in lines_of.values() for line in some]
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    students = {"(start)": Path("runs/smollm2_start"), "(teacher)": Path("runs/smollm2_teacher")}
    students |= {
        path.parent.name.removeprefix("method=").split(",")[0]: path.parent / "run"
        for path in sorted(out.glob("*/result.json"))
    }
    file = out / f"texts_{count}.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {line["student"] for line in lines}
    for name, student in students.items():
        if name not in done:
            target = out / f"texts_{count}" / name
            options = OPTIONS | {"model": student, "data": mixed, "seeds": seeds, "out": target}
            command.run(command.arguments([f"--{key}={value}" for key, value in options.items()]))
            lines.append({"student": name} | _by_set(target / "generations.jsonl", int(count)))
            with file.open("a") as opened:
                opened.write(json.dumps(lines[-1]) + "\n")
    columns = list(lines[0])
    print(
        metrics.table(
            [columns, *([str(line[c]) if c == "student" else f"{line[c]:.2f}" for c in columns] for line in lines)]
        )
    )


def _by_set(generations: Path, count: int) -> dict[str, float]:
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


if __name__ == "__main__":
    main(*sys.argv[1:])
