"""The responses of a teacher to the prompts of a dataset, stored as a dataset."""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from kd_jax import models, sharding
from kd_jax.prefixes.rollouts import Progress, Sampler, draw_key
from kd_jax.storage import directory, read_json_lines, storing, write_json_lines, write_whole
from kd_jax.storage.checksum import checksums, digest
from kd_jax.storage.files import Json

RESPONSES_VERSION = 2  # version 1 had no ids, and the name of the folder depended on fewer settings


def write_responses(
    folder: Path, rows: Sequence[dict[str, str]], prompts: Sequence[list[int] | None], sampler: Sampler,
    model: models.Model, params: PyTree, *, batch_size: int, seed: int, settings: Json, progress: Progress,
) -> Path:  # fmt: skip
    """Writes a model's responses to a dataset's prompts as a file of JSON lines, which `read_responses` reads.

    A response depends only on the place of its row and on the seed, so the next call can resume an interrupted call. A
    partial file is renamed when it is complete. All processes of a run call this function. Only the first process
    writes, and all processes must be able to read the folder. A second run that needs the same file waits for the file.

    Args:
      folder: the folder of the file `responses.jsonl`.
      rows: the rows of the dataset, with prompt, context and further columns, which are written, too.
      prompts: the ids of each row's prompt; None or [] for a row without a response.
      sampler: the sampler of the responses.
      model: the model that writes.
      params: the parameters of the model.
      batch_size: the number of rows that are sampled at a time.
      seed: the seed of the responses.
      settings: a description of the file, which is written into the same folder.
      progress: a function that adds a progress bar to an iterable.

    Returns:
      The path of the file. Unfinished and empty responses are not in the file.

    Raises:
      ValueError: no response is finished. Nothing is stored, so that the next call samples again.
    """
    first = jax.process_index() == 0
    if first:
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    # Another run on this machine may write the same responses. This run then waits for the other run.
    with directory.alone(folder, wait=True) if first else contextlib.nullcontext():
        return _write(folder, rows, prompts, sampler, model, params, batch_size, seed, settings, progress, first)


def _write(
    folder: Path, rows: Sequence[dict[str, str]], prompts: Sequence[list[int] | None], sampler: Sampler,
    model: models.Model, params: PyTree, batch_size: int, seed: int, settings: Json, progress: Progress, first: bool,
) -> Path:  # fmt: skip
    path, partial = folder / "responses.jsonl", folder / "responses.jsonl.partial"
    done = 0
    if first:
        done = len(rows) if path.exists() else _complete_batches(partial) * batch_size
    # All processes follow the first process, because they sample together.
    for start in progress(range(sharding.from_first_process(done), len(rows), batch_size)):
        stop = min(start + batch_size, len(rows))
        answered = [(rows[i], ids) for i in range(start, stop) if (ids := prompts[i])]
        lines: list[Json] = []
        if answered:
            batch = [ids for _, ids in answered]
            batch += [batch[-1]] * (batch_size - len(batch))  # a full batch, so that nothing is compiled again
            sampled = sampler.rows(model, params, batch, draw_key(seed, start), "teacher")
            for (row, prompt_ids), ids in zip(answered, sampler.responses(sampled), strict=False):
                response_ids = sampler.tokenizer.strip_ends(ids)
                response = sampler.tokenizer.decode(response_ids)
                if sampler.has_ended(ids) and response:
                    ids_of_row = {"prompt_ids": prompt_ids, "response_ids": response_ids}
                    lines.append({**row, "reference": row.get("response", ""), "response": response} | ids_of_row)
        if first:  # one line per batch, so that a batch is either complete or absent
            with storing(partial), partial.open("a", encoding="utf-8") as file:
                file.write(json.dumps(lines) + "\n")
    count = 1
    if first and not path.exists():
        written = [row for batch in read_json_lines(partial, appended=True) for row in batch]
        count = len(written)
        if written:
            write_whole(folder / "settings.json", json.dumps(settings, indent=2, default=str) + "\n")
            write_json_lines(path, written)
        partial.unlink()
    if not sharding.from_first_process(count):  # no process reads before the file exists
        raise ValueError(
            f"none of the teacher's {len(rows)} responses ended within max_new_tokens={sampler.max_new_tokens}, and a response "
            f"that has not ended is not used. Raise sampling.max_new_tokens, or check the end tokens in the teacher's folder, "
            f"which are {', '.join(map(sampler.tokenizer.describe_id, sampler.tokenizer.end_ids))}."
        )
    return path


def read_responses(path: Path) -> list[Json]:
    """Returns the rows of a file of `write_responses`: the columns of the dataset, prompt_ids and response_ids.

    The column `reference` has the response of the dataset; files of earlier versions lack this column.

    The ids of a response are the sampled ids without the end token.
    """
    return read_json_lines(path)


def _complete_batches(partial: Path) -> int:
    """Returns the number of complete lines, and removes an incomplete last line."""
    if not partial.exists():
        return 0
    content = partial.read_bytes()
    length = content.rfind(b"\n") + 1
    if length < len(content):
        os.truncate(partial, length)  # this is one step, so nothing is lost if the process is killed here
    return content.count(b"\n")


def fingerprint(params: PyTree, settings: object) -> str:
    """Returns a hash of the bits of a model's parameters, equal on any mesh, and of some settings."""
    sums = jax.tree.leaves(checksums(params))
    return digest(settings, np.array(sums, np.uint32).tobytes())[:12]
