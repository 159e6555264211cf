"""The readers: for each a folder of files that it accepts, a strategy that spoils some of them, and what reads them."""

import gzip
import json
import struct
import zlib
from pathlib import Path

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from hypothesis import strategies as st

from kd_jax import models
from kd_jax.data import builder, jsonl, text
from tests.fuzz.mutations import below, changed_bytes, documents, pick
from tests.fuzz.readers_of_text import Template, TokenizerFiles

TINY = Path(__file__).parent.parent / "golden" / "hf_tiny"


class Safetensors:
    """The header of a safetensors file, and the bytes around it."""

    share = 0.2

    def base(self, folder):
        model = models.from_config(
            models.ModelConfig(family="llama", vocab_size=16, hidden_size=8, num_layers=1, num_heads=2)
        )
        ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), model.abstract_params())
        models.save_pretrained(folder / "one", model, ones)
        models.save_pretrained(folder / "several", model, ones, max_shard_bytes=3000)

    def inputs(self, folder):
        file = folder / "one" / "model.safetensors"
        return self._file(file).map(lambda content: {"one/model.safetensors": content})

    @staticmethod
    @st.composite
    def _file(draw, file):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        text = draw(documents(header, keys=(*header, "dtype", "shape", "data_offsets", "__metadata__"), values=_RANGES))
        wrong = (0, 1, 7, 100, len(text) - 1, len(text) + 1, len(text) + len(data) + 1, 10**8, 2**32, 2**63, 2**64 - 1)
        said = len(text) if below(draw, 4) else max(0, pick(draw, wrong))
        if not below(draw, 4):
            data = (data[: below(draw, len(data))], data + b"\0" * below(draw, 9), b"", data[:-4])[below(draw, 4)]
        content = struct.pack("<Q", said) + text + data
        return content[: below(draw, 12)] if not below(draw, 50) else content

    def read(self, folder, files):
        model, params = models.load_pretrained(folder / next(iter(files)).partition("/")[0])
        assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(
            lambda leaf: leaf.shape, model.abstract_params()
        )


_RANGES = ([0, 0], [0, 4], [4, 0], [0, 2**63], [16, 8], [8, 16], [8], [0, 2**32], [2**32, 2**32], [10**9, 0])


class Index(Safetensors):
    """model.safetensors.index.json, and now and then the header of a file that it names."""

    share = 0.1

    def inputs(self, folder):
        folder = folder / "several"
        names = sorted(file.name for file in folder.glob("*.safetensors"))
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        keys = (*index["weight_map"], "weight_map", "metadata", "__metadata__")
        paths = (*names, *names, "../one/model.safetensors", "config.json", ".", "nul\x00.safetensors", "x" * 300)
        listed = documents(index, keys=keys, values=paths).map(
            lambda content: {"several/model.safetensors.index.json": content}
        )
        both = st.builds(
            lambda index, content: index | {f"several/{names[0]}": content}, listed, self._file(folder / names[0])
        )
        return st.one_of(listed, listed, both)


class Config:
    """config.json and generation_config.json beside weights that fit the unspoilt ones."""

    share = 0.2
    keys = (
        "model_type", "architectures", "auto_map", "quantization_config", "tie_word_embeddings", "rope_scaling", "rope_parameters",
        "rope_theta", "partial_rotary_factor", "sliding_window", "use_sliding_window", "head_dim", "num_key_value_heads", "layer_types",
        "attention_bias", "mlp_bias", "hidden_act", "activation_function", "n_inner", "n_embd", "hidden_size", "intermediate_size",
        "vocab_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "eos_token_id", "pad_token_id", "bos_token_id",
        "rms_norm_eps", "layer_norm_epsilon", "scale_attn_weights", "add_cross_attention", "torch_dtype",
    )  # fmt: skip
    values = (
        "llama", "gpt2", "qwen2", "qwen3", "mistral", ["LlamaForCausalLM"], "LlamaForCausalLM", {"AutoModel": "modeling.Evil"}, 8, 16, 32, 64, 131,
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
        {"type": "linear", "factor": 2}, {"rope_theta": 1e6}, [1, 2], [1, "a"], ["full_attention"] * 3,
    )  # fmt: skip

    def base(self, folder):
        for family in ("gpt2", "llama", "qwen2", "qwen3"):
            (folder / family).mkdir(parents=True)
            for name in ("config.json", "generation_config.json", "model.safetensors"):
                (folder / family / name).write_bytes((TINY / family / name).read_bytes())

    def inputs(self, folder):
        choices = []
        for family in sorted(file.name for file in folder.iterdir()):
            one, two = (
                documents(json.loads((folder / family / name).read_text()), self.keys, self.values)
                for name in ("config.json", "generation_config.json")
            )
            names = f"{family}/config.json", f"{family}/generation_config.json"
            choices.append(one.map(lambda content, name=names[0]: {name: content}))
            choices.append(st.builds(lambda *pair, names=names: dict(zip(names, pair, strict=True)), one, two))
        return st.one_of(choices)

    read = Safetensors.read


