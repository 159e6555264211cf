"""Responses that are sampled from a model, as rows to train on."""

import base64
import dataclasses
import zlib
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jaxtyping import Int, PyTree

from kd_jax import data, models, sharding
from kd_jax.objectives import ORIGINS
from kd_jax.settings import Sampling
from kd_jax.storage.files import Json

# M rows as arrays by name: tokens [M, L + 1], lengths, prompt_lengths and origin [M], log_probs [M, L].
Rows = dict[str, np.ndarray]
Mixture = tuple[models.Model, PyTree, float]  # model, parameters and share, as in `models.generate`
Progress = Callable[[Iterable[int]], Iterable[int]]  # returns the same numbers, with a progress bar
DRAWS = (
    2**31 - 1
)  # every key of a draw folds this number in first; other keys of a run fold in a step, which is smaller


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Samples responses to prompts, and makes rows of prompts and responses.

    Attributes:
      mesh: the mesh of the models' parameters.
      tokenizer: the tokenizer, whose `end_ids` end a response.
      max_length: the maximum number of tokens in a model's input; a row has at most one token more.
      max_new_tokens: the maximum number of tokens of a response.
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
        self, model: models.Model, params: PyTree, prompts: Sequence[Sequence[int]], key: jax.Array, origin: str,
        mixture: Mixture | None = None,
    ) -> Rows:  # fmt: skip
        """Returns a row for each prompt, with one response. Every process gets the same rows.

        Args:
          model: the model that writes.
          params: the parameters of the model.
          prompts: the ids of all prompts of the batch, of all processes.
          key: the random key.
          origin: the origin of the rows, from `objectives.ORIGINS`.
          mixture: as in `models.generate`.
        """
        pad = self.tokenizer.pad_id
        writers = (model,) if mixture is None else (model, mixture[0])
        room = min(writer.config.max_positions for writer in writers) - self.max_new_tokens
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
        """Returns the ids of the response of each row, including the end token."""
        parts = zip(rows["tokens"], rows["prompt_lengths"], rows["lengths"], strict=True)
        return [row[begin:end].tolist() for row, begin, end in parts]

    def text(self, rows: Rows) -> list[tuple[str, str]]:
        """Returns the texts of the prompt and the response of each row. The response has no end token."""
        prompts = (row[:end].tolist() for row, end in zip(rows["tokens"], rows["prompt_lengths"], strict=True))
        decode, strip = self.tokenizer.decode, self.tokenizer.strip_ends
        return [(decode(prompt), decode(strip(ids))) for prompt, ids in zip(prompts, self.responses(rows), strict=True)]

    def has_ended(self, response: Sequence[int]) -> bool:
        """Returns True if the last token of a response is an end token."""
        return bool(response) and response[-1] in self.tokenizer.end_ids

    def report(self, rows: Rows) -> dict[str, float]:
        """Returns statistics of the responses: length, finished, repetition and entropy.

        - length: the mean number of tokens.
        - finished: the share of responses that end with an end token.
        - repetition: the share of 4-grams that occur earlier in the same response.
        - entropy: an estimate in nats per token, the mean of -log q of the sampled tokens at the sampling temperature.
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


def make_sampler(
    mesh: jax.sharding.Mesh, tokenizer: data.Tokenizer, max_length: int, sampling: Sampling, no_repeat_ngram_size: int = 0
) -> Sampler:  # fmt: skip
    """Returns a sampler with the settings of `sampling`. All commands and runs of kd_jax call this function.

    An evaluation gives `Sampling(max_new_tokens=...)`. The temperature is then 1 and not the temperature of training,
    so that runs can be compared.

    Args:
      mesh, tokenizer, max_length, no_repeat_ngram_size: the attributes of `Sampler`.
      sampling: the settings, of which max_new_tokens, temperature, top_p and top_k are used.
    """
    return Sampler(
        mesh, tokenizer, max_length, sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k,
        no_repeat_ngram_size,
    )  # fmt: skip


def draw_key(seed: int, *numbers: int) -> jax.Array:
    """Returns the random key for a draw that the numbers identify."""
    key = jax.random.fold_in(jax.random.key(seed), DRAWS)
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def as_batch(rows: Rows) -> dict[str, np.ndarray]:
    """Returns the rows as a batch in the form of `data.batches`, with the origins and the sampled log-probabilities.

    The tokens of the response, including the end token, are counted.
    """
    position = np.arange(rows["tokens"].shape[1] - 1)
    length, prompt = (rows[name][:, None] for name in ("lengths", "prompt_lengths"))
    return {
        "tokens": np.where(position < length - 1, rows["tokens"][:, :-1], rows["tokens"][:, -1:]),
        "targets": rows["tokens"][:, 1:],
        "mask": position < length - 1,
        "loss_mask": (position >= prompt - 1) & (position < length - 1),
        "origin": rows["origin"],
        "log_probs": rows["log_probs"],
    }


def take(rows: Rows, indices: Int[np.ndarray, " M"] | slice) -> Rows:
    """Returns the rows at the indices."""
    return {name: array[indices] for name, array in rows.items()}


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Returns the rows of all parts, in order."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def encode(rows: Rows) -> Json:
    """Returns rows in a form that JSON can hold: the type, shape and compressed content of each array."""
    return {
        name: {
            "dtype": array.dtype.str,
            "shape": array.shape,
            "zlib": base64.b64encode(zlib.compress(array.tobytes())).decode(),
        }
        for name, array in rows.items()
    }


def decode(saved: Json) -> Rows:
    """Returns the rows from the saved form of `encode`."""
    rows = {}
    for name, array in saved.items():
        content = zlib.decompress(base64.b64decode(array["zlib"]))
        rows[name] = np.frombuffer(content, array["dtype"]).reshape(array["shape"]).copy()
    return rows
