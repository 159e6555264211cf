"""The outputs of a run: metrics.jsonl, TensorBoard, Weights & Biases, a progress bar, and tables."""

import contextlib
import importlib
import importlib.util
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, SupportsFloat

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar
from tqdm import tqdm

from kd_jax import storage
from kd_jax.storage.files import Json

SECONDS_BETWEEN_FLUSHES = 10.0
WANDB = "wandb.json"  # in the work directory: the project and the id of the run of Weights & Biases
proto: Any = event_pb2  # protobuf makes the classes at import time, so a type checker does not see them


def averages(sums: Mapping[str, tuple[SupportsFloat, SupportsFloat]]) -> dict[str, float]:
    """Returns {name: sum / count} as Python numbers. A mean with count 0 is omitted."""
    return {name: float(total) / float(count) for name, (total, count) in sums.items() if float(count)}


class WandbRun(Protocol):
    """The methods of `wandb.Run` that are used here."""

    def log(self, data: dict[str, float]) -> object:
        """Adds a row of values."""
        ...

    def finish(self, exit_code: int) -> object:
        """Ends the run; an exit code other than 0 marks the run as failed."""
        ...


def check_wandb(project: str) -> None:
    """Checks that the package wandb is installed, if a config names a project of Weights & Biases.

    Raises:
      ValueError: the package is not installed, or it has no valid key.
    """
    if not project:
        return
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"log.wandb={project!r} needs the package wandb, which is not installed: pip install wandb. Or leave log.wandb empty."
        )
    wandb: Any = importlib.import_module("wandb")
    if os.environ.get("WANDB_MODE", "online") != "online" or wandb.run is not None:
        return
    try:
        problem = "" if wandb.login(prompt=False) else "there is no key"
    except Exception as error:  # wandb has several kinds of errors
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if problem:
        raise ValueError(
            f"log.wandb={project!r}: Weights & Biases cannot be used ({problem}). Call `wandb login`, or set WANDB_API_KEY. With "
            f"WANDB_MODE=offline the metrics are written to the folder wandb of the work directory, for `wandb sync`."
        )


def open_wandb(project: str, workdir: str, config: Json) -> WandbRun | None:
    """Opens the run of Weights & Biases that belongs to a work directory; returns None if no project is named.

    The id of the run is stored in the work directory, so a resumed run continues the same run. Steps that are repeated
    after a kill are logged twice, with the same values.

    Args:
      project: the name of the project; "" for none.
      workdir: the work directory.
      config: the config of the run, as nested dicts.
    """
    if not project:
        return None
    wandb: Any = importlib.import_module("wandb")
    path = Path(workdir) / WANDB
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if known.get("project") != project:
        known = {"project": project, "id": secrets.token_hex(4)}
        storage.write_whole(path, json.dumps(known) + "\n")
    name = "/".join(Path(workdir).absolute().parts[-2:])  # the runs of an ablation have equal last parts
    run = wandb.init(project=project, id=known["id"], resume="allow", dir=workdir, name=name, config=config)
    # Metrics are read some steps late, so the rows are not in the order of the steps.
    run.define_metric("*", step_metric="step")
    return run


class Writer:
    """Appends metrics to `metrics.jsonl` and to TensorBoard files in a work directory.

    Each line is a JSON object: {"step": ..., "split": "train", "eval" or "speed", name: value, ...}.
    """

    def __init__(self, workdir: str, first_step: int, silent: bool = False, wandb_run: WandbRun | None = None):
        """Opens the files, and drops the lines that follow the checkpoint of `first_step`.

        The dropped lines are the evaluation at `first_step`, and all lines of later steps.

        Args:
          workdir: the work directory of the run.
          first_step: the step of the checkpoint from which the run resumes.
          silent: True to write nothing, because another process writes.
          wandb_run: a run of `open_wandb` that also receives the metrics, and that is finished at the end; or None.
        """
        self._silent, self._wandb_run = silent, wandb_run
        if silent:
            return
        folder = Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        # Without a checkpoint the run starts again, and repeats the evaluation at step 0.
        saved = lambda line: (line["step"], line["split"] == "eval") <= (first_step, False)
        lines = [line for line in read(workdir) if saved(line)] if first_step else []
        storage.write_json_lines(path, lines)
        self._file = path.open("a", encoding="utf-8")
        board = folder / "tensorboard"
        board.mkdir(exist_ok=True)
        # tensorboardX's SummaryWriter writes in a thread. When the disk is full, the thread stops, and the run then waits
        # forever at a full queue. EventsWriter of the same library writes at once.
        self._board = EventsWriter(str(board / "events"))
        self._board_path = self._board._file_name
        self._next_flush = 0.0
        dropped = proto.Event(step=first_step + 1, session_log=proto.SessionLog(status=proto.SessionLog.START))
        self._board.write_event(dropped)  # TensorBoard then hides the later steps of earlier files

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Writes the values of a step to both files."""
        if self._silent:
            return
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._file.flush()
        if self._wandb_run is not None:
            self._wandb_run.log({"step": step} | {f"{split}/{name}": value for name, value in values.items()})
        with storage.storing(self._board_path):
            for name, value in values.items():
                summary = scalar(f"{split}/{name}", value)
                self._board.write_event(proto.Event(wall_time=time.time(), step=step, summary=summary))
            if time.monotonic() >= self._next_flush:  # a flush waits until the disk has the bytes
                self._board.flush()
                self._next_flush = time.monotonic() + SECONDS_BETWEEN_FLUSHES

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._silent:
            return
        if self._wandb_run is not None:
            self._wandb_run.finish(exit_code=1 if kind else 0)
        # On a full disk the last bytes also fail, and this second error adds nothing to the first.
        with contextlib.suppress(OSError) if kind else storage.storing(self._board_path), self._file:
            self._board.close()


def read(workdir: str) -> list[Json]:
    """Returns the lines of a work directory's metrics.jsonl. An incomplete last line, from a killed run, is ignored."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    return storage.read_json_lines(path, appended=True)


def progress(total: int, initial: int, quiet: bool = False) -> tqdm:
    """Returns a progress bar over steps, with the remaining time. `set_postfix` adds loss and tokens per second."""
    return tqdm(
        total=total, initial=initial, desc="train", unit="step", dynamic_ncols=True, disable=quiet, mininterval=1
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Returns an aligned Markdown table whose head is the first row.

    All columns but the first are aligned to the right.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])
