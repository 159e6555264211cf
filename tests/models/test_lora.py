"""Low-rank factors: logits and gradients of PEFT, adapters in PEFT's format, targets, dropout, and refused adapters."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from kd_jax import models
from kd_jax.models import int8, lora, peft, trained
from tests.helpers.paths import ROOT

GOLDEN = ROOT / "tests" / "golden" / "lora"
BASES = {"q_v": GOLDEN / "base", "all_linear": GOLDEN / "base", "embeddings": GOLDEN / "base"}
BASES["fused"] = ROOT / "tests" / "golden" / "hf_tiny" / "gpt2"


def opened(name, **options):
    """Returns the base model, its parameters, the adapter, and the adapter's arrays."""
    model, base = models.load_pretrained(BASES[name], **options)
    adapter = peft.open_adapter(GOLDEN / name, model, str(BASES[name]), "student.lora.path")
    return model, base, adapter, jax.tree.map(jnp.asarray, adapter.read())


def close(found, expected, share=1e-4):
    assert np.abs(found - expected).max() < share * expected.std()


@pytest.mark.parametrize("name", sorted(BASES))
def test_an_adapter_gives_the_logits_of_peft_and_so_does_the_merged_model(name, tmp_path):
    model, base, adapter, arrays = opened(name)
    expected = np.load(GOLDEN / name / "expected.npz")
    params = adapter.lora.join(arrays, base)
    close(model.logits(params, expected["input_ids"]), expected["logits"])
    assert np.abs(model.logits(base, expected["input_ids"]) - expected["logits"]).max() > 0.1 * expected["logits"].std()
    models.save_pretrained(tmp_path / "merged", model, params)
    merged = models.load_pretrained(tmp_path / "merged")[1]
    close(model.logits(merged, expected["input_ids"]), expected["logits"])


@pytest.mark.parametrize("name", ["q_v", "all_linear"])
def test_the_factors_have_the_gradients_of_peft(name):
    model, base, adapter, arrays = opened(name)
    expected = np.load(GOLDEN / name / "expected.npz")
    tokens = expected["input_ids"]

    def cross_entropy(arrays):
        log_q = jax.nn.log_softmax(model.logits(adapter.lora.join(arrays, base), tokens)[:, :-1])
        return -jnp.take_along_axis(log_q, tokens[:, 1:, None], axis=-1).mean()

    loss, gradient = jax.value_and_grad(cross_entropy)(arrays)
    np.testing.assert_allclose(loss, expected["cross_entropy"], rtol=1e-5)
    names, compared = trained.modules(model), 0
    for path, found in flatten_dict(gradient, sep="/").items():
        matrix, factor = path.rsplit("/", 1)
        key = f"grad/base_model.model.{names[matrix]}.lora_{factor[-1].upper()}.weight"
        if key in expected:
            np.testing.assert_allclose(found.T, expected[key], atol=1e-5 * np.abs(expected[key]).max())
            compared += 1
    assert compared >= 8


@pytest.mark.parametrize("name", sorted(BASES))
def test_a_written_adapter_has_the_tensors_that_peft_wrote(name, tmp_path):
    model, _, adapter, arrays = opened(name)
    peft.save_adapter(tmp_path / "adapter", adapter.lora, arrays, model, str(BASES[name]))
    theirs = load_file(GOLDEN / name / peft.WEIGHTS)
    theirs = {key: array for key, array in theirs.items() if "base_layer" not in key}
    ours = load_file(tmp_path / "adapter" / peft.WEIGHTS)
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        np.testing.assert_array_equal(ours[key], array)
    again = peft.open_adapter(tmp_path / "adapter", model, str(BASES[name]), "k")
    assert again.lora == adapter.lora
    fields, expected = (
        json.loads((folder / peft.ADAPTER).read_text()) for folder in (tmp_path / "adapter", GOLDEN / name)
    )
    for field in ("r", "lora_alpha", "use_rslora", "bias", "peft_type", "task_type"):
        assert fields[field] == expected[field]


def test_the_names_of_targets_are_short_only_if_they_name_nothing_else(tmp_path):
    model = models.load_pretrained(BASES["q_v"])[0]
    write = lambda patterns: _targets_on_disk(model, patterns, tmp_path / "-".join(patterns).replace("/", "_"))
    assert write(["q_proj", "v_proj"]) == ["q_proj", "v_proj"]
    assert write(["layers/1/attention/query"]) == ["model.layers.1.self_attn.q_proj"]


def _targets_on_disk(model, patterns, folder):
    part = models.Lora(2, 4.0, 0.0, False, trained.find_targets(patterns, model))
    peft.save_adapter(folder, part, part.init(jax.random.key(0), model), model, "")
    assert peft.open_adapter(folder, model, "", "k").lora == part
    return json.loads((folder / peft.ADAPTER).read_text())["target_modules"]


