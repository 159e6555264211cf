"""The readers of a model's folder, for `readers`."""

import json
import struct

import jax
import numpy as np
from hypothesis import strategies as st

from kd_jax import models
from tests.fuzz.mutations import below, documents, pick
from tests.helpers.paths import TINY


class Safetensors:
    """Damages the header of a safetensors file and the bytes around the header."""

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
    """Damages model.safetensors.index.json, and sometimes the header of a file that the index names."""

    share = 0.1

    def inputs(self, folder):
        folder = folder / "several"
        names = sorted(file.name for file in folder.glob("*.safetensors"))
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
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
    """Damages config.json and generation_config.json. The weights fit the undamaged files."""

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
                documents(json.loads((folder / family / name).read_text(encoding="utf-8")), self.keys, self.values)
                for name in ("config.json", "generation_config.json")
            )
            names = f"{family}/config.json", f"{family}/generation_config.json"
            choices.append(one.map(lambda content, name=names[0]: {name: content}))
            choices.append(st.builds(lambda *pair, names=names: dict(zip(names, pair, strict=True)), one, two))
        return st.one_of(choices)

    read = Safetensors.read
