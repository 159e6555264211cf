"""Hugging Face folders: exact loading and saving, loading slice by slice, and an error for every misfit."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from kd_jax import models, sharding
from kd_jax.models.families.rotary_fields import rotary_from_hf
from kd_jax.models.rotary import Llama3Scaling, rotary_frequencies
from kd_jax.models.safetensors_io import Reader
from tests.helpers.paths import TINY

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")


def assert_same(one, other):
    assert jax.tree.map(lambda leaf: leaf.dtype, one) == jax.tree.map(lambda leaf: leaf.dtype, other)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other)


def random_params(model):
    """Returns random parameters, biases and scales included, without a compilation."""
    numbers = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(numbers.normal(size=leaf.shape), leaf.dtype), model.abstract_params())


def on_disk(folder):
    """Returns every tensor in the files of a folder."""
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


@pytest.fixture
def copy(tmp_path):
    """A function that copies the folder of a tiny model, so that a test can damage the copy."""

    def make(family):
        return Path(shutil.copytree(TINY / family, tmp_path / family))

    return make


def edit_config(folder, **changes):
    file = folder / "config.json"
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in fields.items() if value != "absent"}))


def edit_tensors(folder, edit):
    save_file(edit(load_file(folder / "model.safetensors")), folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_transformers_is_written_again_as_it_was(family, tmp_path):
    model, params = models.load_pretrained(TINY / family)
    models.save_pretrained(tmp_path / "again", model, params)
    theirs, ours = on_disk(TINY / family), on_disk(tmp_path / "again")
    assert theirs.keys() == ours.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype, name
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    with safe_open(tmp_path / "again" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    fields = json.loads((TINY / family / "config.json").read_text())
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    for name in set(fields) & set(written) - {"n_inner"}:
        assert written[name] == fields[name], name
    assert written["torch_dtype"] == "float32"
    assert models.load_config(tmp_path / "again") == model.config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_for_bit(family, dtype, tied, tmp_path):
    config = models.ModelConfig(
        family=family,
        vocab_size=29,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4 if family == "gpt2" else 2,
        head_dim=8 if family == "qwen3" else 0,
        attention_bias=None if family in ("gpt2", "qwen2") else not tied,
        output_bias=None if family in ("gpt2", "qwen2") else not tied,
        mlp_bias=True if family == "llama" else None,
        rope_theta=10000.0 if family == "gpt2" else 777.0,
        rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 512) if family == "llama" else None,
        tie_embeddings=tied,
        bos_id=1,
        eos_id=(2, 3),
    )
    model = models.from_config(config, dtype, dtype)
    params = random_params(model)
    models.save_pretrained(tmp_path / "whole", model, params)
    models.save_pretrained(tmp_path / "parts", model, params, max_shard_bytes=2000)
    assert (tmp_path / "whole" / "model.safetensors").exists()
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    files = {file.name for file in (tmp_path / "parts").glob("model-*.safetensors")}
    assert len(files) > 2 and set(index["weight_map"].values()) == files
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in on_disk(tmp_path / "whole").values())
    for name in ("whole", "parts"):
        loaded, read = models.load_pretrained(tmp_path / name, dtype=dtype)
        assert loaded == model
        assert_same(read, params)
    _, wide = models.load_pretrained(tmp_path / "parts")
    assert_same(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
    assert ("lm_head.weight" in on_disk(tmp_path / "whole")) is not tied


def test_the_type_on_disk_can_be_chosen(tmp_path):
    model, params = models.load_pretrained(TINY / "llama")
    models.save_pretrained(tmp_path / "half", model, params, dtype=jnp.bfloat16)
    assert {array.dtype for array in on_disk(tmp_path / "half").values()} == {jnp.dtype(jnp.bfloat16)}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    _, read = models.load_pretrained(tmp_path / "half", dtype=jnp.bfloat16)
    assert_same(read, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_shards_are_read_where_they_go_and_no_further(family, tmp_path, monkeypatch):
    devices = jax.devices()[:4]
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=axes, devices=devices)

    def shardings(tree):
        def place(leaf):
            spec = [axis if size % 2 == 0 else None for axis, size in zip(mesh.axis_names, leaf.shape, strict=False)]
            return jax.sharding.NamedSharding(mesh, jax.P(*spec))

        return jax.tree.map(place, tree)

    model, whole = models.load_pretrained(TINY / family)
    models.save_pretrained(tmp_path / "parts", model, whole, max_shard_bytes=50_000)
    reads, read = [], Reader.read

    def recorded(self, name, index):
        found = read(self, name, index)
        reads.append((name, found.size / np.prod(self.shape(name))))
        return found

    monkeypatch.setattr(Reader, "read", recorded)
    _, params = models.load_pretrained(tmp_path / "parts", shardings=shardings)
    assert_same(params, whole)
    kernel = params["layers"]["1"]["attention"]["query"]["kernel"]
    assert kernel.sharding == jax.sharding.NamedSharding(mesh, jax.P("fsdp", "tensor"))
    assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 4}
    # c_attn holds three parameters, so a quarter of one parameter is a twelfth of the tensor.
    share = 1 / 12 if family == "gpt2" else 1 / 4
    fused = [size for name, size in reads if "c_attn.weight" in name or "q_proj.weight" in name]
    assert len(fused) >= 12
    np.testing.assert_allclose(fused, share)
    assert max(size for name, size in reads if "mlp" in name and "weight" in name) <= 1 / 4


def test_a_slice_that_several_devices_hold_is_read_once(monkeypatch):
    mesh = sharding.make_mesh(4, 1, 2)
    reads, read = [], Reader.read

    def recorded(self, name, index):
        reads.append((name, str(index)))
        return read(self, name, index)

    monkeypatch.setattr(Reader, "read", recorded)
    _, params = models.load_pretrained(TINY / "llama", shardings=lambda tree: sharding.tree_shardings(mesh, tree))
    assert len(reads) == len(set(reads)) > len(jax.tree.leaves(params))


def test_saving_leaves_a_whole_folder_or_none(tmp_path):
    model, params = models.load_pretrained(TINY / "qwen2")

    class Tokenizer:
        def save(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    class Broken:
        def save(self, folder):
            assert (folder / "model.safetensors").exists()
            raise KeyboardInterrupt

    target = tmp_path / "some" / "folder"
    with pytest.raises(KeyboardInterrupt):
        models.save_pretrained(target, model, params, Broken())
    assert list(target.parent.iterdir()) == []
    target.mkdir()  # an empty folder is allowed
    models.save_pretrained(target, model, params, Tokenizer())
    assert {file.name for file in target.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert list(target.parent.iterdir()) == [target]
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        models.save_pretrained(target, model, params)


def test_saving_refuses_the_parameters_of_another_model(tmp_path):
    model, params = models.load_pretrained(TINY / "qwen2")
    student, taken = models.take_layers(model, params, [0])
    with pytest.raises(ValueError, match=r"'layers/1/.*' has shape None; the model's config asks for \(\d+,\)"):
        models.save_pretrained(tmp_path / "x", model, taken)
    with pytest.raises(ValueError, match=r"'layers/1/.*' has shape \(\d+,\); the model's config asks for None"):
        models.save_pretrained(tmp_path / "x", student, params)
    assert list(tmp_path.iterdir()) == []


def test_both_spellings_of_the_rotary_embedding_are_one(copy):
    folder = copy("llama")
    long = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    long |= {"original_max_position_embeddings": 32}
    for kind in ("rope_type", "type"):
        edit_config(folder, rope_parameters="absent", rope_theta=500.0, rope_scaling={kind: "llama3"} | long)
        classic = models.load_config(folder)
        edit_config(folder, rope_theta="absent", rope_scaling="absent")
        edit_config(folder, rope_parameters={"rope_type": "llama3", "rope_theta": 500.0} | long)
        assert models.load_config(folder) == classic
    assert classic.rope_theta == 500.0 and classic.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 32)
    edit_config(folder, rope_parameters="absent")
    assert models.load_config(folder).rope_theta == 10000.0  # the base of the first Llama, whose config names no base


def test_a_field_that_a_rotary_embedding_lacks_is_named_with_the_embedding():
    scaling = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    with pytest.raises(ValueError, match=r"the field 'factor' is missing; an object such as \{.*'llama3'"):
        rotary_from_hf({"model_type": "llama", "rope_scaling": scaling})


L3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
PLAIN, LLAMA3 = {"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "llama3", **L3}
# Changes of config.json -> the base, the length before the scaling (0 means no scaling), and frequencies 1 and 2 of
# transformers 5.24 in a head of 16.
ROTARIES = {
    "rope_scaling is used, and the base of rope_parameters is not": (
        {"rope_parameters": PLAIN, "rope_scaling": LLAMA3}, 1e4, 32, (0.095840, 0.0125),
    ),
    "the base at the top level goes with rope_scaling": (
        {"rope_theta": 2e4, "rope_parameters": PLAIN, "rope_scaling": LLAMA3}, 2e4, 32, (0.076580, 0.010511),
    ),
    "a base in rope_scaling comes before the top level": (
        {"rope_theta": 2e4, "rope_scaling": {**LLAMA3, "rope_theta": 3e4}}, 3e4, 32, (0.066928, 0.009498),
    ),
    "a base in rope_parameters comes before the top level": (
        {"rope_theta": 2e4, "rope_parameters": PLAIN}, 5e5, 0, (0.193923, 0.037606),
    ),
    "rope_scaling of the default type is used, too": (
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "rope_scaling": {"rope_type": "default"}}, 1e4, 0, (0.316228, 0.1),
    ),
    "an empty rope_scaling is none": (
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "rope_scaling": {}}, 5e5, 32, (0.024240, 0.004701),
    ),
    "rope_type comes before type": ({"rope_scaling": {**LLAMA3, "type": "linear"}}, 1e4, 32, (0.095840, 0.0125)),
    "rope_type comes before type, and is the default": (
        {"rope_scaling": {**LLAMA3, "type": "llama3", "rope_type": "default"}}, 1e4, 0, (0.316228, 0.1),
    ),
    "the original length at the top level comes first": (
        {"original_max_position_embeddings": 16, "rope_scaling": LLAMA3}, 1e4, 16, (0.039528, 0.0125),
    ),
    "the original length is the model's own where none is named": (
        {"rope_scaling": {name: LLAMA3[name] for name in LLAMA3 if name[0] != "o"}}, 1e4, 64, (0.244385, 0.013042),
    ),
    "what a rope_scaling replaces is not read": (
        {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}, "rope_scaling": LLAMA3}, 1e4, 32, (0.095840, 0.0125),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROTARIES)
def test_the_rotary_embedding_is_read_as_transformers_reads_it(case, copy):
    fields, base, original, frequencies = ROTARIES[case]
    folder = copy("llama")
    edit_config(folder, **({"rope_parameters": "absent", "max_position_embeddings": 64, "head_dim": 16} | fields))
    config = models.load_config(folder)
    assert config.rope_theta == base
    assert (config.rope_scaling.original_max_positions if config.rope_scaling else 0) == original
    np.testing.assert_allclose(rotary_frequencies(config.rotary, config.head_dim)[1:3], frequencies, atol=1e-6)


def test_both_spellings_of_gpt2_are_read_and_the_common_one_comes_first(copy):
    folder = copy("gpt2")
    config = models.load_config(folder)
    edit_config(folder, n_head="absent", num_attention_heads=config.num_heads)
    assert models.load_config(folder) == config
    edit_config(folder, n_head=1)  # transformers 5.24 ignores n_head beside num_attention_heads
    assert models.load_config(folder) == config


def test_the_ending_ids_of_generation_config_win(copy):
    folder = copy("llama")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7], "pad_token_id": 0}')
    config = models.load_config(folder)
    assert (config.bos_id, config.eos_id, config.pad_id) == (1, (2, 7), 0)
    (folder / "generation_config.json").unlink()
    assert models.load_config(folder).eos_id == 2


MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
QWEN = {"use_sliding_window": True, "max_window_layers": 1, "layer_types": "absent"}
# The first four logits of transformers 5.24 after tokens 3, 10, 17, ... of the tiny models, with a window of 8.
WINDOWED = {
    "llama": (MISTRAL, {8: (-1.08393, -0.01537, -0.24739, -2.50973), 9: (-0.40025, -0.36044, 0.44171, 0.07763)}),
    "qwen2": (QWEN, {8: (-1.45906, 2.68392, -0.1252, -1.16806), 9: (0.61307, 0.93987, 1.15848, 0.35881)}),
}


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_is_computed_and_kept(family, copy, tmp_path):
    changes, expected = WINDOWED[family]
    folder = copy(family)
    edit_config(folder, sliding_window=8, **changes)
    model, params = models.load_pretrained(folder)
    tokens = (jnp.arange(9) * 7 + 3)[None]
    logits = model.logits(params, tokens)[0]
    for length, values in expected.items():
        np.testing.assert_allclose(logits[length - 1, :4], values, atol=2e-5)

    # A student of the layers 0, 2, 1, 2 is saved with the window, although layer 0 has no window in Qwen2.
    student, taken = models.take_layers(model, params, [0, 2, 1, 2])
    models.save_pretrained(tmp_path / "student", student, taken)
    again, read = models.load_pretrained(tmp_path / "student")
    assert again == student and again.config.sliding_window == 8
    assert_same(read, taken)
    fields = json.loads((tmp_path / "student" / "config.json").read_text())
    assert fields["sliding_window"] == 8
    if family == "llama":
        assert (fields["model_type"], fields["architectures"]) == ("mistral", ["MistralForCausalLM"])
        assert again.config.layers_with_window == {0, 1, 2, 3}
    else:
        assert (fields["model_type"], fields["use_sliding_window"], fields["max_window_layers"]) == ("qwen2", True, 1)
        assert fields["layer_types"] == ["full_attention"] + 3 * ["sliding_attention"]
        first, _ = models.take_layers(model, params, [0, 0])
        assert first.config.sliding_window is None


# Changes of config.json -> the window, and which of the three layers have the window.
WINDOWS = {
    "Mistral's default": ("llama", MISTRAL, 4096, {0, 1, 2}),
    "null": ("llama", MISTRAL | {"sliding_window": None}, None, set()),
    "Mistral has no use_sliding_window": (
        "llama", MISTRAL | {"sliding_window": 9, "use_sliding_window": False}, 9, {0, 1, 2},
    ),
    "a Llama has no window": ("llama", {"sliding_window": 9}, None, set()),
    "Qwen's default": ("qwen2", QWEN | {"sliding_window": "absent"}, 4096, {1, 2}),
    "not used": ("qwen3", {"sliding_window": 9, "max_window_layers": 0, "layer_types": "absent"}, None, set()),
    "from layer 28 on": ("qwen3", QWEN | {"sliding_window": 9, "max_window_layers": "absent"}, None, set()),
    "null is not used": ("qwen2", QWEN | {"sliding_window": None}, None, set()),
    "the layers' types come first": (
        "qwen3", QWEN | {"sliding_window": 9, "layer_types": ["sliding_attention"] + 2 * ["full_attention"]}, 9, {0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WINDOWS)
def test_the_window_is_read_as_transformers_reads_it(case, copy):
    family, fields, window, layers = WINDOWS[case]
    folder = copy(family)
    plain = models.load_config(folder)
    edit_config(folder, **fields)
    config = models.load_config(folder)
    assert (config.sliding_window, config.layers_with_window) == (window, layers)
    assert window is not None or dataclasses.replace(config, family=family) == plain


def test_what_checkpoints_carry_besides_is_passed_over(copy):
    folder = copy("gpt2")
    model, params = models.load_pretrained(folder)

    def like_the_first_gpt2(tensors):
        bare = {name.removeprefix("transformer."): array for name, array in tensors.items()}
        return bare | {
            "h.0.attn.bias": np.ones((1, 1, 64, 64), np.uint8),
            "h.2.attn.masked_bias": np.float32([-1e4]),
        }

    edit_tensors(folder, like_the_first_gpt2)
    assert_same(models.load_pretrained(folder)[1], params)

    folder = copy("qwen2")
    _, params = models.load_pretrained(folder)
    inverse = {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)}
    edit_tensors(folder, lambda tensors: tensors | inverse | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert_same(models.load_pretrained(folder)[1], params)


CONFIG_ERRORS = [
    (
        "llama",
        {"model_type": "mamba"},
        "model_type 'mamba' is not supported; supported: gemma2, .*, llama, ",
    ),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, r"expected \['LlamaForCausalLM'\]"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is set"),
    ("llama", {"hidden_size": "absent"}, "'hidden_size' is missing"),
    ("llama", {"num_hidden_layers": "3"}, "num_hidden_layers = '3' is not supported; expected a whole number"),
    (
        "llama",
        {"num_attention_heads": 5, "head_dim": "absent"},
        "hidden_size=48 does not divide by num_heads=5",
    ),
    ("llama", {"hidden_act": "relu2"}, "unknown activation 'relu2'"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "proportional", "factor": 4.0}},
        "rope_type 'proportional' in rope_parameters = .* expected rope_type 'default', 'linear', .* or 'llama3'",
    ),
    ("llama", {"rope_parameters": "absent", "rope_scaling": {"type": "linear"}}, "'factor' is missing.*'linear'"),
    (
        "llama",
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "full_attention.*not supported",
    ),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor' is missing"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "axial", "factor": 2.0}},
        "rope_type 'axial' in rope_scaling",
    ),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ("llama", {"is_causal": False}, "is_causal = False is not supported; expected true"),
    ("gpt2", {"per_layer_config": {"0": {"n_inner": 8}}}, "per_layer_config"),
    (
        "llama",
        MISTRAL | {"attention_bias": True},
        "attention_bias = True is not supported; expected false in a mistral config",
    ),
    ("llama", MISTRAL | {"sliding_window": 0}, "sliding_window = 0 is not supported; expected null, or at least 1"),
    ("llama", MISTRAL | {"layer_types": 3 * ["sliding_attention"]}, "layer_types"),
    ("qwen2", {"layer_types": 3 * ["sliding_attention"]}, "layer_types = .*'full_attention' in every layer if"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types = .*a type for each of the 3 layers"),
    ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
    ("qwen3", {"head_dim": "absent"}, "'head_dim' is missing"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
]


@pytest.mark.parametrize(("family", "changes", "message"), CONFIG_ERRORS)
def test_a_config_that_cannot_be_followed_is_an_error(family, changes, message, copy):
    folder = copy(family)
    models.load_config(folder)
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as error:
        models.load_config(folder)
    assert str(folder / "config.json") in str(error.value)


def without(name):
    return lambda tensors: {kept: array for kept, array in tensors.items() if kept != name}


Q = "model.layers.1.self_attn.q_proj.weight"
TENSOR_ERRORS = [
    ("llama", without(Q), rf"tensor '{Q}' is missing, and 0 more"),
    (
        "llama",
        lambda tensors: tensors | {"model.layers.3.x": np.ones(1, np.float32)},
        "'model.layers.3.x' has no place",
    ),
    (
        "llama",
        lambda tensors: tensors | {Q: np.ones((48, 47), np.float32)},
        rf"'{Q}' has shape \(48, 47\).*\(48, 48\)",
    ),
    (
        "llama",
        lambda tensors: tensors | {Q: np.ones((48, 48), np.int8)},
        rf"'{Q}' has type I8; expected one of F32, F16, BF16, F64. Quantised checkpoints are not supported",
    ),
    (
        "llama",
        lambda tensors: tensors | {Q: np.ones((48, 48), np.int64)},
        rf"'{Q}' has type I64; expected one of F32, F16, BF16, F64. A weight is a floating-point number",
    ),
    ("llama", without("lm_head.weight"), "'lm_head.weight' is missing"),
    (
        "qwen2",
        lambda tensors: tensors | {"lm_head.weight": np.ones((131, 48), np.float32)},
        "differs from 'model.embed",
    ),
    (
        "gpt2",
        lambda tensors: tensors | {"transformer.h.0.attn.c_attn.weight": np.ones((48, 143), np.float32)},
        r"c_attn.weight' has shape \(48, 143\); config.json asks for \(48, 144\)",
    ),
]


@pytest.mark.parametrize(("family", "edit", "message"), TENSOR_ERRORS)
def test_tensors_that_do_not_fit_are_errors(family, edit, message, copy):
    folder = copy(family)
    edit_tensors(folder, edit)
    with pytest.raises(ValueError, match=message) as error:
        models.load_pretrained(folder)
    assert str(folder / "model.safetensors") in str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_in_float64_are_rounded_to_what_is_asked_for(dtype, copy):
    folder = copy("llama")
    edit_tensors(folder, lambda tensors: {name: array.astype(np.float64) + 1e-9 for name, array in tensors.items()})
    _, params = models.load_pretrained(folder, dtype=dtype)
    edit_tensors(folder, lambda tensors: {name: array.astype(np.float32) for name, array in tensors.items()})
    assert_same(params, models.load_pretrained(folder, dtype=dtype)[1])


def cut(folder):
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def rename(folder):
    (folder / "model-00002-of-00003.safetensors").rename(folder / "elsewhere.safetensors")


def edit_index(folder, name, owner):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][name] = owner
    if owner is None:
        del index["weight_map"][name]
    file.write_text(json.dumps(index))


EMBED = "model.embed_tokens.weight"
FILE_ERRORS = [
    (cut, "model-00002-of-00003.safetensors: not a complete safetensors file"),
    (rename, "model-00002-of-00003.safetensors: the file is missing"),
    (
        lambda folder: edit_index(folder, EMBED, "../model.safetensors"),
        "'../model.safetensors'; expected the name",
    ),
    (lambda folder: edit_index(folder, EMBED, "/etc/passwd"), "'/etc/passwd'; expected the name"),
    (lambda folder: edit_index(folder, EMBED, ".."), "'..'; expected the name"),
    (
        lambda folder: edit_index(folder, EMBED, "model-00003-of-00003.safetensors"),
        f"tensor '{EMBED}' is missing",
    ),
    (lambda folder: edit_index(folder, EMBED, None), f"tensor '{EMBED}' is not listed"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "expected a 'weight_map'"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "index.json: not valid JSON"),
    (
        lambda folder: (folder / "config.json").write_text("[]"),
        "config.json: expected a JSON object, found list",
    ),
    (lambda folder: (folder / "config.json").unlink(), "the folder has no config.json"),
    (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        "neither model.safetensors nor model.safet",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), FILE_ERRORS)
def test_damaged_folders_are_errors(spoil, message, tmp_path):
    folder = tmp_path / "model"
    models.save_pretrained(folder, *models.load_pretrained(TINY / "llama"), max_shard_bytes=120_000)
    assert (folder / "model-00003-of-00003.safetensors").exists()
    spoil(folder)
    with pytest.raises(ValueError, match=message) as error:
        models.load_pretrained(folder)
    assert str(folder) in str(error.value)


def test_pickled_weights_are_refused(copy):
    folder = copy("gpt2")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: pickled files can run code.*convert them to safetensors"):
        models.load_pretrained(folder)
