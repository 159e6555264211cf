"""python -m kd_jax.main --config=configs/METHOD.py[:SETTING] --workdir=DIR [--config.KEY=VALUE ...]"""

import contextlib
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from kd_jax import command_help

if __name__ == "__main__":  # the help is printed before the imports below, which take seconds
    command_help.answer("main", sys.argv)

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from kd_jax import command, sharding, train
from kd_jax.resolve import nearest
from kd_jax.settings.value_types import EXPECTED, register
from kd_jax.storage import checkpoint, directory, remote
from kd_jax.storage.checksum import digest
from kd_jax.train import loop

# Configs lock the keys that they declare, so that a misspelt key is an error. Only specs ({"name": ..., ...}) accept
# new keys.
register()
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The config file, and after a colon its setting.", lock_config=False, accept_new_attributes=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where metrics, checkpoints, plots and the student go.")
PROCESSES = flags.DEFINE_string(
    "processes",
    "",
    "For one run on several hosts: ADDRESS:PORT,COUNT,INDEX. Without the flag, the hosts of a TPU pod and the tasks of SLURM "
    "connect by themselves. auto requires such a cluster, also of Open MPI or Kubernetes; alone connects to no other process.",
)
flags.mark_flags_as_required(["config", "workdir"])

ARRIVE = 300  # seconds within which all processes of a run must connect
HEARTBEAT = 60  # seconds without a heartbeat after which a process counts as dead and the others stop
TPU = "the hosts of the TPU"


def main(argv: list[str]) -> None:
    command.start()
    logging.set_verbosity(logging.ERROR)  # otherwise the logs of orbax and tfds would hide the progress bar
    if len(argv) > 1:
        sys.exit(f"kd_jax: {argv[1]!r} is no flag; flags look like --config.steps=100.")
    use_cache()
    with ends_well(remaining_results):
        join(PROCESSES.value)
        check_same(CONFIG.value.to_dict(), str(WORKDIR.value))
        train.train(CONFIG.value, str(WORKDIR.value))


def remaining_results() -> str:
    """Returns a clause that names what remains of the run in the work directory after Ctrl-C."""
    workdir = str(WORKDIR.value)
    if remote.is_remote(workdir):
        return f"the files in {workdir} remain, and the same command resumes the run"
    step = checkpoint.last_step(workdir)
    if step is None:
        return f"no step is saved in {workdir}, and the same command begins again"
    return f"step {step} is saved in {workdir}, and the same command resumes the run"


@contextlib.contextmanager
def ends_well(remaining: Callable[[], str], name: str = "kd_jax") -> Iterator[None]:
    """Turns any error into a one-paragraph message, and makes sure that no process waits for one that has stopped.

    Args:
      remaining: a function that returns a clause on the results that remain after Ctrl-C.
      name: the name of the command.
    """
    with command.second_interrupt(name, remaining):
        try:
            yield
        except (ValueError, FloatingPointError, OSError) as error:
            leave(str(error))
        except loop.Stopped as stopped:
            saved = "" if stopped.step is None else f" step {stopped.step} is saved, and"
            print(f"kd_jax: asked to stop;{saved} the same command resumes the run.", file=sys.stderr)
            raise
        except KeyboardInterrupt as interrupted:
            step = getattr(interrupted, "step", None)
            if step is None:
                leave(f"interrupted; {remaining()}.", command.INTERRUPTED)
            print(
                f"\nkd_jax: interrupted; step {step} is saved, and the same command resumes the run.", file=sys.stderr
            )
            sys.exit(command.INTERRUPTED)  # the other processes also have saved the step, and end by themselves
        except Exception as error:
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
            leave(f"{type(error).__name__}: {error}")


