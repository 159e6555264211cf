"""The readers. Each has a folder of valid files, a strategy that damages some of them, and the reading function."""

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
