"""What a model writes to prompts, and how good it is."""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kd_jax import data, models, rollouts
from kd_jax.evaluate.scores import exact_match, number_match, rouge_l
from kd_jax.evaluate.tokens import NEEDED, collect, summary

# What is no comparison with a given text: a model's own tokens are drawn from it.
OF_OWN_TEXT = ("entropy", "forward_kl", "reverse_kl", "total_variation", "top1_agreement")


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt's ids, and the texts that are good answers to it."""

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
    """Rows with prompt, context and references as examples; a prompt that is too long is cut or its row left out.

    Raises:
      ValueError: where none is left.
    """
    encoded = data.encode_prompts(
        [{"prompt": row["prompt"], "context": row["context"]} for row in rows], tokenizer=tokenizer, template=template,
        max_length=max_prompt_length, cut=cut,
    )  # fmt: skip
    found = [Example(ids, tuple(row["references"])) for row, ids in zip(rows, encoded, strict=True) if ids]
    if not found:
        raise ValueError(f"none of the {len(rows)} rows has a prompt of 1 to {max_prompt_length} tokens.")
    return found


def held_out_examples(rows: data.Rows, tokenizer: data.Tokenizer, count: int) -> list[Example]:
    """The first rows as prompts, with what follows as the reference; of plain text the prompt is the first token."""
    found = []
    for i in range(min(count, len(rows))):
        begin = max(int(rows.first_counted[i]), 1)
        reference = tokenizer.decode(tokenizer.strip_ends(rows[i][begin:].tolist()))
        found.append(Example(rows[i][:begin].tolist(), (reference,)))
    return found


def respond(
    sampler: rollouts.Sampler, model: models.Model, params: Any, prompts: Sequence[Sequence[int]], *, batch_size: int,
    seed: int, progress: Callable[..., Any] = iter,
) -> rollouts.Rows:  # fmt: skip
    """One response to each prompt, in batches of one size.

    Args:
      sampler: how they are drawn.
      model: who writes.
      params: its parameters.
      prompts: ids, at least one of them each.
      batch_size: prompts answered at a time.
      seed: of the draws.
      progress: iterable -> the same with a progress bar.
    """
    parts = []
    for start in progress(range(0, len(prompts), batch_size)):
        some = list(prompts[start : start + batch_size])
        filled = some + [some[-1]] * (batch_size - len(some))  # one shape
        drawn = sampler.rows(model, params, filled, rollouts.draw_key(seed, start), "student")
        parts.append(rollouts.take(drawn, slice(len(some))))
    return rollouts.concatenate(parts)


def score(texts: Sequence[str], examples: Sequence[Example], numbers: bool = False) -> list[dict[str, float]]:
    """rouge_l and exact_match of each text against its example's references, in [0, 100]; `numbers`: number_match too."""
    measures = {"rouge_l": rouge_l, "exact_match": exact_match} | ({"number_match": number_match} if numbers else {})
    return [
        {name: measure(text, example.references) for name, measure in measures.items()}
        for text, example in zip(texts, examples, strict=True)
    ]


def assess(
    sampler: rollouts.Sampler, both: tuple[models.Model, Any, models.Model | None, Any], examples: Sequence[Example], *,
    batch_size: int, seed: int, numbers: bool = False, progress: Callable[..., Any] = iter, **options: Any,
) -> tuple[dict[str, float], list[dict[str, Any]], dict[str, np.ndarray]]:  # fmt: skip
    """A model answers prompts, and is measured on what it writes.

    Args:
      sampler: how responses are drawn.
      both: the model, its parameters, the teacher or None, and the teacher's.
      examples: prompts and references.
      batch_size, seed, progress: as in `respond`.
      numbers: as in `score`.
      **options: of `tokens.collect`.

    Returns:
      The means: scores, what `Sampler.report` says, and "own_" with each name of `OF_OWN_TEXT`; each text with its scores and,
      beside a teacher, `pieces` and KL(q || p) at each as `reverse_kl`; and `tokens.collect` of the texts.
    """
    prompts = [example.prompt for example in examples]
    drawn = respond(sampler, *both[:2], prompts, batch_size=batch_size, seed=seed, progress=progress)
    answers = sampler.text(drawn)
    scores = score([response for _, response in answers], examples, numbers)
    written: list[dict[str, Any]] = [
        {"seed": seed, "prompt": prompt, "references": example.references, "response": response} | its_scores
        for example, (prompt, response), its_scores in zip(examples, answers, scores, strict=True)
    ]
    own = collect(
        *both, own_batches(drawn, batch_size), sampler.mesh, vocab_size=sampler.tokenizer.vocab_size, **options
    )
    if "reverse_kl" in own:
        responses = sampler.responses(drawn)
        at_tokens = np.split(own["reverse_kl"], np.cumsum([len(ids) for ids in responses])[:-1])
        for line, ids, values in zip(written, responses, at_tokens, strict=True):
            line["pieces"] = pieces(sampler.tokenizer, ids)
            line["reverse_kl"] = [round(float(value), 3) for value in values]
    means = {name: statistics.mean(its_scores[name] for its_scores in scores) for name in scores[0]}
    report = {name: value for name, value in sampler.report(drawn).items() if name != "entropy"}  # own_entropy is exact
    return means | report | {f"own_{n}": v for n, v in summary(own).items() if n in OF_OWN_TEXT}, written, own


def own_batches(rows: rollouts.Rows, batch_size: int) -> Iterable[dict[str, np.ndarray]]:
    """What a model wrote as this process's batches of one size; what fills up the last one counts nowhere."""
    whole, share = rollouts.as_batch(rows), batch_size // jax.process_count()
    for start in range(0, len(rows["lengths"]), batch_size):
        part = {name: whole[name][start : start + batch_size] for name in NEEDED}
        short, own = (
            batch_size - len(part["tokens"]),
            slice(jax.process_index() * share, (jax.process_index() + 1) * share),
        )
        yield {name: np.pad(array, ((0, short), (0, 0)))[own] for name, array in part.items()}


def pieces(tokenizer: data.Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token's share of the text; of a character in several tokens the last one has it."""
    found, start, done = [], 0, 0  # the text of ids[start:done] is known; decoders look at what is before a token
    for end in range(1, len(ids) + 1):
        before, text = tokenizer.decode(list(ids[start:done])), tokenizer.decode(list(ids[start:end]))
        if text.endswith("\ufffd") and end < len(ids):
            found.append("")
        else:
            found.append(text[len(before) :])
            start, done = done, end
    return found
