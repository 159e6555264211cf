"""What a run shows: metrics.jsonl, TensorBoard, a progress bar, and tables."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tensorboardX import SummaryWriter
from tqdm import tqdm

from kd_jax import storage


def averages(sums: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """{name: sum / count} as Python numbers; a mean over nothing is left out."""
    return {name: float(total) / float(count) for name, (total, count) in sums.items() if float(count)}


class Writer:
    """Appends metrics to `metrics.jsonl` and to TensorBoard files in a work directory.

    One JSON object a line: {"step": ..., "split": "train", "eval" or "speed", name: value, ...}.
    """

    def __init__(self, workdir: str, first_step: int, silent: bool = False):
        """Opens the files, dropping what comes after the checkpoint of `first_step`: its evaluation, and lines of later steps.

        Args:
          workdir: of the run.
          first_step: that is there already.
          silent: nothing is written: another process does.
        """
        self._silent = silent
        if silent:
            return
        folder = Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        # Without a checkpoint the run starts over, and evaluates at step 0 again.
        saved = lambda line: (line["step"], line["split"] == "eval") <= (first_step, False)
        lines = [line for line in read(workdir) if saved(line)] if first_step else []
        partial = folder / "metrics.jsonl.partial"
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        partial.rename(path)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        if self._silent:
            return
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            # The thread of TensorBoard's file ends where it cannot write, and a full queue would then keep the run waiting for ever.
            if not self._board_is_written():
                where = self._board.logdir
                raise storage.StorageError(
                    f"{where}: TensorBoard's file could not be written. {storage.space_left(where)}Make room, and call again."
                )
            self._board.add_scalar(f"{split}/{name}", value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if self._silent:
            return
        # On a full disk the last bytes fail again, which says nothing new beside the first error.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext(), self._file:
            self._close_board()

    def _close_board(self) -> None:
        writer: Any = getattr(self._board.file_writer, "event_writer", None)
        try:
            if self._board_is_written():
                self._board.close()
        finally:
            if writer is not None:
                writer._closed = True  # or it would be closed again, and fail again, as Python ends

    def _board_is_written(self) -> bool:
        worker = getattr(getattr(self._board.file_writer, "event_writer", None), "_worker", None)
        return worker is None or worker.is_alive()


def read(workdir: str) -> list[dict[str, Any]]:
    """The lines of a work directory's metrics.jsonl; one cut off by a kill is left out."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def progress(total: int, initial: int, quiet: bool = False) -> tqdm:
    """A bar over steps with the time left; `set_postfix` adds loss and tokens per second."""
    return tqdm(
        total=total, initial=initial, desc="train", unit="step", dynamic_ncols=True, disable=quiet, mininterval=1
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned Markdown with the first row as the head; all columns but the first to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])
