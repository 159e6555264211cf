"""Responses of a model to prompts, and their scores."""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from kd_jax import data, models
from kd_jax.data.formats import MESSAGES
from kd_jax.data.scores import exact_match, number_match, rouge_l
from kd_jax.evaluate.tokens import collect, summary
from kd_jax.prefixes import rollouts
from kd_jax.sharding import fetch_whole, put_batch
from kd_jax.storage.files import Json
from kd_jax.teachers import Teacher, as_teacher
from kd_jax.teachers.online import HiddenModel

# The measures that are meaningful on the model's own text. The others compare the model with a given text, but the
# model's own tokens are sampled from the model itself.
OF_OWN_TEXT = ("entropy", "forward_kl", "reverse_kl", "total_variation", "top1_agreement")


@dataclasses.dataclass(frozen=True)
class Example:
    """The ids of a prompt, and its reference answers."""

    prompt: list[int]
    references: tuple[str, ...]


def read_examples(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: data.Tokenizer,
    *,
    template: str | data.Template,
    max_prompt_length: int,
    cut: bool,
) -> list[Example]:
    """Returns rows with prompt, context and references as examples.

    Args:
      rows: rows with prompt, context and references.
      tokenizer: the tokenizer.
      template: the template of prompts.
      max_prompt_length: the largest number of tokens of a prompt.
      cut: True to truncate a prompt that is too long. With False the row is dropped.

    Raises:
      ValueError: no row has a prompt of at least one and at most `max_prompt_length` tokens.
    """
    encoded = data.encode_prompts(
        [{name: row[name] for name in ("name", "prompt", "context", MESSAGES) if name in row} for row in rows],
        tokenizer=tokenizer, template=template, max_length=max_prompt_length, cut=cut,
    )  # fmt: skip
    examples = [Example(ids, tuple(row["references"])) for row, ids in zip(rows, encoded, strict=True) if ids]
    if not examples:
        raise ValueError(f"none of the {len(rows)} rows has a prompt of 1 to {max_prompt_length} tokens.")
    return examples


def held_out_examples(rows: data.Rows, tokenizer: data.Tokenizer, count: int) -> list[Example]:
    """Returns the first rows as examples, with the counted part of each row as the reference.

    Args:
      rows: the token rows. In rows of plain text the prompt is the first token.
      tokenizer: the tokenizer.
      count: the largest number of examples.
    """
    examples = []
    for i in range(min(count, len(rows))):
        begin = max(int(rows.first_counted[i]), 1)
        reference = tokenizer.decode(tokenizer.strip_ends(rows[i][begin:].tolist()))
        examples.append(Example(rows[i][:begin].tolist(), (reference,)))
    return examples


def respond(
    sampler: rollouts.Sampler, model: models.Model, params: PyTree, prompts: Sequence[Sequence[int]], *,
    batch_size: int, seed: int, progress: Callable[[range], Iterable[int]] = iter,
) -> rollouts.Rows:  # fmt: skip
    """Returns one sampled response to each prompt. All batches have the same size.

    Args:
      sampler: the sampler.
      model: the model that writes.
      params: the model's parameters.
      prompts: the ids of each prompt, at least one.
      batch_size: the number of prompts that are answered at a time.
      seed: the seed of the sampling.
      progress: a function from a range to an iterator with a progress bar.
    """
    parts = []
    for start in progress(range(0, len(prompts), batch_size)):
        part = list(prompts[start : start + batch_size])
        batch = part + [part[-1]] * (batch_size - len(part))  # JAX compiles one program for each shape
        sampled = sampler.rows(model, params, batch, rollouts.draw_key(seed, start), "student")
        parts.append(rollouts.take(sampled, slice(len(part))))
    return rollouts.concatenate(parts)


def score(texts: Sequence[str], examples: Sequence[Example], numbers: bool = False) -> list[dict[str, float]]:
    """Returns the scores of each text against its example's references, in [0, 100].

    Args:
      texts: the texts.
      examples: the example of each text.
      numbers: True to add number_match to rouge_l and exact_match.
    """
    measures = {"rouge_l": rouge_l, "exact_match": exact_match} | ({"number_match": number_match} if numbers else {})
    return [
        {name: measure(text, example.references) for name, measure in measures.items()}
        for text, example in zip(texts, examples, strict=True)
    ]


