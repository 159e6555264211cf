"""The numbers on held-out rows, against full logits in NumPy."""

import jax
import numpy as np
import scipy.special
import scipy.stats

from kd_jax import evaluate, sharding
from tests.test_train_step import STUDENT, TEACHER, V, batch


def test_the_numbers_are_those_of_full_logits():
    params, teacher_params = STUDENT.init(jax.random.key(0)), TEACHER.init(jax.random.key(1))
    last = batch(1)
    last["loss_mask"][5:] = False  # rows that fill up the last batch
    batches = [batch(0), last]
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    found = evaluate.evaluate(STUDENT, params, TEACHER, teacher_params, batches, mesh, vocab_size=V, chunk=5)
    p, q, target = [], [], []
    for rows in batches:
        counted = rows["loss_mask"]
        for model, its_params, into in ((TEACHER, teacher_params, p), (STUDENT, params, q)):
            logits = np.asarray(model.logits(its_params, rows["tokens"], rows["mask"]), np.float64)[..., :V]
            into.append(scipy.special.softmax(logits, axis=-1)[counted])
        target.append(rows["targets"][counted])
    p, q, target = map(np.concatenate, (p, q, target))
    cross_entropy = -np.log(q[np.arange(len(target)), target]).mean()
    expected = dict(
        cross_entropy=cross_entropy,
        forward_kl=scipy.stats.entropy(p, q, axis=-1).mean(),
        reverse_kl=scipy.stats.entropy(q, p, axis=-1).mean(),
        top1_agreement=(p.argmax(-1) == q.argmax(-1)).mean(),
        perplexity=np.exp(cross_entropy),
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)

    alone = evaluate.evaluate(STUDENT, params, None, None, batches, mesh, vocab_size=V)
    assert alone.keys() == {"cross_entropy", "perplexity"}
    np.testing.assert_allclose(alone["cross_entropy"], cross_entropy, rtol=1e-5)
