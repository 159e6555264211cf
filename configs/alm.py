"""ALM: approximate likelihood matching between a teacher and a student with different tokenizers (Minixhofer et al.,
https://arxiv.org/abs/2503.20083, 2025).

Both models read the same text as tokens of their own. A span of text ends wherever both tokenisations have a boundary.
The term compares the likelihoods of each span under both models as probabilities of a binary outcome, at temperature
100. A span's likelihood includes that the last word ends with the span, and spans inside a word are joined. As in the
published examples, the cross-entropy of the text is added.

    python -m kd_jax.main --config=configs/alm.py --workdir=runs/alm --config.teacher.path=FOLDER

FOLDER has a teacher with any tokenizer. The tokenizer of a new student is that of --config.tokenizer.path. With the
flag --config.prefixes.name=student, the spans are those of the student's own responses. The labels would then be the
student's own text, so set --config.objective.terms.labels.coefficient=0 or a mixture of sources.

Differences from the published code (tokenkit): the loss is the mean over spans, while the published denominator counts
joined spans twice. The code compares cross-entropies, which have the gradient of the KL. The coefficients of the terms
are fixed, while the code gives both terms gradients of equal size in the last layer. T^2 is not in the loss, so the
coefficient is large.

The method has been run in the setting smoke, and across tokenizers (experiments/across_tokenizers).
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    divergence = {"name": "binary_kl", "temperature": 100.0}
    spans = {"name": "likelihood", "divergence": divergence, "word_ends": True, "join_at_most": 0.1}
    distil = base.term(kind="spans", spans=spans, coefficient=100.0)
    return base.set_terms(config, distil=distil, labels=base.hard_labels())
