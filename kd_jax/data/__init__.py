"""Text in, batches of tokens out: datasets, prompts, the tokenizer, and the pipeline from one to the other."""

from kd_jax.data.builder import load
from kd_jax.data.pipeline import batches, pack, tokenize
from kd_jax.data.prompts import TEMPLATES, make_render
from kd_jax.data.rows import Packed, Rows, join, pack_rows
from kd_jax.data.tokenizer import Tokenizer

__all__ = [
    "TEMPLATES",
    "Packed",
    "Rows",
    "Tokenizer",
    "batches",
    "join",
    "load",
    "make_render",
    "pack",
    "pack_rows",
    "tokenize",
]
