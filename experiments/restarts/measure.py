"""What a restart costs: from the call to the first new step, fresh and resumed, and from SIGTERM to the end.

python experiments/restarts/measure.py --config=configs/quickstart.py --stop=60 [--rounds=3] [FLAGS OF kd_jax.main ...]

Each round starts a run in a new work directory, ends it with SIGTERM after `stop` steps, and calls it again until its next
step; a run before the rounds fills the cache of compiled programs. Prints a JSON line a round: wall seconds.
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
    parser.add_argument("--stop", type=int, default=20, help="steps")
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
    """Starts or resumes a run, ends it so many steps after its first, and says what took how long."""
    least, began = steps_of(workdir), time.perf_counter()
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        found: dict[str, float] = {}
        while process.poll() is None:
            reached = steps_of(workdir)
            if reached > least:
                found.setdefault("to_first_step_s", round(time.perf_counter() - began, 2))
            if reached >= least + steps:
                break
            time.sleep(0.02)
        told = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=600)
        if process.returncode != 75:
            raise RuntimeError(f"the run ended with {process.returncode}:\n{output[-2000:]}")
        return found | {"sigterm_to_end_s": round(time.perf_counter() - told, 2)}
    finally:
        process.kill()


def steps_of(workdir: Path) -> int:
    """The last step in the run's metrics."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


if __name__ == "__main__":
    main()
