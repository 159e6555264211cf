"""DistiLLM: skew KL, KL(p || 0.1 p + 0.9 q), with a replay buffer and a second stream (Ko et al.,
https://arxiv.org/abs/2402.03898, 2024).

A step trains on student responses from a replay buffer or on the data's responses. Student responses are used more
often when the held-out loss rises. The second stream adds a language-modelling term.

    python -m kd_jax.main --config=configs/distillm.py --workdir=runs/distillm

The skew of 0.1, the buffer of 1000 rows, and 0.1 for prefixes.increase and prefixes.tolerance are values of the paper.
In the paper, skew reverse KL is equally good for all students except the smallest; the flag is
--config.objective.terms.distil.divergence.name="skew_reverse_kl(skew=0.1)". The key prefixes.as_published selects the
scheduler of the published code. The published code evaluates once per epoch (eval_every). The second stream of the
paper is OpenWebText. The second stream of this config is the training text of the task, with the prompts. The flags for
plain text of your own are --config.text.name=text --config.text.options.path=FILE.

The method has been run in the settings docstrings and smoke. Result (experiments/methods_docstrings) from one
fine-tuned student, on 116,000 tokens of docstrings, mean of three seeds: KL(p || q) 2.26 -> 2.40, KL(q || p) 2.62 ->
2.72, KL(q || p) on the student's own text 2.35 -> 2.66, ROUGE-L 7.6 -> 5.7.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    config.prefixes = ConfigDict(
        {
            "name": "adaptive",
            "threshold": 0.0,
            "increase": 0.1,
            "tolerance": 0.1,
            "capacity": 1000,
            "fresh": "decreasing",
            "as_published": False,
        }
    )
    config.text.name = config.data.get_oneway_ref("name")
    return base.set_terms(
        config,
        distil=base.term(divergence={"name": "skew_forward_kl", "skew": 0.1}),
        text_labels=base.hard_labels(rows="text"),
    )
