"""Text in, batches of tokens out: datasets, prompts, the tokenizer, and the pipeline from one to the other."""

from kd_jax.data.builder import DEFAULT_DIR, EVALUATION, fingerprint, load, load_references
from kd_jax.data.pipeline import batches, encode_prompts, pack, pad, prompt_of, tokenize
from kd_jax.data.prompts import TEMPLATES, make_render
from kd_jax.data.rows import Beside, Packed, Rows, join, pack_rows
from kd_jax.data.tokenizer import Tokenizer

__all__ = [
    "DEFAULT_DIR",
    "EVALUATION",
    "TEMPLATES",
    "Beside",
    "Packed",
    "Rows",
    "Tokenizer",
    "batches",
    "encode_prompts",
    "fingerprint",
    "join",
    "load",
    "load_references",
    "make_render",
    "pack",
    "pack_rows",
    "pad",
    "prompt_of",
    "tokenize",
]