def test_a_part_of_a_fused_matrix_is_written_with_zeros_for_the_others(tmp_path):
    model, base = models.load_pretrained(BASES["fused"])
    part = models.Lora(2, 4.0, 0.0, False, trained.find_targets(["attention/key"], model))
    arrays = jax.tree.map(lambda x: x + 0.1, part.init(jax.random.key(0), model))
    peft.save_adapter(tmp_path / "adapter", part, arrays, model, "")
    found = peft.open_adapter(tmp_path / "adapter", model, "", "k")
    tokens = jnp.arange(8)[None]
    same = model.logits(found.lora.join(found.read(), base), tokens)
    np.testing.assert_allclose(same, model.logits(part.join(arrays, base), tokens), atol=1e-5)
    assert len(found.lora.owners) == 3 * len(part.owners)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("all-linear", 14),
        ("q_proj", 2),
        ("self_attn.q_proj", 2),
        ("attention/query", 2),
        ("layers/0/*", 7),
        ("lm_head", 1),
    ]
    + [(r"model\.layers\.1\..*_proj", 7), ("embed_tokens", 1), (r".*/(query|value)/kernel", 4)],
)
def test_targets_are_names_of_peft_or_patterns_of_paths(pattern, count):
    assert len(trained.find_targets([pattern], models.load_pretrained(BASES["q_v"])[0])) == count


def test_a_target_that_matches_nothing_is_refused_with_the_names():
    with pytest.raises(
        ValueError, match=r"'c_attn'.*self_attn.q_proj, self_attn.k_proj.*layers/0/attention/query/kernel"
    ):
        trained.find_targets(["q_proj", "c_attn"], models.load_pretrained(BASES["q_v"])[0])
    with pytest.raises(ValueError, match="tied"):
        trained.find_targets(["lm_head"], models.load_pretrained(BASES["fused"])[0])


def test_frozen_parameters_are_chosen_by_pattern():
    model = models.load_pretrained(BASES["q_v"])[0]
    part = models.Chosen.of("embed.*|head.*", model)
    assert part.frozen == {"embed/embedding", "head/kernel"} and not part.has_gradient("head/kernel")
    assert models.Chosen.of("layers/0/*", model).frozen == models.Chosen.of(r"layers/0/.*", model).frozen
    for pattern, fault in (("lm_head*", "matches no parameter"), ("*", "every parameter")):
        with pytest.raises(ValueError, match=f"{fault}.*layers/0/mlp/up/kernel"):
            models.Chosen.of(pattern, model)


@pytest.mark.parametrize("options", [dict(matrices_in_int8=True), dict(dtype="bfloat16")])
def test_a_base_in_another_type_is_the_model_of_the_rounded_base(options):
    base = opened("all_linear", **options)[1]
    model, _, adapter, arrays = opened("all_linear")
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), models.dequantise(base, jnp.float32))
    tokens = jnp.arange(24).reshape(2, 12)
    loss = lambda arrays, base: jnp.square(model.logits(adapter.lora.join(arrays, base), tokens)).mean()
    ours, theirs = (jax.jit(jax.value_and_grad(loss))(arrays, tree) for tree in (base, rounded))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


def test_the_backward_pass_keeps_int8_and_not_its_conversion():
    matrix = int8.quantise(jax.random.normal(jax.random.key(0), (64, 48)))
    numbers = (((1,), (0,)), ((), ()))
    x = jnp.ones((3, 64))
    kept = jax.eval_shape(lambda x: jax.vjp(lambda x: lora.product(x, lora.FrozenMatrix(matrix), numbers), x)[1], x)
    types = {leaf.dtype for leaf in jax.tree.leaves(kept) if leaf.shape == (64, 48)}
    assert types == {jnp.dtype("int8")}


def test_dropout_changes_entries_of_the_input_of_the_first_factor_alone():
    numbers, size = (((2,), (0,)), ((), ())), 4096
    x = jnp.ones((2, 1, size))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(2))
    matrix = lora.FrozenMatrix(jnp.zeros((size, size)), jnp.eye(size), jnp.eye(size), keys, dropout=0.25)
    found = np.asarray(lora.product(x, matrix, numbers))
    np.testing.assert_allclose(np.unique(found), [0, 1 / 0.75], rtol=1e-6)
    assert abs((found == 0).mean() - 0.25) < 0.03 and (found[0] != found[1]).any()
    alone = lora.product(x[1:], matrix.replace(row_keys=keys[1:]), numbers)
    np.testing.assert_array_equal(alone, found[1:])
    assert (lora.product(x, matrix.replace(index=1), numbers) != found).any()
    np.testing.assert_array_equal(lora.product(x, matrix.replace(lora_b=jnp.zeros((size, size))), numbers), 0 * x)


