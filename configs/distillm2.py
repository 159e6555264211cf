"""DistiLLM-2: skew KL on the teacher's responses and skew reverse KL on the student's responses (Ko et al.,
https://arxiv.org/abs/2503.07067, 2025).

In the paper both models answer the same prompts again in every epoch. The skew follows a curriculum. The student's
share beta is 0.5 for half of the run, and then grows to 1.

    python -m kd_jax.main --config=configs/distillm2.py --workdir=runs/distillm2

The base skew 0.1, the smallest skew 0.01, the temperature 0.8, the top-p 0.95, and the mean over each response are
values of the paper. The published code has constant skews and the coefficients 1 and 1. For these values, set
--config.objective.terms.forward.weight.name="constant_schedule(value=0.1)", the same key of reverse with 0.9, both keys
coefficient.name="constant_schedule(value=1.0)", and --config.objective.terms.reverse.stop_gradient. In this config a
phase has 8 batches of prompts, which make 16 steps. The curriculum takes the mean over a phase, because reference_steps
follows prefixes.every and prefixes.epochs. If every=0 (an epoch), or if prefixes.name is "paired(...)", set the steps
of a phase yourself: --config.objective.terms.forward.weight.reference_steps=N, and the same key of reverse.

The method has been run in the settings docstrings and smoke. Result (experiments/methods_docstrings) from one
fine-tuned student, on 116,000 tokens of docstrings, mean of three seeds: KL(p || q) 2.26 -> 2.24, KL(q || p) 2.62 ->
2.19, KL(q || p) on the student's own text 2.35 -> 2.00, ROUGE-L 7.6 -> 8.9.
"""

from ml_collections import ConfigDict

from configs import base, settings


def get_config(setting: str = "docstrings") -> ConfigDict:
    config = settings.get(setting)
    config.prefixes = ConfigDict({"name": "paired", "every": 8, "epochs": 1})
    config.sampling.temperature = 0.8
    config.sampling.top_p = 0.95

    def term(rows: str, share: float, **changes: object) -> ConfigDict:
        """Returns a term on the rows of one author, whose coefficient goes from 0.25 to `share`.

        The coefficient is half of the author's share, which is beta or 1 - beta.
        """
        every, epochs = (config.prefixes.get_oneway_ref(key) for key in ("every", "epochs"))
        phase = 2 * every * epochs  # each batch of prompts gives two batches of rows
        half = config.get_oneway_ref("steps") // 2  # beta keeps its smallest value until this step
        return base.term(
            assistant={"name": "arithmetic_mixture"},
            weight={
                "name": "distillm2_skew", "base": 0.1, "low": 0.01, "reference_steps": phase, "per_row": False,
                "rows": rows,
            },
            coefficient={
                "name": "linear_schedule", "transition_begin": half, "transition_steps": half, "init_value": 0.25,
                "end_value": share,
            },
            rows=rows, average="sequence", **changes,
        )  # fmt: skip

    return base.set_terms(
        config,
        forward=term("teacher", 0.0, pair=("teacher", "assistant")),
        reverse=term("student", 0.5, pair=("student", "assistant")),
    )