class Jsonl:
    """Rows of JSON, plain or compressed, and plain text."""

    share = 0.15
    row = {"prompt": "a", "response": "bé", "context": "", "output": ["c", "d"]}
    names = ("rows.jsonl", "rows.jsonl.gz", "rows.txt")

    def base(self, folder):
        folder.mkdir(parents=True)
        for name in self.names:
            (folder / name).write_bytes(b"")

    def inputs(self, folder):
        return self._rows(self)

    @staticmethod
    @st.composite
    def _rows(draw, self):
        row = documents(self.row, keys=tuple(self.row))
        lines = [draw(row) for _ in range(1 + below(draw, 3))]
        content = pick(draw, (b"\n", b"\r\n", b"\n\n", b"", b"\r", b" ")).join(lines)
        name = pick(draw, self.names)
        if name.endswith(".gz"):
            if not below(draw, 100):
                content += pick(draw, (b" ", b"\n", b"[")) * 2**25  # a small bomb: 32 MiB in 32 KiB
            # Compressed fast, and without the time in the header, so that an input is the same bytes each time.
            content = gzip.compress(content, 1, mtime=0)
            content = changed_bytes(draw, content) if below(draw, 2) else content
        return {name: content}

    def read(self, folder, files):
        (name,) = files
        if name.endswith(".txt"):
            pieces = text.source(str(folder / name), 0.5)[1]
            assert "".join(row["response"] for split in pieces.values() for row in split()).isascii() in (True, False)
            return
        for row in jsonl.read_references(folder / name, {"prompt": "prompt", "references": "output"}):
            assert all(isinstance(reference, str) for reference in row["references"])
        for rows in jsonl.source(str(folder / name), context_field="context")[1].values():
            for row in rows():
                assert set(row) == {"prompt", "response", "context"}
                "".join(row.values()).encode()


class ArrayRecord:
    """A dataset as tfds has built it: its array_record files, dataset_info.json and features.json."""

    share = 0.05
    place = f"{builder.KdJaxRows.name}/jsonl-0/1.0.0"

    def base(self, folder):
        rows = [{"prompt": f"prompt {i}", "response": "é" * i} for i in range(20)]
        config = builder.RowsConfig(name="jsonl-0", splits={"train": lambda: rows})
        builder.open_builder(str(folder), config).download_and_prepare()

    def inputs(self, folder):
        folder = folder / self.place
        (records,) = (file for file in folder.iterdir() if "array_record" in file.name)
        info, features = (json.loads((folder / name).read_text()) for name in ("dataset_info.json", "features.json"))
        values = (
            "20",
            "19",
            "21",
            "0",
            "-1",
            "9" * 30,
            "../{SPLIT}",
            "{SHARD_X_OF_Y}",
            "tfrecord",
            "validation",
            "os.system",
            20,
        )
        named = lambda name: lambda content: {f"{self.place}/{name}": content}
        return st.one_of(
            self._bytes(records.read_bytes()).map(named(records.name)),
            self._records(records).map(named(records.name)),
            documents(info, ("shardLengths", "filepathTemplate", "name", "splits"), values).map(
                named("dataset_info.json")
            ),
            documents(features, ("pythonClassName", "text", "features"), values).map(named("features.json")),
        )

    @staticmethod
    @st.composite
    def _bytes(draw, content):
        """Changed where there is something: most of a file is filled up with zeros."""
        places = [place for place, byte in enumerate(content) if byte]
        changed = bytearray(content)
        for _ in range(1 + below(draw, 3)):
            changed[pick(draw, places)] = below(draw, 256)
        cut = below(draw, 8)
        return bytes(changed[: below(draw, len(content))] if cut == 0 else changed[: -(2**16)] if cut == 1 else changed)

    @staticmethod
    @st.composite
    def _records(draw, file):
        """Records that are well written, and not what a row is."""
        reader = ArrayRecordReader(str(file))
        records = reader.read_all()
        reader.close()
        for _ in range(1 + below(draw, 2)):
            at = below(draw, len(records))
            records[at] = changed_bytes(draw, records[at])
        records = records[: 18 + below(draw, 3)] + records[: below(draw, 2)]
        path = file.parent / "written"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        content = path.read_bytes()
        path.unlink()
        return content

    def read(self, folder, files):
        made = builder.open_builder(str(folder), builder.RowsConfig(name="jsonl-0"))
        for row in builder.read_back(made, "train"):
            assert set(row) == set(builder.FIELDS) and all(isinstance(value, str) for value in row.values())


READERS = {
    "safetensors": Safetensors(),
    "index": Index(),
    "config": Config(),
    "tokenizer": TokenizerFiles(),
    "template": Template(),
    "jsonl": Jsonl(),
    "array_record": ArrayRecord(),
}


def packed(content):
    """Bytes as a text that a diff can show: Latin-1, or compressed where that is much shorter."""
    small = zlib.compress(content, 9)
    return f"zlib:{small.hex()}" if len(small) * 2 + 100 < len(content) else f"text:{content.decode('latin-1')}"


def unpacked(text):
    kind, _, rest = text.partition(":")
    return zlib.decompress(bytes.fromhex(rest)) if kind == "zlib" else rest.encode("latin-1")
