"""Checks that the chunked loss gives the numbers of full logits for every chunk size."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax import assistants, divergences, head_loss, sharding
from kd_jax.head_loss import token_sum
from kd_jax.objectives import cross_entropy, token_loss
from tests.helpers.divergences import call

B, L, V, DS, DT = 2, 5, 11, 3, 4


def arrays(dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    shapes = dict(hs=(B, L, DS), ws=(DS, V), ht=(B, L, DT), wt=(DT, V))
    made = {name: jnp.array(random.normal(size=shape), dtype) for name, shape in shapes.items()}
    coefficient = jnp.array(random.uniform(0.1, 1, (B, L)), dtype).at[0, 1].set(0).at[1, 3:].set(0)
    return made, coefficient, jnp.array(random.integers(0, V, (B, L)))


def full(loss, a, coefficient, *extras):
    log_p, log_q = jax.nn.log_softmax(a["ht"] @ a["wt"]), jax.nn.log_softmax(a["hs"] @ a["ws"])
    return jnp.sum(coefficient * loss(log_p, log_q, *extras))


def chunked(loss, a, coefficient, *extras, chunk=2):
    return token_sum(loss, a["hs"], a["ws"], a["ht"], a["wt"], coefficient, *extras, chunk=chunk)[0]


def every_pair(name):
    """Returns a token loss with one value for each use of a divergence: without an assistant, and with every pair."""

    def loss(log_p, log_q, target):
        divergence = functools.partial(call, name, target=target)
        values = [token_loss(divergence, None, pair)(log_p, log_q) for pair in pairs]
        for mean in assistants.__all__:
            mix = functools.partial(getattr(assistants, mean), **({"alpha": -3.0} if mean == "alpha_mixture" else {}))
            for pair in with_assistant:
                values.append(token_loss(divergence, mix, pair)(log_p, log_q, 0.3))
        return jnp.stack(values, axis=-1)

    pairs = [("teacher", "student"), ("student", "teacher")]
    with_assistant = [p for other in ("teacher", "student") for p in (("assistant", other), (other, "assistant"))]
    return len(pairs) + len(assistants.__all__) * len(with_assistant), loss


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-12), pytest.param("float32", 1e-6, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", divergences.__all__)
def test_value_and_gradient_are_those_of_full_logits(name, dtype, tolerance):
    ways, loss = every_pair(name)
    with jax.enable_x64(dtype == "float64"):
        a, coefficient, target = arrays(dtype)

        def of_full(a, coefficient, target):
            log_p, log_q = jax.nn.log_softmax(a["ht"] @ a["wt"]), jax.nn.log_softmax(a["hs"] @ a["ws"])
            return jnp.sum(coefficient * loss(log_p, log_q, target))

        expected, found = (jax.jit(jax.value_and_grad(f)) for f in (of_full, functools.partial(chunked, loss)))
        for way in range(ways):  # one compiled program, whose coefficients select the use
            chosen = jnp.zeros((B, L, ways), dtype).at[..., way].set(coefficient)
            (value, gradient), (true, true_gradient) = (f(a, chosen, target) for f in (found, expected))
            np.testing.assert_allclose(value, true, rtol=tolerance, err_msg=f"way {way}")
            for array in ("hs", "ws"):
                off, size = map(np.linalg.norm, (gradient[array] - true_gradient[array], true_gradient[array]))
                assert off <= tolerance * size, (way, array, off, size)
            assert not np.any(gradient["ht"]) and not np.any(gradient["wt"])


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 64, None])
def test_no_chunk_changes_the_numbers(chunk):
    a, coefficient, _ = arrays()
    loss = token_loss(divergences.jensen_shannon)
    expected, expected_gradient = jax.value_and_grad(functools.partial(full, loss))(a, coefficient)
    found, gradient = jax.value_and_grad(functools.partial(chunked, loss, chunk=chunk))(a, coefficient)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    np.testing.assert_allclose(gradient["ws"], expected_gradient["ws"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("all_count", [True, False])
def test_slots_without_a_token_do_not_spoil_the_gradient(all_count):
    """The tokens do not fill the last piece. The loss has no gradient at logits that are all equal, or at extras of 0."""
    a, coefficient, _ = arrays()
    coefficient = jnp.ones_like(coefficient) if all_count else coefficient
    divisor = coefficient + 0.5 * (coefficient == 0)
    loss = lambda log_p, log_q, divisor: jnp.sqrt(jnp.max(log_q, axis=-1) - jnp.min(log_q, axis=-1)) / divisor
    expected, expected_gradient = jax.value_and_grad(functools.partial(full, loss))(a, coefficient, divisor)
    found, gradient = jax.value_and_grad(functools.partial(chunked, loss, chunk=4))(a, coefficient, divisor)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    for name in ("hs", "ws"):
        np.testing.assert_allclose(gradient[name], expected_gradient[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_no_block_changes_the_numbers(rows, monkeypatch):
    monkeypatch.setattr(head_loss.sweep, "BLOCK_BYTES", rows * 4 * V)
    a, coefficient, _ = arrays()
    loss = token_loss(divergences.reverse_kl)
    expected, expected_gradient = jax.value_and_grad(functools.partial(full, loss))(a, coefficient)
    found, gradient = jax.value_and_grad(functools.partial(chunked, loss, chunk=4))(a, coefficient)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for name in ("hs", "ws"):
        np.testing.assert_allclose(gradient[name], expected_gradient[name], rtol=1e-4, atol=1e-6)
    plain = chunked(loss, a, coefficient, chunk=4)  # without a gradient
    np.testing.assert_allclose(plain, expected, rtol=1e-6)


def test_stored_blocks_have_the_same_bits(monkeypatch):
    monkeypatch.setattr(head_loss.sweep, "BLOCK_BYTES", 4 * V)
    a, coefficient, _ = arrays()

    def value_and_gradients(store_blocks):
        def total(hidden, head):
            return token_sum(
                divergences.logit_mse, hidden, head, a["ht"], a["wt"], coefficient, chunk=4, normalised=False,
                store_blocks=store_blocks,
            )[0]  # fmt: skip

        return jax.value_and_grad(total, argnums=(0, 1))(a["hs"], a["ws"])

    for found, expected in zip(
        *(jax.tree.leaves(value_and_gradients(stored)) for stored in (True, False)), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_a_loss_of_logits_plans_no_further_chunk():
    """Without stored blocks, XLA copied the chunk of logits for each block."""
    tokens, vocab, width = 256, 32768, 8
    shapes = [(1, tokens, width), (width, vocab), (1, tokens, width), (width, vocab), (1, tokens)]

    def planned(divergence, **options):
        total = lambda *arrays: token_sum(divergence, *arrays, chunk=tokens, **options)[0]
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        program = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(*arguments).compile()
        return program.memory_analysis().temp_size_in_bytes

    of_logits = planned(divergences.logit_mse, normalised=False, store_blocks=True)
    assert of_logits <= 1.05 * planned(divergences.forward_kl)
    assert of_logits + 0.9 * 4 * tokens * vocab <= planned(divergences.logit_mse, normalised=False)


def test_padded_vocabularies_caps_and_temperature():
    a, coefficient, _ = arrays()
    random = np.random.default_rng(1)
    wide = a | {
        n: jnp.concatenate([a[n], random.normal(size=(len(a[n]), k)).astype("f4")], 1)
        for n, k in (("ws", 2), ("wt", 5))
    }
    loss = token_loss(divergences.jensen_shannon)

    def expected(a):
        student, teacher = (
            3 * jnp.tanh(a["hs"] @ a["ws"][:, :V] / 3) / 1.5,
            5 * jnp.tanh(a["ht"] @ a["wt"][:, :V] / 5) / 1.5,
        )
        return jnp.sum(coefficient * loss(jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)))

    def found(a):
        arrays = a["hs"], a["ws"], a["ht"], a["wt"], coefficient
        return token_sum(loss, *arrays, chunk=4, vocab_size=V, temperature=1.5, soft_caps=(3.0, 5.0))[0]

    (one, gradient), (other, expected_gradient) = (jax.value_and_grad(f)(wide) for f in (found, expected))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    for name in ("hs", "ws"):
        np.testing.assert_allclose(gradient[name], expected_gradient[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("caps", [(3.0, None), (None, 0.5), (2.0, 0.7)])
def test_caps_of_each_model_are_exact_in_float64(caps):
    with jax.enable_x64(True):
        a, coefficient, _ = arrays(np.float64)
        loss = token_loss(divergences.forward_kl)

        def capped(logits, cap):
            return logits if cap is None else cap * jnp.tanh(logits / cap)

        def expected(a):
            student, teacher = capped(a["hs"] @ a["ws"], caps[0]), capped(a["ht"] @ a["wt"], caps[1])
            return jnp.sum(coefficient * loss(jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)))

        def found(a):
            return token_sum(loss, a["hs"], a["ws"], a["ht"], a["wt"], coefficient, chunk=3, soft_caps=caps)[0]

        (one, gradient), (other, other_gradient) = (jax.value_and_grad(f)(a) for f in (found, expected))
        np.testing.assert_allclose(one, other, rtol=1e-13)
        for name in ("hs", "ws"):
            np.testing.assert_allclose(gradient[name], other_gradient[name], rtol=1e-11, atol=1e-14)
        assert abs(one - full(loss, a, coefficient)) > 1e-3  # the caps matter


@pytest.mark.parametrize("tied", [(True, True), (True, False), (False, True)])
def test_a_tied_head_is_read_as_the_embedding(tied):
    a, coefficient, _ = arrays()
    wider = a | {"wt": jnp.pad(a["wt"], ((0, 0), (0, 2)))}
    loss = token_loss(divergences.jensen_shannon)
    turn = lambda head, is_tied: head.T if is_tied else head

    def found(hs, ws):
        heads = turn(ws, tied[0]), wider["ht"], turn(wider["wt"], tied[1])
        return token_sum(loss, hs, *heads, coefficient, chunk=3, tied=tied)[0]

    value, gradient = jax.value_and_grad(found, argnums=(0, 1))(a["hs"], a["ws"])
    expected, expected_gradient = jax.value_and_grad(functools.partial(full, loss))(a, coefficient)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for name, one in zip(("hs", "ws"), gradient, strict=True):
        np.testing.assert_allclose(one, expected_gradient[name], rtol=1e-4, atol=1e-6)


IDS, WIDE = 4096, 4160
QWEN = 151_665, 151_936  # the ids of Qwen2.5's tokenizer, and the columns of its head


def of_ones_own(log_p, log_q):
    """Returns KL(p || q) by the plain formula, which is NaN at an id without mass in both: 0 * (-inf - -inf)."""
    assert log_p.shape[-1] == log_q.shape[-1] and log_p.shape[-1] in (IDS, QWEN[0])
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


PADDED = itertools.product([(IDS, WIDE), (WIDE, IDS), (WIDE, WIDE)], [(False, False), (True, True)], [1, 4])


@pytest.mark.parametrize(("widths", "tied", "tensor"), [*PADDED, ((QWEN[1], QWEN[1]), (False, False), 4)])
def test_no_token_loss_sees_a_padded_id(widths, tied, tensor):
    random = np.random.default_rng(0)
    ids, rows, length = (QWEN[0] if widths[0] == QWEN[1] else IDS), 4, 3
    hidden = [jnp.array(random.normal(size=(rows, length, size)), jnp.float32) for size in (8, 16)]
    heads = [jnp.array(random.normal(size=(x.shape[-1], w)), jnp.float32) for x, w in zip(hidden, widths, strict=True)]
    coefficient = jnp.full((rows, length), 0.25).at[1, 2].set(0)

    def expected(hs, ws):
        log_p, log_q = jax.nn.log_softmax(hidden[1] @ heads[1][:, :ids]), jax.nn.log_softmax(hs @ ws[:, :ids])
        return jnp.sum(coefficient * of_ones_own(log_p, log_q))

    mesh = sharding.make_mesh(2, 1, tensor, jax.devices()[: 2 * tensor])
    upright, turned = P(None, "tensor"), P("tensor", None)
    place = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))
    given = [place(h.T, turned) if t else place(h, upright) for h, t in zip(heads, tied, strict=True)]
    inputs = [place(array, P(("data", "fsdp"))) for array in (*hidden, coefficient)]

    def found(hs, ws):
        return token_sum(
            of_ones_own, hs, ws, inputs[1], given[1], inputs[2], chunk=4, tied=tied, vocab_size=ids, mesh=mesh
        )[0]

    true, true_gradient = jax.jit(jax.value_and_grad(expected, argnums=(0, 1)))(hidden[0], heads[0])
    value, (of_hidden, of_head) = jax.jit(jax.value_and_grad(found, argnums=(0, 1)))(inputs[0], given[0])
    np.testing.assert_allclose(value, true, rtol=1e-5)
    of_head = of_head.T if tied[0] else of_head
    assert of_head.shape == heads[0].shape and not np.any(of_head[:, ids:])
    np.testing.assert_allclose(of_hidden, true_gradient[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(of_head, true_gradient[1], rtol=1e-4, atol=1e-6)


def test_a_second_derivative_is_refused():
    a, coefficient, _ = arrays()
    once = jax.grad(lambda hs: chunked(token_loss(divergences.forward_kl), a | {"hs": hs}, coefficient))
    with pytest.raises(TypeError, match="differentiable once"):
        jax.grad(lambda hs: once(hs).sum())(a["hs"])


def test_columns_extras_and_no_teacher():
    a, coefficient, target = arrays()
    two = jnp.stack([coefficient, 2 * coefficient], axis=-1)

    def loss(log_p, log_q, target):
        assert log_p is None
        return jnp.stack([cross_entropy(log_q, target), -log_q.max(axis=-1)], axis=-1)

    total, values = token_sum(loss, a["hs"], a["ws"], None, None, two, target, chunk=2)
    log_q = jax.nn.log_softmax(a["hs"] @ a["ws"])
    expected = jnp.sum(coefficient * (cross_entropy(log_q, target) - 2 * log_q.max(axis=-1)))
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    live = np.array(coefficient != 0)
    np.testing.assert_allclose(values[live][:, 0], cross_entropy(log_q, target)[live], rtol=1e-5)
    assert not np.any(values[~live])


def test_what_is_not_counted_is_not_read():
    a, coefficient, _ = arrays()
    dead = coefficient == 0
    poisoned = a | {name: jnp.where(dead[..., None], jnp.nan, a[name]) for name in ("hs", "ht")}
    loss = token_loss(divergences.reverse_kl)
    value_and_grad = jax.value_and_grad(functools.partial(chunked, loss))
    for found, expected in zip(
        jax.tree.leaves(value_and_grad(poisoned, coefficient)),
        jax.tree.leaves(value_and_grad(a, coefficient)),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


def test_nothing_counted_is_loss_and_gradient_zero():
    a, coefficient, _ = arrays()
    loss = token_loss(divergences.forward_kl)
    value, gradient = jax.value_and_grad(functools.partial(chunked, loss))(a, jnp.zeros_like(coefficient))
    assert value == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_bfloat16_is_accumulated_in_float32():
    a, coefficient, _ = arrays()
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), a)
    loss = token_loss(divergences.forward_kl)
    value, gradient = jax.value_and_grad(functools.partial(chunked, loss))(low, coefficient)
    expected = full(loss, jax.tree.map(lambda x: x.astype(jnp.float32), low), coefficient)
    assert value.dtype == jnp.float32 and gradient["ws"].dtype == jnp.bfloat16
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_a_gradient_in_float16_is_refused_and_a_value_is_not():
    a, coefficient, _ = arrays()
    low = jax.tree.map(lambda x: x.astype(jnp.float16), a)
    loss = token_loss(divergences.forward_kl)
    np.testing.assert_allclose(chunked(loss, low, coefficient), full(loss, a, coefficient), rtol=1e-2)
    of_student = lambda ws, name: chunked(loss, a | {name: ws, "hs": low["hs"]}, coefficient)
    with pytest.raises(ValueError, match="no gradient in float16, where small gradients become 0; use bfloat16"):
        jax.grad(of_student)(low["ws"], "ws")
    mixed = a | {"ht": low["ht"], "wt": low["wt"]}  # a teacher in float16
    assert jax.grad(lambda ws: chunked(loss, mixed | {"ws": ws}, coefficient))(a["ws"]).dtype == jnp.float32


def shaped(**shapes):
    """Returns arguments of `token_sum` with the given shapes, or else valid shapes. The shape () omits an array."""
    right = dict(hs=(B, L, DS), ws=(DS, V), ht=(B, L, DT), wt=(DT, V), coefficient=(B, L), target=(B, L)) | shapes
    return [jnp.ones(shape) if shape else None for shape in right.values()]


MISFITS = {
    "no row": (dict(hs=(0, L, DS), ht=(0, L, DT), coefficient=(0, L)), {}, r"student_hidden must be .* no side of 0"),
    "no token": (dict(hs=(B, 0, DS), ht=(B, 0, DT), coefficient=(B, 0)), {}, r"student_hidden \(2, 0, 3\)"),
    "one axis too few": (dict(hs=(L, DS)), {}, r"student_hidden must be \[B, L, D\]"),
    "another student's head": (dict(ws=(DS + 1, V)), {}, r"student_head must be \[D, V\] with the D of student_hidden"),
    "another teacher's head": (dict(wt=(DT + 1, V)), {}, r"teacher_head must be .*teacher_head \(5, 11\)"),
    "a head that is not tied": ({}, dict(tied=(True, False)), r"student_head must be \[V, D\].* tied=\(True, False\)"),
    "a teacher of other rows": (dict(ht=(B + 1, L, DT)), {}, r"teacher_hidden must have student_hidden's B and L"),
    "half a teacher": (dict(wt=()), {}, "a teacher needs both teacher_hidden and teacher_head"),
    "other coefficients": (dict(coefficient=(B, L - 1)), {}, r"coefficient must begin .*coefficient \(2, 4\)"),
    "coefficients of nothing": (dict(coefficient=(B, L, 0)), {}, r"coefficient \(2, 5, 0\)"),
    "other extras": (dict(target=(L, B)), {}, r"extras\[0\] must begin with .* extras\[0\] \(5, 2\)"),
    "a chunk below 0": ({}, dict(chunk=-3), "chunk=-3 must be at least 1; None chooses a value"),
    "a chunk of 0": ({}, dict(chunk=0), "chunk=0 must be at least 1"),
    "no id": ({}, dict(vocab_size=0), "vocab_size=0 must be at least 1 and at most 11"),
    "more ids than columns": ({}, dict(vocab_size=V + 1), "vocab_size=12 must be at least 1 and at most 11"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_arguments_that_do_not_fit_are_named(case):
    shapes, options, message = MISFITS[case]
    loss = lambda log_p, log_q, target: log_q[:, 0]
    token_sum(loss, *shaped(), chunk=3, vocab_size=V)
    with pytest.raises(ValueError, match=message):
        token_sum(loss, *shaped(**shapes), **options)


def test_rows_that_the_mesh_cannot_divide_are_named():
    mesh = sharding.make_mesh(2, 2, 2)
    with pytest.raises(ValueError, match=r"the 2 rows must divide over the 4 devices"):
        token_sum(lambda log_p, log_q, target: log_q[:, 0], *shaped(), mesh=mesh)
