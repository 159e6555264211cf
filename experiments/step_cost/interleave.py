"""Runs several commands alternately for a number of rounds, and stores the last JSON line that each command prints.

python -m experiments.step_cost.interleave --rounds=3 --out=experiments/step_cost/steps.jsonl 'COMMAND' 'COMMAND' ...
"""

import argparse
import json
import subprocess


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("commands", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    for _ in range(args.rounds):
        for command in args.commands:
            done = subprocess.run(command, shell=True, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(
                    f"The command {command!r} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}"
                )
            line = json.loads(done.stdout.strip().splitlines()[-1])
            print(json.dumps(line), flush=True)
            with open(args.out, "a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
