"""SeqKD: hard labels on responses that the teacher writes once, stored as a dataset (Kim and Rush,
https://arxiv.org/abs/1606.07947, 2016, with one sample in place of the best result of beam search).

    python -m kd_jax.main --config=configs/seqkd.py --workdir=runs/seqkd

The baseline called SeqKD in MiniLLM and DistiLLM is 0.5 cross-entropy + 0.5 KL(p || q) on the teacher's text. For this
baseline, add a term distil=base.term(coefficient=0.5), and give the labels coefficient=0.5. The flag
--config.prefixes.num_rows limits the number of prompts that the teacher answers.

The method has been run in the settings docstrings and smoke. Result (experiments/methods_docstrings) from one
fine-tuned student, on 116,000 tokens of docstrings, mean of three seeds: KL(p || q) 2.26 -> 2.27, KL(q || p) 2.62 ->
2.61, KL(q || p) on the student's own text 2.35 -> 2.32, ROUGE-L 7.6 -> 7.1.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    config.prefixes = ConfigDict({"name": "teacher", "num_rows": 0})
    return base.set_terms(config, labels=base.hard_labels(rows="teacher"))
