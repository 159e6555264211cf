"""Declares the keys of a term of the objective, and of a policy gradient."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kd_jax.settings.declare import key, section

Spec = str | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Policy:
    """The settings of a policy gradient on the student's own text.

    The reward of each token is log p - log q, or another function of both. The defaults are those of the MiniLLM paper.
    """

    discount: float = key(1.0, "factor per token by which later rewards are discounted")
    include_current: bool = key(False, "count the token's own reward as well as the rewards of the tokens after it")
    length_normalised: bool = key(True, "average the rewards over their tokens instead of adding them")
    whiten: str = key(
        "none", "none; counted: scale advantages to mean 0, variance 1 over counted tokens; all: also after the end"
    )
    baseline: str = key("none", "none, or kl: subtract the exact mean -KL(q || p) from the reward of each token")
    clip: float = key(0.2, "clip the ratio q / (q when sampled) to the range from 1 - clip to 1 + clip; 0: no clipping")
    reward: Spec = key(
        {"name": "identity"}, "spec: a function of kd_jax.policy_gradient.reward_shapes; identity: log p - log q",
        is_open=True,
    )  # fmt: skip
    members: Mapping[str, Any] = key(
        {"teacher": 1.0}, "frozen model -> coefficient; the sum of coefficient * log-probability is log p in the reward",
        is_open=True,
    )  # fmt: skip
    reward_scale: float = key(1.0, "divisor of the rewards")
    reward_limit: float = key(0.0, "clip scaled rewards to plus and minus this number; 0: no clipping")


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand of the objective.

    Only terms of kind divergence use divergence, pair, assistant, between, weight, stop_gradient, vocabulary, entry_clip,
    logits, the temperatures, and importance. Only terms of kind policy_gradient use policy, and only terms of kind spans use spans.
    """

    kind: str = key(
        "divergence",
        "divergence; hard_labels: -log q(token); policy_gradient of KL(q || p): see policy; spans: a teacher with another tokenizer",
    )
    divergence: Spec = key(
        {"name": "forward_kl"}, "spec: a divergence of kd_jax.divergences, or entropy for a pair of one", is_open=True
    )
    assistant: Spec = key({"name": "none"}, "spec: an assistant of kd_jax.assistants, or none", is_open=True)
    spans: Spec = key(
        {"name": "likelihood", "divergence": {"name": "binary_kl", "temperature": 100.0}},
        "for kind=spans: likelihood of common spans of text, with a divergence of kd_jax.span_divergences; or sorted_distance",
        is_open=True,
    )  # fmt: skip
    pair: tuple[str, ...] = key(
        ("teacher", "student"),
        "first and second argument of the divergence: teacher, student, assistant, or a member; entropy has one",
    )
    between: tuple[str, ...] = key(
        ("student", "teacher"), "members that the assistant equals at weight 0 and at weight 1"
    )
    weights: Mapping[str, Any] = key(
        {}, "member -> weight: the assistant is among these members, in place of between and weight", is_open=True
    )
    stop_gradient: bool = key(False, "treat the student inside the assistant as a constant in the gradient")
    weight: float | Spec = key(
        0.0, "weight of the teacher in the assistant: a number, or a spec of kd_jax.schedules", is_open=True
    )
    vocabulary: Mapping[str, Any] = key(
        {"support": "whole"}, "outcomes that are compared: a support of kd_jax.supports, with k and rest", is_open=True
    )
    entry_clip: float = key(
        0.0, "upper bound of the contribution of each vocabulary entry to the divergence; 0: no bound", least=0
    )
    logits: Spec = key({"name": "raw"}, "spec: a transform of kd_jax.logit_transforms, or raw", is_open=True)
    temperature: float | Spec = key(
        0.0, "divisor of the logits: a number, a schedule, or a rule of kd_jax.temperatures; 0: objective.temperature",
        is_open=True,
    )  # fmt: skip
    teacher_temperature: float | Spec = key(
        0.0, "divisor of the logits of all models except the student, as temperature; 0: as temperature", is_open=True
    )
    temperature_squared: bool = key(False, "multiply the loss by the square of the teacher's temperature")
    tokens: Spec = key(
        {"name": "none"}, "spec: a rule of kd_jax.token_weights, with of and divide_by; none: weight 1", is_open=True
    )
    row_gate: Spec = key(
        {"name": "none"}, "spec: a gate of kd_jax.token_weights that drops rows, or none", is_open=True
    )
    coefficient: float | Spec = key(
        1.0,
        "factor of the term; may be a kd_jax.schedules spec, as may the numbers of an assistant and of a rule",
        is_open=True,
    )
    rows: str = key("all", "rows that count: all (of the first stream), or of one origin: data, teacher, student, text")
    where: Mapping[str, Any] = key(
        {}, "column of the dataset -> value or list of values; only rows with one of these values count", is_open=True
    )
    importance: bool = key(
        False, "multiply each token's loss by q / mixture, if sampling.teacher_share made a mixture sample the rows"
    )
    policy: Policy = section(Policy, "for kind=policy_gradient: the settings of the policy gradient")
    average: str = key(
        "token",
        "token: mean over the tokens that count in the term; batch_token: their sum divided by the number of the batch's "
        "tokens; sequence: mean over rows of each row's mean; row_sum: of each sum",
    )
