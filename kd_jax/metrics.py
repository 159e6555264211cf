"""The outputs of a run: metrics.jsonl, TensorBoard, a progress bar, and tables."""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, SupportsFloat

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar
from tqdm import tqdm

from kd_jax import storage
from kd_jax.storage.files import Json

SECONDS_BETWEEN_FLUSHES = 10.0
proto: Any = event_pb2  # protobuf makes the classes at import time, so a type checker does not see them


def averages(sums: Mapping[str, tuple[SupportsFloat, SupportsFloat]]) -> dict[str, float]:
    """Returns {name: sum / count} as Python numbers. A mean with count 0 is omitted."""
    return {name: float(total) / float(count) for name, (total, count) in sums.items() if float(count)}


class Writer:
    """Appends metrics to `metrics.jsonl` and to TensorBoard files in a work directory.

    Each line is a JSON object: {"step": ..., "split": "train", "eval" or "speed", name: value, ...}.
    """

    def __init__(self, workdir: str, first_step: int, silent: bool = False):
        """Opens the files, and drops the lines that follow the checkpoint of `first_step`.

        The dropped lines are the evaluation at `first_step`, and all lines of later steps.

        Args:
          workdir: the work directory of the run.
          first_step: the step of the checkpoint from which the run resumes.
          silent: True to write nothing, because another process writes.
        """
        self._silent = silent
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
