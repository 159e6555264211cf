"""ULD: universal logit distillation between a teacher and a student with different tokenizers (Boizard et al.,
https://arxiv.org/abs/2402.12030, 2024).

Both models read the same text as tokens of their own. At the first token of each common span of text, the probabilities
of each model are sorted by size. The term is the sum of the differences between the i-th largest probabilities. As in
the paper, the cross-entropy of the text is added, and the term has the coefficient 1.5.

    python -m kd_jax.main --config=configs/uld.py --workdir=runs/uld --config.teacher.path=FOLDER

FOLDER has a teacher with any tokenizer. The tokenizer of a new student is that of --config.tokenizer.path.

Differences: the paper compares the i-th token of one model with the i-th token of the other, which soon stand for
different text. TRL's GOLD compares spans, and multiplies the probabilities of all tokens of a span. Here both models
have read the same text at each comparison.

The method has been run in the setting smoke.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    distil = base.term(kind="spans", spans={"name": "sorted_distance"}, coefficient=1.5)
    return base.set_terms(config, distil=distil, labels=base.hard_labels())