# --- refused adapters


def broken(tmp_path, name="q_v", tensors=lambda tensors: tensors, **fields):
    """Returns an adapter with changed fields or tensors."""
    shutil.copytree(GOLDEN / name, tmp_path / "adapter")
    file = tmp_path / "adapter" / peft.ADAPTER
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    weights = tmp_path / "adapter" / peft.WEIGHTS
    save_file(tensors(load_file(weights)), weights)
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(use_dora=True), "use_dora.*True.*not implemented"),
        (dict(rank_pattern={"q_proj": 8}), "rank_pattern"),
        (dict(alpha_pattern={"q_proj": 8}), "alpha_pattern"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save.*lm_head"),
        (dict(bias="all"), "bias='all'"),
        (dict(layers_to_transform=[0]), "layers_to_transform"),
        (dict(init_lora_weights="pissa"), "pissa"),
        (dict(peft_type="LOHA"), "LOHA"),
        (dict(something_new=3), "something_new"),
        (dict(base_model_name_or_path="meta-llama/Llama-2-7b"), "Llama-2-7b.*student.path"),
        (dict(r=8), "shape"),
        (dict(r="four"), "r='four'"),
        (dict(target_modules=["q_proj", "k_proj"]), "k_proj.*no tensors"),
        (dict(target_modules=["c_attn"]), "c_attn.*matches no matrix"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused_by_name(fields, message, tmp_path):
    model = models.load_pretrained(BASES["q_v"])[0]
    with pytest.raises(ValueError, match=message):
        peft.open_adapter(broken(tmp_path, **fields), model, str(BASES["q_v"]), "student.lora.path")


def test_an_adapter_with_other_tensors_is_refused(tmp_path):
    model = models.load_pretrained(BASES["q_v"])[0]
    cases = {
        "is missing": lambda tensors: dict(list(tensors.items())[1:]),
        "c_attn": lambda tensors: tensors | {"base_model.model.c_attn.lora_A.weight": np.zeros((4, 4), np.float32)},
        "no tensors in": lambda tensors: {key: array for key, array in tensors.items() if "layers.1" not in key},
    }
    for message, change in cases.items():
        folder = broken(tmp_path / message.replace(" ", "_"), tensors=change)
        with pytest.raises(ValueError, match=message):
            peft.open_adapter(folder, model, "", "student.lora.path")
    with pytest.raises(ValueError, match="another model"):
        peft.open_adapter(GOLDEN / "q_v", models.load_pretrained(BASES["fused"])[0], "", "student.lora.path")
    with pytest.raises(ValueError, match=f"no {peft.ADAPTER}"):
        peft.open_adapter(GOLDEN / "base", model, "", "student.lora.path")


@pytest.mark.parametrize("family", ["gpt_neox", "phi3", "mixtral", "opt_350m", "olmo2"])
def test_every_family_takes_factors_whose_product_is_that_of_the_tensors_on_disk(family, tmp_path):
    """Also for parameters that alternate with others in the columns of one tensor. Experts get no factors."""
    model, base = models.load_pretrained(ROOT / "tests" / "golden" / "hf_tiny" / family)
    part = trained.Lora(2, 4.0, 0.0, False, trained.find_targets(["all-linear"], model))
    keys = iter(jax.random.split(jax.random.key(0), 500))
    arrays = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), part.init(jax.random.key(1), model))
    tokens = np.arange(1, 13)[None]
    params = part.join(arrays, base)
    merged = jax.tree.map(lora.merged, params, is_leaf=lambda leaf: isinstance(leaf, lora.FrozenMatrix))
    close(model.logits(params, tokens), np.asarray(model.logits(merged, tokens)))
    peft.save_adapter(tmp_path / "adapter", part, arrays, model, family)
    read = peft.open_adapter(tmp_path / "adapter", model, family, "student.lora.path")
    assert read.lora.owners == part.owners
    jax.tree.map(np.testing.assert_array_equal, read.read(), jax.device_get(arrays))
    models.save_pretrained(tmp_path / "before", model, base)
    models.save_pretrained(tmp_path / "after", model, params)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    factors = load_file(tmp_path / "adapter" / peft.WEIGHTS)
    for key in factors:
        if key.endswith("lora_A.weight"):
            name = key.removeprefix(peft.PREFIX).replace(".lora_A", "")
            product = part.scale * factors[key.replace("lora_A", "lora_B")] @ factors[key]
            np.testing.assert_allclose(after[name], before[name] + product, atol=1e-5)
    assert len(factors) >= 8
