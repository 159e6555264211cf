"""Feeds many hostile files to every reader and prints a table of the outcomes.

    python -m tests.fuzz --inputs=200000 --state=runs/fuzz

The inputs come in shards, and each shard has its own seed. A call with the same --state continues after the last
finished shard. A shard runs in a process with limited memory. If an input takes too long or kills the process, the
shard ends and the input is saved in STATE/found. `--replay FILE` reads one saved input.
"""

import argparse
import contextlib
import json
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.shards import SHARD, Shards


def main():
    parser = argparse.ArgumentParser("tests.fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--inputs", type=int, default=200_000, help="in all, shared among the readers")
    parser.add_argument("--readers", default="", help="names with commas; all of them by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="shards at a time")
    parser.add_argument("--state", type=Path, default=Path("runs/fuzz"), help="folder of results.jsonl and found/")
    parser.add_argument("--seconds", type=float, default=5, help="limit for an input")
    parser.add_argument(
        "--memory", type=int, default=2048, help="MiB that a reader may take beyond what it starts with"
    )
    parser.add_argument("--replay", type=Path, help="an input that was kept, under a folder with its reader's name")
    args = parser.parse_args()
    from tests.fuzz.readers import READERS

    if args.replay:
        return replay(args.replay)
    names = args.readers.split(",") if args.readers else list(READERS)
    total = sum(READERS[name].share for name in names)
    args.state.mkdir(parents=True, exist_ok=True)
    done = {(line["reader"], line["shard"]) for line in results(args) if line["seed"] == args.seed}
    waiting = []
    for name in names:
        shards = -(-args.inputs * READERS[name].share / total // SHARD)
        if left := [shard for shard in range(int(shards)) if (name, shard) not in done]:
            waiting.append((name, left))
    running = []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            running.append(Shards(args, *waiting.pop(0)))
        time.sleep(0.2)
        for shards in list(running):
            if shards.ended():
                running.remove(shards)
                if shards.left:
                    waiting.insert(0, (shards.name, shards.left))
    return table(args, names)


def replay(path):
    """Reads one saved input in this process and prints the outcome."""
    from tests.fuzz.bench import Bench, kept

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(path.parent.name, folder)
        wrong = bench.judge(kept(path))
        print(wrong or next(iter(bench.counts)), f"{bench.slowest:.3f} s")
    return int(bool(wrong))


def results(args):
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in (args.state / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    return []


def table(args, names):
    """Prints the outcomes of the inputs. Returns 1 if anything was found, and otherwise 0."""
    lines = [line for line in results(args) if line["reader"] in names and line["seed"] == args.seed]
    print("| reader | inputs | loaded | refused | found | ms an input | slowest, s | MiB more |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name in [*names, "all"]:
        mine = [line for line in lines if name in (line["reader"], "all")]
        sums = Counter()
        for line in mine:
            sums.update({key: line[key] for key in ("inputs", "loaded", "refused", "found", "seconds")})
        worst = {key: max((line[key] for line in mine), default=0) for key in ("slowest", "mebibytes")}
        print(
            f"| {name} | {sums['inputs']:,} | {sums['loaded']:,} | {sums['refused']:,} | {sums['found']:,} | "
            f"{1000 * sums['seconds'] / max(1, sums['inputs']):.1f} | {worst['slowest']:.1f} | {worst['mebibytes']} |"
        )
    return int(any(line["found"] for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
