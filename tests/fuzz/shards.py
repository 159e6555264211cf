"""Shards of hostile inputs in a process with limits, and the supervision of this process."""

import json
import multiprocessing
import os
import resource
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

from tests.fuzz.bench import Bench, keep

SHARD = 500  # inputs
SAME = 3  # saved inputs for each kind of finding in a shard


class Shards:
    """A process that works on shards of one reader, one after the other."""

    def __init__(self, args, name, shards):
        self.args, self.name, self.left = args, name, list(shards)
        context = multiprocessing.get_context("spawn")
        # The start of the current input by the clock (0 between inputs) and in processor time of the process.
        self.began = context.Array("d", [0.0] * 2)
        self.counts = context.Array("l", [0] * 5)  # the shard, and the inputs in all, loaded, refused and found
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self.started = time.monotonic()
        self.counts[0] = self.left[0]
        self.process = context.Process(
            target=work, args=(vars(args), name, self.left, self.folder.name, self.began, self.counts)
        )
        self.process.start()

    def ended(self):
        """Returns whether the process is over, and ends a process that takes too long.

        After a kill or a crash, the current shard counts as done, and `left` holds the later shards.
        """
        seconds = self._seconds()
        wrong = ""
        if self.process.is_alive():
            if seconds < self.args.seconds:
                return False
            self.process.kill()
            wrong = f"took longer than {self.args.seconds} s"
        self.process.join()
        if not wrong and self.process.exitcode:
            wrong = f"the process ended with {self.process.exitcode}"
        shard, inputs, loaded, refused, found = self.counts
        self.left = [later for later in self.left if later > shard] if wrong else []
        if wrong:
            print(f"{self.name}, shard {shard}, input {inputs}: {wrong}", flush=True)
            names = (Path(self.folder.name) / "current").read_text(encoding="utf-8").split("\n") if inputs else []
            files = {name: (Path(self.folder.name) / "files" / name).read_bytes() for name in names}
            keep(self.args.state / "found" / self.name / f"{self.args.seed}-{shard}-{inputs}-last.json", files, wrong)
            line = dict(
                loaded=loaded, refused=refused, found=found + 1, inputs=loaded + refused + found + 1,
                seconds=time.monotonic() - self.started, slowest=seconds, mebibytes=0,
            )  # fmt: skip
            write(self.args.state, dict(reader=self.name, seed=self.args.seed, shard=shard) | line)
        self.folder.cleanup()
        return True

    def _seconds(self):
        """Returns the seconds for the current input: processor time, or a tenth of the clock time if that is more.

        On a busy machine, other processes use most of the clock time.
        """
        clock, own = self.began
        if not clock:
            return 0.0
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            used = sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK") - own
        except OSError:  # the process has just ended
            used = 0.0
        return max(used, (time.monotonic() - clock) / 10)


def work(args, name, shards, folder, began, counts):
    """Tests the shards, as the main function of their process."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # hides the progress of tfds
    os.dup2(silence, 2)  # hides the panics of Rust
    bench = Bench(name, folder)
    bench.fuzz(args["seed"], 20)  # warm-up: loads libraries and allocates the stacks of threads
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    limit = int(status["VmSize"].split()[0]) * 1024 + args["memory"] * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def before():
        counts[1] += 1
        began[:] = time.monotonic(), time.process_time()

    for shard in shards:
        bench.counts, bench.slowest, kinds, started = Counter(), 0.0, Counter(), time.monotonic()
        counts[:] = [shard, 0, 0, 0, 0]

        def after(files, wrong, shard=shard, kinds=kinds):
            began[0] = 0.0
            counts[2:] = [bench.counts[outcome] for outcome in ("loaded", "refused", "found")]
            if wrong:
                kinds[wrong[:60]] += 1
                if kinds[wrong[:60]] <= SAME:
                    keep(args["state"] / "found" / name / f"{args['seed']}-{shard}-{counts[1]}.json", files, wrong)

        bench.fuzz(zlib.crc32(f"{args['seed']} {name} {shard}".encode()), SHARD, before, after)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
        line = {outcome: bench.counts[outcome] for outcome in ("loaded", "refused", "found")}
        line |= dict(inputs=bench.counts.total(), seconds=time.monotonic() - started, slowest=bench.slowest)
        write(args["state"], dict(reader=name, seed=args["seed"], shard=shard) | line | {"mebibytes": peak // 1024})


def write(state, line):
    with (state / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
