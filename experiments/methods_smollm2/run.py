"""Runs the whole experiment on one accelerator, with several runs at the same time and a time limit.

PYTHONPATH=. python experiments/methods_smollm2/run.py --model=FOLDER-OF-SmolLM2 --dolly=databricks-dolly-15k.jsonl.gz --sets=FOLDER

Removes the instructions of the DollyEval set from the training data, makes the start and the fine-tuned teacher, runs
all methods seed by seed, and has the students answer the sets. Finished parts are skipped, so a second call continues.
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from kd_jax import data

HERE = Path("experiments/methods_smollm2")
RUNS = Path("runs/methods_smollm2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dolly", type=Path, required=True)
    parser.add_argument("--sets", type=Path, required=True, help="MiniLLM's sets as NAME.jsonl")
    parser.add_argument("--size", default="medium")
    parser.add_argument(
        "--jobs",
        type=int,
        default=4,
        help="number of processes at the same time, all of which compile; nine were too many for 80 GB",
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="methods are stopped after this time")
    parser.add_argument("--rows", type=int, default=64, help="number of rows of each set")
    args = parser.parse_args()
    started = time.monotonic()
    Path("models").mkdir(exist_ok=True)
    if not Path("models/SmolLM2-135M-Instruct").exists():
        Path("models/SmolLM2-135M-Instruct").symlink_to(args.model.resolve())
    train = Path("runs/dolly_train.jsonl")
    train.parent.mkdir(exist_ok=True)
    leave_out(args.dolly, [args.sets / "dolly.jsonl"], train)
    data.load("dolly", split="train", path=str(train))  # built once, before many processes use it
    config = lambda what: f"--config={HERE}/config.py:{what}-{args.size},{train}"
    run([["kd_jax.main", config(what), f"--workdir=runs/smollm2_{what}"] for what in ("teacher", "start")])
    print(f"teacher and start after {time.monotonic() - started:.0f} s", flush=True)
    shards = [
        ["kd_jax.ablate", config("methods"), f"--workdir={RUNS}", f"--shard={i}/{args.jobs}"] for i in range(args.jobs)
    ]
    run(shards, started + args.seconds - time.monotonic())
    run([["kd_jax.ablate", config("methods"), f"--workdir={RUNS}", "--table"]])
    print(f"{len(list(RUNS.glob('*/result.json')))} runs after {time.monotonic() - started:.0f} s", flush=True)
    options = [f"--ablation={RUNS}", f"--sets={args.sets}", f"--rows={args.rows}"]
    options += ["--max_new_tokens=96", "--batch_size=64", "--dtype=bfloat16"]
    run([[str(HERE / "texts.py"), *options, f"--shard={i}/{args.jobs}"] for i in range(args.jobs)])
    print(f"texts after {time.monotonic() - started:.0f} s", flush=True)


def leave_out(dolly: Path, held_out: list[Path], target: Path) -> None:
    """Writes the rows of Dolly whose instruction is in none of the files of held-out rows."""
    asked = {json.loads(line)["instruction"].strip() for path in held_out for line in path.read_text().splitlines()}
    with gzip.open(dolly, "rt") if dolly.suffix == ".gz" else dolly.open() as file:
        rows = [line for line in file if json.loads(line)["instruction"].strip() not in asked]
    if not target.exists():
        target.write_text("".join(rows))


def run(commands: list[list[str]], seconds: float = 1e9) -> None:
    """Runs Python modules or files at the same time, for a limited time. Each takes only the memory that it needs."""
    path = os.pathsep.join([".", *filter(None, [os.environ.get("PYTHONPATH")])])
    share = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": path}
    deadline = time.monotonic() + seconds
    processes = []
    for i, command in enumerate(commands):
        name = [command[0]] if command[0].endswith(".py") else ["-m", command[0]]
        log = (Path("runs") / f"{name[-1].removesuffix('.py').rpartition('.')[2].rpartition('/')[2]}_{i}.log").open("w")
        processes.append(
            subprocess.Popen([sys.executable, *name, *command[1:]], env=os.environ | share, stdout=log, stderr=log)
        )
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        for path in RUNS.glob("*/result.json"):  # only the student of a finished run is needed
            shutil.rmtree(path.parent / "run" / "checkpoints", ignore_errors=True)
        time.sleep(0.5)
    print([process.returncode for process in processes], flush=True)


if __name__ == "__main__":
    main()