def assess(
    sampler: rollouts.Sampler, models_and_params: tuple[models.Model, PyTree, Teacher | HiddenModel | None, PyTree],
    examples: Sequence[Example], *, batch_size: int, seed: int, numbers: bool = False,
    progress: Callable[[range], Iterable[int]] = iter, chunk: int | None = None,
    token_weights: Callable[[dict[str, Array]], dict[str, Array]] | None = None,
) -> tuple[dict[str, float], list[Json], dict[str, np.ndarray]]:  # fmt: skip
    """Samples a model's answers to prompts, and measures the answers.

    Args:
      sampler: the sampler of responses.
      models_and_params: the model, its parameters, the teacher or None, and the teacher's parameters. A cached teacher
        is not used, because a cache has no values for new text.
      examples: the prompts and references.
      batch_size, seed, progress: the arguments of `respond`.
      numbers: the argument of `score`.
      chunk: the argument of `tokens.collect`.
      token_weights: a batch of `own_batches` on the mesh -> name -> the weight of each token, [B, L]; None for no weights.

    Returns:
      Three values: the means, the texts, and `tokens.collect` of the texts. The means are those of the scores, of
        `Sampler.report`, and of each name of `OF_OWN_TEXT`, prefixed with "own_". Each text has its scores. With a
        teacher each text also has `pieces`, and KL(q || p) at each piece as `reverse_kl`. With `token_weights` each text
        also has `pieces`, and the weights at each piece, by name, as `token_weights`.
    """
    prompts = [example.prompt for example in examples]
    sampled = respond(sampler, *models_and_params[:2], prompts, batch_size=batch_size, seed=seed, progress=progress)
    answers = sampler.text(sampled)
    scores = score([response for _, response in answers], examples, numbers)
    texts: list[Json] = [
        {"seed": seed, "prompt": prompt, "references": example.references, "response": response} | text_scores
        for example, (prompt, response), text_scores in zip(examples, answers, scores, strict=True)
    ]
    model, params, teacher, teacher_params = models_and_params
    own = collect(
        model, params, as_teacher(teacher).on_new_text(), teacher_params, own_batches(sampled, batch_size),
        sampler.mesh, vocab_size=sampler.tokenizer.vocab_size, chunk=chunk,
    )  # fmt: skip
    responses = sampler.responses(sampled)
    per_text = lambda values: np.split(values, np.cumsum([len(ids) for ids in responses])[:-1])
    weights = (
        {} if token_weights is None else _at_counted(token_weights, own_batches(sampled, batch_size), sampler.mesh)
    )
    if "reverse_kl" in own or weights:
        for line, ids in zip(texts, responses, strict=True):
            line["pieces"] = pieces(sampler.tokenizer, ids)
    if "reverse_kl" in own:
        for line, values in zip(texts, per_text(own["reverse_kl"]), strict=True):
            line["reverse_kl"] = [round(float(value), 3) for value in values]
    for name, of_tokens in weights.items():
        for line, values in zip(texts, per_text(of_tokens), strict=True):
            line.setdefault("token_weights", {})[name] = [float(f"{value:.4g}") for value in values]
    means = {name: statistics.mean(text_scores[name] for text_scores in scores) for name in scores[0]}
    report = {
        name: value for name, value in sampler.report(sampled).items() if name != "entropy"
    }  # own_entropy is exact
    return means | report | {f"own_{n}": v for n, v in summary(own).items() if n in OF_OWN_TEXT}, texts, own


def own_batches(rows: rollouts.Rows, batch_size: int) -> Iterable[dict[str, np.ndarray]]:
    """Yields a model's texts as batches of one size, with this process's rows of each batch.

    A batch has the arrays of `rollouts.as_batch`. Rows that fill up the last batch are not counted.

    Args:
      rows: the prompts and responses.
      batch_size: the number of rows of a global batch.
    """
    arrays, share = rollouts.as_batch(rows), batch_size // jax.process_count()
    own_rows = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    for start in range(0, len(rows["lengths"]), batch_size):
        part = {name: array[start : start + batch_size] for name, array in arrays.items()}
        missing = batch_size - len(part["tokens"])
        yield {
            name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))[own_rows] for name, array in part.items()
        }


def _at_counted(
    function: Callable[[dict[str, Array]], dict[str, Array]], batches: Iterable[dict[str, np.ndarray]],
    mesh: jax.sharding.Mesh,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Returns the values [B, L] of a function of a batch at all counted tokens, by name. Every process gets all values."""
    parts = []
    for batch in batches:
        placed = put_batch(mesh, batch)
        counted = fetch_whole(placed["loss_mask"])
        parts.append({name: fetch_whole(values)[counted] for name, values in function(placed).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def pieces(tokenizer: data.Tokenizer, ids: Sequence[int]) -> list[str]:
    """Returns each token's part of the text. A character of several tokens belongs to the last of these tokens."""
    parts, start, done = [], 0, 0  # the text of ids[start:done] is known; a token's text can depend on the token before
    for end in range(1, len(ids) + 1):
        before, text = tokenizer.decode(list(ids[start:done])), tokenizer.decode(list(ids[start:end]))
        if text.endswith("\ufffd") and end < len(ids):
            parts.append("")
        else:
            parts.append(text[len(before) :])
            start, done = done, end
    return parts
