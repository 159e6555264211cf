"""Datasets, prompt templates, the tokenizer, and the pipeline that turns text into batches of tokens.

Files of other people are parsed and not trusted. No code of a dataset, a tokenizer or a model is run. The size of each
file is limited, the content is checked before a library reads the file, and an error names the file. A chat template
runs in Jinja's sandbox, under limits on time and on sizes.

Two dangers remain. A regular expression in tokenizer.json may need hours for a text, because nothing in the process can
stop the tokenizers library. A harmful chat template may use much memory. Use suspicious files only in a container with
limits.

Other packages import from this package, and from the modules `counts`, `encoding`, `jsonl`, `limited` and
`orders`.
"""

from kd_jax.data.assembly import from_ids, tokenize
from kd_jax.data.builder import (
    COLUMNS,
    DEFAULT_DIR,
    EVALUATION,
    SOURCES,
    columns,
    fingerprint,
    load,
    load_references,
    splits,
)
from kd_jax.data.pipeline import batches, encode_prompts, pack, pad, prompt_of
from kd_jax.data.prompts import TEMPLATES, Template, make_render, with_template_end
from kd_jax.data.rows import LineArrays, Packed, Rows, Texts, TokenValues, join, pack_rows
from kd_jax.data.tokenizer import Tokenizer

__all__ = [
    "COLUMNS",
    "DEFAULT_DIR",
    "EVALUATION",
    "SOURCES",
    "TEMPLATES",
    "LineArrays",
    "Packed",
    "Rows",
    "Template",
    "Texts",
    "TokenValues",
    "Tokenizer",
    "batches",
    "columns",
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