def use_cache() -> None:
    """Keeps compiled programs on disk for later runs, unless JAX already has a cache directory."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/kd_jax/xla"))


def join(processes: str) -> None:
    """Connects to the other processes of the run, before any device is used.

    Afterwards, if one process dies, JAX's own service stops all others within HEARTBEAT seconds.

    Args:
      processes: "" connects the processes of a TPU pod or of SLURM, and leaves any other process alone; "alone" leaves
        this process alone; "auto" requires a cluster that JAX can find; "ADDRESS:PORT,COUNT,INDEX" names the address of
        process 0, the number of processes, and the index of this process.

    Raises:
      ValueError: `processes` has none of these forms, or the connection fails.
    """
    address = count = index = None  # with None, JAX finds the values
    parts = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", processes)
    if parts and int(parts[3]) < int(parts[2]):
        address, count, index = parts[1], int(parts[2]), int(parts[3])
        meeting_place = address
    elif processes in ("", "auto"):
        meeting_place = _cluster()
        if not processes and not meeting_place:
            return
    elif processes == "alone":
        return
    else:
        raise ValueError(
            f"--processes={processes!r} must be auto, alone, or ADDRESS:PORT,COUNT,INDEX with INDEX below COUNT."
        )
    # JAX ends a process that waits too long without naming the address.
    timer = threading.Timer(ARRIVE, _give_up, (meeting_place or processes,))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            address, count, index, initialization_timeout=ARRIVE + 30, heartbeat_timeout_seconds=HEARTBEAT
        )
    except (ValueError, OSError) as error:
        # JAX finds no cluster here, or a TPU has no service that knows the pod.
        if processes or meeting_place != TPU:
            raise ValueError(f"--processes={processes}: {error} Give ADDRESS:PORT,COUNT,INDEX.") from error
        return
    finally:
        timer.cancel()
    if jax.process_count() > 1:
        # JAX calls abort() after a message that another process died. Without this line absl would print the stacks of
        # all threads.
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        print(
            f"kd_jax: process {jax.process_index()} of {jax.process_count()}, connected through {meeting_place or processes}; if "
            f"one process dies, all stop within {HEARTBEAT} s.", file=sys.stderr, flush=True,
        )  # fmt: skip


def check_same(*values: object) -> None:
    """Checks that all processes have the same values, because tasks of SLURM may be meant as separate runs.

    Raises:
      ValueError: the values differ between processes.
    """
    number = int(digest(values)[:7], 16)
    if sharding.least_of_processes(number) != -sharding.least_of_processes(-number):
        raise ValueError(
            f"the {jax.process_count()} processes have different configs or work directories; give all processes the same "
            "flags, or give each --processes=alone for separate runs."
        )


def leave(problem: str, code: int = 1) -> NoReturn:
    """Ends this process with a message, without waiting for other processes, which notice the end and stop too."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        if code == 1:
            sys.exit(f"kd_jax: {problem}")
        print(f"\nkd_jax: {problem}", file=sys.stderr)
        sys.exit(code)
    if "Gloo" in problem or "NCCL" in problem:  # a connection to another process broke
        problem = f"another process has stopped; read that process's output. ({' '.join(problem.split())[:300]})"
    index = jax.process_index()
    print(f"kd_jax: process {index} of {jax.process_count()} stops: {problem}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if index == 0:
        time.sleep(2)  # processes with the same message get time to print it: all stop when the first process stops
    os._exit(code)  # a normal exit of JAX would wait for all other processes


def _cluster() -> str:
    """Returns the name of the system that started this process together with other processes; "" if there is none."""
    if "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return "SLURM"
    # JAX sets jax_platforms if JAX finds TPU chips.
    return TPU if (jax.config.values["jax_platforms"] or "").startswith("tpu") else ""


def _give_up(meeting_place: str) -> None:
    print(
        f"kd_jax: not all processes met at {meeting_place} within {ARRIVE} s. Each process needs the address of process 0, to "
        "which it can connect, the same count, and a different index. --processes=alone connects to no other process.",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(1)


def parse(argv: list[str]) -> list[str]:
    """Parses the flags. An error in the flags ends the command with one paragraph, without a traceback."""
    try:
        rest = flags.FLAGS(argv)
        CONFIG.value.keys()  # the first read finds a missing config file
        return rest
    except flags.Error as error:
        if "Error whilst parsing config file" in str(error):
            sys.exit(f"kd_jax: {_of_config(error)}")
        if "must have a value other than None" in str(error):
            sys.exit(f"kd_jax: {command_help.missing(Path(argv[0]).stem)}")
        takes = f"the key takes {EXPECTED[ConfigDict]}."
        message = re.sub(r"Failed to parse .* as a ConfigDict: .*", lambda _: takes, str(error), flags=re.DOTALL)
        sys.exit(f"kd_jax: {message.removeprefix('flag ')}")
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        sys.exit(f"kd_jax: {_unknown_section(argv) or _of_config(error)}")


def _unknown_section(argv: list[str]) -> str:
    """Returns the message for the first flag whose key is in a section that the config lacks; "" if there is none.

    The KeyError of ml_collections names only the missing section, without the flag and without the existing sections.
    """
    paths = [flag.partition("=")[2] for flag in argv if re.match("--?config=", flag)]
    if not paths:
        return ""
    try:
        # The file is read again, because the value of the flag does not exist yet.
        config = flags.FLAGS["config"].parser.parse(paths[-1])
    except Exception:  # the caller reports the error of the file
        return ""
    for flag in argv:
        if not (match := re.match(r"--?(config\.([\w.]+))\.\w+(=|$)", flag)):
            continue
        node: object = config
        location = "config"
        for part in match[2].split("."):
            known = list(node) if isinstance(node, ConfigDict) else []
            if not isinstance(node, ConfigDict) or not known:
                return f"{flag}: {location} has no keys."
            if part not in known:
                return f"{flag}: {location} has no key {part!r}{nearest(part, known)}; the keys are {', '.join(known)}."
            node, location = node[part], f"{location}.{part}"
        if not isinstance(node, ConfigDict):
            return f"{flag}: {location} is {node!r} and has no keys."
    return ""


def _of_config(error: BaseException) -> str:
    """Returns the problem with a config file or one of its keys, from the root cause of absl's exception."""
    while (cause := error.__cause__ or error.__context__) and "Could not override field" not in str(error)[:30]:
        error = cause
    if missing := re.search(r"No such file or directory: '(.*\.py)", str(error)):
        path = Path(missing[1])
        return f"there is no config file {path}{nearest(path.stem, [file.stem for file in path.parent.glob('*.py')])}."
    # The message of a locked ConfigDict lists all fields before the most similar field.
    others = r"Other fields present:.*(?=Did you mean)|Other fields present:.*"
    message = re.sub(others, "", str(error), flags=re.DOTALL).strip("'\" ")
    if key := re.search(r'Key "(\w+)" does not exist', message):  # the key may exist in another section
        config = flags.FLAGS["config"].value
        names = directory.flat(config.to_dict()) if config else {}
        if places := [name for name in names if name.rpartition(".")[2] == key[1]]:
            return f"the section has no key {key[1]!r}; the config has {', '.join(places)}."
    types = r"override field '(\w+)'.*?\)\. (.*) is of original type <class '(\w+)'>.*<class '(\w+)'>"
    if wrong := re.search(types, message, re.DOTALL):
        key, value, kind, wanted = wrong.groups()
        expected = {known.__name__: text for known, text in EXPECTED.items()}.get(wanted, wanted)
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == "get_config"]
        location = f" ({frames[0].filename}, line {frames[0].lineno})" if frames else ""
        return f"the key {key!r} takes {expected}, and not {value!r}, which is of type {kind}{location}."
    return message


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
