"""Datasets, prompt templates, the tokenizer, and the pipeline that turns text into batches of tokens."""

from kd_jax.data.builder import DEFAULT_DIR, EVALUATION, SOURCES, fingerprint, load, load_references, splits
from kd_jax.data.pipeline import batches, encode_prompts, from_ids, pack, pad, prompt_of, tokenize
from kd_jax.data.prompts import TEMPLATES, Template, make_render, with_template_end
from kd_jax.data.rows import Beside, Packed, Rows, join, pack_rows
from kd_jax.data.tokenizer import Tokenizer

__all__ = [
    "DEFAULT_DIR",
    "EVALUATION",
    "SOURCES",
    "TEMPLATES",
    "Beside",
    "Packed",
    "Rows",
    "Template",
    "Tokenizer",
    "batches",
    "encode_prompts",
    "fingerprint",
    "from_ids",
    "join",
    "load",
    "load_references",
    "make_render",
    "pack",
    "pack_rows",
    "pad",
    "prompt_of",
    "splits",
    "tokenize",
    "with_template_end",
]
