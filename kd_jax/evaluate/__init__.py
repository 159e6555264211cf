"""Evaluation of a student: its next-token distributions on given text, and the text that it writes itself."""

from kd_jax.data.scores import exact_match, number_match, rouge_l, rouge_tokens
from kd_jax.evaluate.tables import PLACES, by_place
from kd_jax.evaluate.texts import Example, assess, held_out_examples, own_batches, read_examples, respond, score
from kd_jax.evaluate.tokens import collect, evaluate, summary, token_values

__all__ = [
    "PLACES",
    "Example",
    "assess",
    "by_place",
    "collect",
    "evaluate",
    "exact_match",
    "held_out_examples",
    "number_match",
    "own_batches",
    "read_examples",
    "respond",
    "rouge_l",
    "rouge_tokens",
    "score",
    "summary",
    "token_values",
]
