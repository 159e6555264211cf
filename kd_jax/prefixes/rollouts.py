"""Responses drawn from a model, as rows to train on, and a teacher's as a dataset on disk."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from kd_jax import data, models, sharding
from kd_jax.objectives import ORIGINS
from kd_jax.storage import directory, read_json_lines, storing, write_json_lines, write_whole
from kd_jax.storage.checksum import checksums, digest

# Rows by name, an entry a row in each array: tokens [M, L + 1], lengths, prompt_lengths and origin [M], log_probs [M, L].
Rows = dict[str, np.ndarray]
RESPONSES_VERSION = 2  # 1: without ids, and known by less than all that decides them
DRAWS = 2**31 - 1  # folded into the seed's key before all else; the run's own keys fold in a step


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How responses are drawn, and what makes rows of them.

    Attributes:
      mesh: where the models' parameters are.
      tokenizer: each of its `end_ids` ends a response.
      max_length: tokens of a model's input; a row has at most one more.
      max_new_tokens: of a response.
      temperature, top_p, top_k, no_repeat_ngram_size: as in `models.generate`.
    """

    mesh: jax.sharding.Mesh
    tokenizer: data.Tokenizer
    max_length: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    no_repeat_ngram_size: int = 0

    def rows(
        self, model: models.Model, params: Any, prompts: Sequence[Sequence[int]], key: jax.Array, origin: str,
        mixture: tuple[models.Model, Any, float] | None = None,
    ) -> Rows:  # fmt: skip
        """One response to each prompt, with prompt, as rows that are the same on every process.

        Args:
          model: who writes.
          params: its parameters.
          prompts: ids; all of the global batch, on every process.
          key: of the draw.
          origin: what the rows are marked as.
          mixture: as in `models.generate`.
        """
        pad = self.tokenizer.pad_id
        writers = (model,) if mixture is None else (model, mixture[0])
        room = min(writer.config.longest_sequence for writer in writers) - self.max_new_tokens
        tokens, mask = models.left_pad(prompts, pad, room)
        drawn = models.generate(
            model, params, *(sharding.put_whole(self.mesh, array) for array in (tokens, mask)),
            max_new_tokens=self.max_new_tokens, key=key, temperature=self.temperature, top_p=self.top_p,
            top_k=self.top_k, no_repeat_ngram_size=self.no_repeat_ngram_size, mixture=mixture,
            vocab_size=self.tokenizer.vocab_size, eos_id=self.tokenizer.end_ids, pad_id=pad,
        )  # fmt: skip
        tokens, mask, log_probs = map(sharding.fetch_whole, drawn)
        count = len(prompts)
        rows = {
            "tokens": np.full((count, self.max_length + 1), pad, np.int32),
            "log_probs": np.zeros((count, self.max_length), np.float32),
            "lengths": np.zeros(count, np.int32),
            "prompt_lengths": np.array([len(prompt) for prompt in prompts], np.int32),
            "origin": np.full(count, ORIGINS.index(origin), np.int32),
        }
        for i, prompt in enumerate(prompts):
            length = min(int(mask[i].sum()), self.max_length + 1 - len(prompt))
            end = len(prompt) + length
            rows["tokens"][i, :end] = [*prompt, *tokens[i, :length]]
            rows["log_probs"][i, len(prompt) - 1 : end - 1] = log_probs[i, :length]
            rows["lengths"][i] = end
        return rows

    def responses(self, rows: Rows) -> list[list[int]]:
        """The ids of each row's response, its end token included."""
        ends = zip(rows["tokens"], rows["prompt_lengths"], rows["lengths"], strict=True)
        return [row[begin:end].tolist() for row, begin, end in ends]

    def text(self, rows: Rows) -> list[tuple[str, str]]:
        """Returns prompt and response of each row, the response without its end token."""
        prompts = (row[:end].tolist() for row, end in zip(rows["tokens"], rows["prompt_lengths"], strict=True))
        decode, strip = self.tokenizer.decode, self.tokenizer.strip_ends
        return [(decode(prompt), decode(strip(ids))) for prompt, ids in zip(prompts, self.responses(rows), strict=True)]

    def has_ended(self, response: Sequence[int]) -> bool:
        """Whether a response's last token is an end token."""
        return bool(response) and response[-1] in self.tokenizer.end_ids

    def report(self, rows: Rows) -> dict[str, float]:
        """Of the responses: tokens, share that ended, share of 4-grams that the same response has before, and entropy.

        The entropy, in nats a token, is estimated by the mean of -log q of what was drawn at the sampling's temperature.
        """
        texts = self.responses(rows)
        grams = [[tuple(ids[i : i + 4]) for i in range(len(ids) - 3)] for ids in texts]
        total, distinct = sum(map(len, grams)), sum(len(set(g)) for g in grams)
        return {
            "length": float(np.mean([len(ids) for ids in texts])),
            "finished": float(np.mean([self.has_ended(ids) for ids in texts])),
            "repetition": 1 - distinct / total if total else 0.0,
            "entropy": -float(rows["log_probs"].sum()) / max(1, sum(map(len, texts))),
        }


def draw_key(seed: int, *numbers: int) -> jax.Array:
    """The random key of a draw."""
    made = jax.random.fold_in(jax.random.key(seed), DRAWS)
    for number in numbers:
        made = jax.random.fold_in(made, number)
    return made


