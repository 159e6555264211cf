"""python -m kd_jax.main --config=configs/METHOD.py[:SETTING] --workdir=DIR [--config.KEY=VALUE ...]"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from kd_jax import command_help

if __name__ == "__main__":  # before the imports below, which take seconds
    command_help.answer("main", sys.argv)

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from kd_jax import checkpoint, command, directory, loop, remote, sharding, train
from kd_jax.resolve import nearest
from kd_jax.value_types import EXPECTED, register

# Configs lock the keys that they declare, so that a typo is an error; only specs ({"name": ..., ...}) take new ones.
register()
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The config file, and after a colon its setting.", lock_config=False, accept_new_attributes=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where metrics, checkpoints, plots and the student go.")
PROCESSES = flags.DEFINE_string(
    "processes",
    "",
    "The same command runs on several hosts: ADDRESS:PORT,COUNT,INDEX. A TPU pod and SLURM's tasks need no flag: they meet by "
    "themselves, unless it is alone; auto insists on it, and tries Open MPI and Kubernetes too.",
)
flags.mark_flags_as_required(["config", "workdir"])

ARRIVE = 300  # seconds that the processes of a run have to meet
HEARTBEAT = 60  # seconds without a sign of life after which a process is dead, and the others stop
TPU = "the TPU's hosts"


def main(argv: list[str]) -> None:
    command.start()
    logging.set_verbosity(logging.ERROR)  # what orbax and tfds log at every step of theirs would bury the progress bar
    if len(argv) > 1:
        sys.exit(f"kd_jax: {argv[1]!r} is no flag; options look like --config.steps=100.")
    use_cache()
    with ends_well(kept):
        join(PROCESSES.value)
        check_same(CONFIG.value.to_dict(), str(WORKDIR.value))
        train.train(CONFIG.value, str(WORKDIR.value))


def kept() -> str:
    """What Ctrl-C leaves of the run in the work directory, as a clause."""
    workdir = str(WORKDIR.value)
    if remote.is_remote(workdir):
        return f"what is stored in {workdir} is kept, and the same command goes on"
    step = checkpoint.last_step(workdir)
    if step is None:
        return f"no step is saved in {workdir}, and the same command begins again"
    return f"step {step} is saved in {workdir}, and the same command goes on"


@contextlib.contextmanager
def ends_well(kept: Callable[[], str], name: str = "kd_jax") -> Iterator[None]:
    """Whatever ends the command before its time is one paragraph, and no process waits for one that is gone.

    Args:
      kept: gives what Ctrl-C leaves, as a clause.
      name: of the command.
    """
    with command.second_interrupt(name, kept):
        try:
            yield
        except (ValueError, FloatingPointError, OSError) as error:
            leave(str(error))
        except loop.Stopped as stopped:
            saved = "" if stopped.step is None else f" step {stopped.step} is saved, and"
            print(f"kd_jax: told to stop;{saved} the same command goes on.", file=sys.stderr)
            raise
        except KeyboardInterrupt as interrupted:
            step = getattr(interrupted, "step", None)
            if step is None:
                leave(f"interrupted; {kept()}.", command.INTERRUPTED)
            print(f"\nkd_jax: interrupted; step {step} is saved, and the same command goes on.", file=sys.stderr)
            sys.exit(command.INTERRUPTED)  # the other processes have saved the step, too, and end by themselves
        except Exception as error:
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
            leave(f"{type(error).__name__}: {error}")


def use_cache() -> None:
    """Compiled programs are kept for the next run, unless JAX is told where already."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/kd_jax/xla"))


def join(processes: str) -> None:
    """Meets the other processes of the run, before anything touches a device.

    From then on, by JAX's own service, all stop within HEARTBEAT seconds if one of them dies.

    Args:
      processes: empty: a TPU pod's and SLURM's processes meet, any other is alone; alone: it is; auto: whatever JAX can find
        must be there; or ADDRESS:PORT,COUNT,INDEX, the address that of the process 0.

    Raises:
      ValueError: something else.
    """
    address = count = index = None  # JAX finds them
    parts = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", processes)
    if parts and int(parts[3]) < int(parts[2]):
        address, count, index = parts[1], int(parts[2]), int(parts[3])
        where = address
    elif processes in ("", "auto"):
        where = _cluster()
        if not processes and not where:
            return
    elif processes == "alone":
        return
    else:
        raise ValueError(
            f"--processes={processes!r} must be auto, alone, or ADDRESS:PORT,COUNT,INDEX with INDEX below COUNT."
        )
    # JAX ends a process that waits in vain without saying where it did.
    late = threading.Timer(ARRIVE, _give_up, (where or processes,))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            address, count, index, initialization_timeout=ARRIVE + 30, heartbeat_timeout_seconds=HEARTBEAT
        )
    except (ValueError, OSError) as error:
        # JAX finds nothing here, or a TPU has no service that knows its pod.
        if processes or where != TPU:
            raise ValueError(f"--processes={processes}: {error} Give ADDRESS:PORT,COUNT,INDEX.") from error
        return
    finally:
        late.cancel()
    if jax.process_count() > 1:
        # JAX ends a process by abort() after it has said that another one died: absl would add the stacks of all threads.
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        print(
            f"kd_jax: process {jax.process_index()} of {jax.process_count()}, through {where or processes}; if one dies, all "
            f"stop within {HEARTBEAT} s.", file=sys.stderr, flush=True,
        )  # fmt: skip


