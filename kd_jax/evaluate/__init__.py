"""How good a student is: its next-token distributions on given text, and the text that it writes itself."""

from kd_jax.evaluate.scores import exact_match, number_match, rouge_l
from kd_jax.evaluate.texts import Example, assess, own_batches, read_examples, respond, sample, score
from kd_jax.evaluate.tokens import collect, evaluate, summary, token_values

__all__ = [
    "Example",
    "assess",
    "collect",
    "evaluate",
    "exact_match",
    "number_match",
    "own_batches",
    "read_examples",
    "respond",
    "rouge_l",
    "sample",
    "score",
    "summary",
    "token_values",
]