def as_batch(rows: Rows) -> dict[str, np.ndarray]:
    """Rows as `data.batches` gives them, with their origin and the drawn tokens' log-probabilities.

    The first token of a response counts, its end token does, and nothing after it.
    """
    place = np.arange(rows["tokens"].shape[1] - 1)
    length, prompt = (rows[name][:, None] for name in ("lengths", "prompt_lengths"))
    return {
        "tokens": np.where(place < length - 1, rows["tokens"][:, :-1], rows["tokens"][:, -1:]),
        "targets": rows["tokens"][:, 1:],
        "mask": place < length - 1,
        "loss_mask": (place >= prompt - 1) & (place < length - 1),
        "origin": rows["origin"],
        "log_probs": rows["log_probs"],
    }


def take(rows: Rows, indices: Int[np.ndarray, " M"] | slice) -> Rows:
    """The rows at these indices."""
    return {name: array[indices] for name, array in rows.items()}


def concatenate(parts: Sequence[Rows]) -> Rows:
    """All rows of the parts."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def write_responses(
    folder: Path, rows: Sequence[dict[str, str]], prompts: Sequence[list[int] | None], sampler: Sampler,
    model: models.Model, params: Any, *, batch_size: int, seed: int, settings: dict[str, Any],
    progress: Callable[..., Any],
) -> Path:  # fmt: skip
    """Writes a model's responses to a dataset's prompts as a file of JSON lines, which `read_responses` reads.

    What is drawn depends on the row's place and the seed alone: an interrupted call goes on where it was, and the file has
    its name only when it is complete. All processes of a run call it; the first one looks and writes, so that the folder must
    be one that all can read. A second run that wants the same file waits for it.

    Args:
      folder: the file is `responses.jsonl` in it.
      rows: with prompt and context.
      prompts: the ids of each row's prompt; None or [] for a row without a response.
      sampler: how responses are drawn.
      model: the model that writes.
      params: its parameters.
      batch_size: the number of rows drawn at a time.
      seed: of the draws.
      settings: what is to be known about the file, written beside it.
      progress: iterable -> the same with a progress bar.

    Returns:
      The file. Responses that have not ended, and empty ones, are not in it.

    Raises:
      ValueError: no response has ended. Nothing is kept then, so that the next call draws again.
    """
    first = jax.process_index() == 0
    if first:
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    # Another process of this machine may write the same responses: then this one waits for them.
    with directory.alone(folder, wait=True) if first else contextlib.nullcontext():
        return _write(folder, rows, prompts, sampler, model, params, batch_size, seed, settings, progress, first)


def _write(
    folder: Path, rows: Any, prompts: Any, sampler: Sampler, model: models.Model, params: Any, batch_size: int, seed: int,
    settings: dict[str, Any], progress: Callable[..., Any], first: bool,
) -> Path:  # fmt: skip
    path, partial = folder / "responses.jsonl", folder / "responses.jsonl.partial"
    done = 0
    if first:
        done = len(rows) if path.exists() else _complete_batches(partial) * batch_size
    # What the first process has seen holds for all: the draws below are theirs together.
    for start in progress(range(sharding.from_first_process(done), len(rows), batch_size)):
        stop = min(start + batch_size, len(rows))
        kept = [(rows[i], prompts[i]) for i in range(start, stop) if prompts[i]]
        lines: list[dict[str, Any]] = []
        if kept:
            asked = [ids for _, ids in kept]
            filled = asked + [asked[-1]] * (batch_size - len(asked))  # one shape
            drawn = sampler.rows(model, params, filled, draw_key(seed, start), "teacher")
            for (row, prompt_ids), ids in zip(kept, sampler.responses(drawn), strict=False):
                own = sampler.tokenizer.strip_ends(ids)
                response = sampler.tokenizer.decode(own)
                if sampler.has_ended(ids) and response:
                    text = {"prompt": row["prompt"], "context": row["context"], "response": response}
                    lines.append(text | {"prompt_ids": prompt_ids, "response_ids": own})
        if first:  # a line a batch, so that a batch is there or is not
            with storing(partial), partial.open("a", encoding="utf-8") as file:
                file.write(json.dumps(lines) + "\n")
    found = 1
    if first and not path.exists():
        written = [row for batch in read_json_lines(partial, appended=True) for row in batch]
        found = len(written)
        if written:
            write_whole(folder / "settings.json", json.dumps(settings, indent=2, default=str) + "\n")
            write_json_lines(path, written)
        partial.unlink()
    if not sharding.from_first_process(found):  # nobody reads before the file is there
        raise ValueError(
            f"none of the teacher's {len(rows)} responses ended within max_new_tokens={sampler.max_new_tokens}, and a response "
            f"that has not ended is not used. Raise sampling.max_new_tokens, or check that the teacher's folder names the token "
            f"that ends its answers: its end tokens are {', '.join(map(sampler.tokenizer.shown, sampler.tokenizer.end_ids))}."
        )
    return path


def read_responses(path: Path) -> list[dict[str, Any]]:
    """Reads what `write_responses` wrote: rows of prompt, context and response, with prompt_ids and response_ids.

    The ids of a response are those that were drawn, without an end token.
    """
    return read_json_lines(path)


def _complete_batches(partial: Path) -> int:
    """How many batches are written; a line that was cut off is taken away."""
    if not partial.exists():
        return 0
    content = partial.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(partial, whole)  # in one step: who is killed here has lost nothing
    return content.count(b"\n")


def fingerprint(params: Any, settings: Any) -> str:
    """Of a model's parameters, bit for bit and on any mesh, and of whatever else a text is drawn from."""
    sums = jax.tree.leaves(checksums(params))
    return digest(settings, np.array(sums, np.uint32).tobytes())[:12]
