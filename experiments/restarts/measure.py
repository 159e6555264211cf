"""Measures the cost of a restart: the time to the first new step, fresh and resumed, and from SIGTERM to the end.

python experiments/restarts/measure.py --config=configs/quickstart.py --stop=60 [--rounds=3] [FLAGS OF kd_jax.main ...]

Each round starts a run in a new work directory, ends the run with SIGTERM after `stop` steps, and resumes it until its
next step. A round before the others fills the cache of compiled programs. Prints a JSON line of wall seconds per round.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--stop", type=int, default=20, help="number of steps before SIGTERM")
    parser.add_argument("--rounds", type=int, default=3)
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds + 1):
            call = [sys.executable, "-m", "kd_jax.main", f"--config={args.config}", f"--workdir={folder}/{turn}"]
            call += ["--config.log_every=1", "--config.checkpoint_every=1000000", *flags]
            fresh = part(call, Path(folder) / str(turn), args.stop)
            resumed = part(call, Path(folder) / str(turn), 1)
            if turn:
                size = sum(
                    p.stat().st_size for p in (Path(folder) / str(turn) / "checkpoints").rglob("*") if p.is_file()
                )
                both = {"fresh": fresh, "resumed": resumed, "checkpoints_mb": round(size / 1e6, 1)}
                print(json.dumps({"config": args.config, "flags": flags} | both), flush=True)


def part(call: list[str], workdir: Path, steps: int) -> dict[str, float]:
    """Starts or resumes a run, ends it after a number of new steps, and returns the seconds of both parts."""
    least, began = steps_of(workdir), time.perf_counter()
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        seconds: dict[str, float] = {}
        while process.poll() is None:
            reached = steps_of(workdir)
            if reached > least:
                seconds.setdefault("to_first_step_s", round(time.perf_counter() - began, 2))
            if reached >= least + steps:
                break
            time.sleep(0.02)
        signalled = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=600)
        if process.returncode != 75:
            raise RuntimeError(f"The run ended with exit code {process.returncode} and not with 75:\n{output[-2000:]}")
        return seconds | {"sigterm_to_end_s": round(time.perf_counter() - signalled, 2)}
    finally:
        process.kill()


def steps_of(workdir: Path) -> int:
    """Returns the last step in the run's metrics."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


if __name__ == "__main__":
    main()