def check_same(*what: Any) -> None:
    """Whether all processes were told the same: tasks of SLURM's may be meant as runs of their own.

    Raises:
      ValueError: they were not.
    """
    digest = zlib.crc32(json.dumps(what, sort_keys=True, default=str).encode()) >> 1
    if sharding.least_of_processes(digest) != -sharding.least_of_processes(-digest):
        raise ValueError(
            f"the {jax.process_count()} processes have different configs or work directories; give all the same flags, or "
            "each --processes=alone for runs of their own."
        )


def leave(problem: str, code: int = 1) -> NoReturn:
    """Ends this process with what is wrong; where there are others, without waiting for them, who stop when they notice."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        if code == 1:
            sys.exit(f"kd_jax: {problem}")
        print(f"\nkd_jax: {problem}", file=sys.stderr)
        sys.exit(code)
    if "Gloo" in problem or "NCCL" in problem:  # a connection broke
        problem = f"another process is gone, and its own output should say why. ({' '.join(problem.split())[:300]})"
    index = jax.process_index()
    print(f"kd_jax: process {index} of {jax.process_count()} stops: {problem}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if index == 0:
        time.sleep(2)  # who has the same to say can say it: all stop at once with the first
    os._exit(code)  # JAX would wait for all the others to finish, too


def _cluster() -> str:
    """What starts this process together with others, if something does."""
    if "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return "SLURM"
    return (
        TPU if (jax.config.values["jax_platforms"] or "").startswith("tpu") else ""
    )  # JAX sets it where it finds the chips


def _give_up(where: str) -> None:
    print(
        f"kd_jax: not all processes met at {where} within {ARRIVE} s. Each needs the same address, which is that of process "
        "0 and open to the others, the same count, and an index of its own; --processes=alone runs without others.",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(1)


def parse(argv: list[str]) -> list[str]:
    """The flags; whatever is wrong with them is one paragraph, without a traceback."""
    try:
        rest = flags.FLAGS(argv)
        CONFIG.value.keys()  # a config file that is not there is found out by the first reading
        return rest
    except flags.Error as error:
        if "Error whilst parsing config file" in str(error):
            sys.exit(f"kd_jax: {_of_config(error)}")
        if "must have a value other than None" in str(error):
            sys.exit(f"kd_jax: {command_help.missing(Path(argv[0]).stem)}")
        takes = f"the key takes {EXPECTED[ConfigDict]}."
        said = re.sub(r"Failed to parse .* as a ConfigDict: .*", lambda _: takes, str(error), flags=re.DOTALL)
        sys.exit(f"kd_jax: {said.removeprefix('flag ')}")
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        sys.exit(f"kd_jax: {_unknown_section(argv) or _of_config(error)}")


def _unknown_section(argv: list[str]) -> str:
    """Returns what is wrong with the first flag whose key is in a section that the config lacks; "" where no flag is.

    ml_collections names such a section by a bare KeyError, without the flag and without the sections that there are.
    """
    named = [flag.partition("=")[2] for flag in argv if re.match("--?config=", flag)]
    if not named:
        return ""
    try:
        config = flags.FLAGS["config"].parser.parse(
            named[-1]
        )  # without the flags: the flag's own value is not there yet
    except Exception:  # which the caller has in hand
        return ""
    for flag in argv:
        if not (match := re.match(r"--?(config\.([\w.]+))\.\w+(=|$)", flag)):
            continue
        node: Any = config
        place = "config"
        for part in match[2].split("."):
            known = list(node) if isinstance(node, ConfigDict) else []
            if part not in known:
                has = f"it has {', '.join(known)}" if known else "it has no keys of its own"
                return f"{flag}: {place} has no key {part!r}{nearest(part, known)}; {has}."
            node, place = node[part], f"{place}.{part}"
        if not isinstance(node, ConfigDict):
            return f"{flag}: {place} is {node!r} and has no keys of its own."
    return ""


def _of_config(error: BaseException) -> str:
    """The problem with a config file or with one of its keys, from the exception at the root of what absl raised."""
    while (cause := error.__cause__ or error.__context__) and "Could not override field" not in str(error)[:30]:
        error = cause
    if missing := re.search(r"No such file or directory: '(.*\.py)", str(error)):
        path = Path(missing[1])
        return f"there is no config file {path}{nearest(path.stem, [file.stem for file in path.parent.glob('*.py')])}."
    # A locked ConfigDict shows all its fields before it says which one was meant.
    others = r"Other fields present:.*(?=Did you mean)|Other fields present:.*"
    said = re.sub(others, "", str(error), flags=re.DOTALL).strip("'\" ")
    if key := re.search(r'Key "(\w+)" does not exist', said):  # perhaps it does, somewhere else
        config = flags.FLAGS["config"].value
        names = directory.flat(config.to_dict()) if config else {}
        if places := [name for name in names if name.rpartition(".")[2] == key[1]]:
            return f"there is no key {key[1]!r} there; there is {', '.join(places)}."
    types = r"override field '(\w+)'.*?\)\. (.*) is of original type <class '(\w+)'>.*<class '(\w+)'>"
    if wrong := re.search(types, said, re.DOTALL):
        key, value, kind, wanted = wrong.groups()
        expected = {known.__name__: text for known, text in EXPECTED.items()}.get(wanted, wanted)
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == "get_config"]
        where = f" ({frames[0].filename}, line {frames[0].lineno})" if frames else ""
        return f"the key {key!r} takes {expected}, and not {value!r}, which is of type {kind}{where}."
    return said


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
