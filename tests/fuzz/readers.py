"""The readers: for each a folder of files that it accepts, a strategy that spoils some of them, and what reads them."""

from tests.fuzz.readers_of_caches import TeacherCache
from tests.fuzz.readers_of_models import Config, Index, Safetensors
from tests.fuzz.readers_of_rows import ArrayRecord, Jsonl
from tests.fuzz.readers_of_text import Template, TokenizerFiles

READERS = {
    "safetensors": Safetensors(),
    "index": Index(),
    "config": Config(),
    "tokenizer": TokenizerFiles(),
    "template": Template(),
    "jsonl": Jsonl(),
    "array_record": ArrayRecord(),
    "teacher_cache": TeacherCache(),
}
