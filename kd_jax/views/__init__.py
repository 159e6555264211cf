"""The views: the text that a frozen model reads in place of a row's prompt. The response is the same for all models.

A view lets the teacher see more than the student, such as a hint, the answer, or another response to the same prompt.
Config key: `teacher.view`, or `members.NAME.view`. A view of your own is a function (row, **keywords) -> prompt or None,
named as "module:function"; None means that the row has no view, and the model then reads the row's own prompt.

A row is a mapping from the names of the dataset's columns to texts. `kd_jax.teachers.viewed` aligns the hidden states. Only
the comparison of models uses a view: a model that writes text reads the row's own prompt.
"""

import re
import sys
from collections.abc import Sequence
from typing import Any, Protocol

from kd_jax import resolve
from kd_jax.data import scores
from kd_jax.resolve import Spec, check_number
from kd_jax.views.template_text import Prompt, Row, fill, names_in

__all__ = ["successful_rollout", "template"]

Shown = list[dict[str, Any] | None]  # the rows with the prompt of the view, or None for a row without a view
THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)


class View(Protocol):
    """The protocol of all views.

    Attributes:
      columns: the columns of the dataset that the view reads.
      needs_rollouts: True if the view reads the responses that the student sampled to the same prompt. Rows of the
        dataset then have no view.
      of_feedback: True if the view shows remarks on the row's own response.
      max_prompt_length: the largest number of tokens of the model's prompt; 0 for all that the model's positions allow.
    """

    columns: tuple[str, ...]
    needs_rollouts: bool
    of_feedback: bool
    max_prompt_length: int

    def rows(self, rows: Sequence[Row], responses: Sequence[str] | None = None, group_size: int = 1) -> Shown:
        """Returns the rows with the model's prompts, or None for each row without a view.

        Args:
          rows: the rows.
          responses: the student's sampled responses to the rows, without end tokens; None for rows of the dataset.
          group_size: the number of neighbouring rows that have the same prompt.
        """
        ...


class template:
    """A template over the columns of a row.

    A row has no view if one of the columns is empty for the row, except the context.

    Args:
      text: the template, such as ``"{prompt}\\n\\nHint: {hint}"``. Each name in braces is a column. Double braces stand
        for braces. If the template has no ``{context}``, the row's context follows the prompt, as it does for the student.
      max_prompt_length: the largest number of tokens of the model's prompt. The text of a longer prompt is truncated at
        its end, and the tokens of `data.template` are kept. 0: as many tokens as the model's positions allow.

    Raises:
      ValueError: the text is no template, or names no column other than the prompt and the context.

    Example:
      >>> view = template("{prompt}\\nHint: {hint}")
      >>> view.rows([{"prompt": "2 + 2?", "context": "", "hint": "even"}])[0]["prompt"]
      '2 + 2?\\nHint: even'

    References:
      "OPSD", https://arxiv.org/abs/2601.18734, 2026, shows the teacher the solution; "SDFT",
      https://arxiv.org/abs/2601.19897, 2026, a demonstration.
    """

    needs_rollouts = of_feedback = False

    def __init__(self, text: str, max_prompt_length: int = 0):
        self.text, self.columns = text, names_in(text)
        self.max_prompt_length = _whole("max_prompt_length", max_prompt_length)
        if not set(self.columns) - {"prompt", "context"}:
            raise ValueError(
                f"text={text!r} names no column other than the prompt and the context, which the student reads, too: name a "
                f"column of the dataset, such as {{hint}}."
            )

    def rows(self, rows: Sequence[Row], responses: Sequence[str] | None = None, group_size: int = 1) -> Shown:
        """Returns the rows with the filled template as the prompt, as in `View`."""
        return [self._row(row) for row in rows]

    def _row(self, row: Row) -> dict[str, Any] | None:
        if any(row[column] == "" for column in self.columns if column != "context"):
            return None
        context = "" if "context" in self.columns else row["context"]
        return {**row, "prompt": fill(self.text, row["prompt"], row), "context": context}


class successful_rollout:
    """Another response of the student to the same prompt that succeeded, or remarks on the row's own response, or both.

    The view needs `sampling.rollouts_per_prompt` of at least 2, unless `feedback` is set. The rollout shown to a row is
    the first of the row's group whose reward is large enough. A row without such a rollout and without feedback has no
    view; `row_gate.name='has_view'` leaves this row out of the loss.

    Args:
      reward: the spec of a function of `kd_jax.data.scores`, or of your own: (response, references) -> number.
      at_least: the smallest reward of a successful response. The functions of `kd_jax.data.scores` return 0 to 100.
      reference: the column of the dataset with the reference of the reward.
      own: True if a row may be shown its own response.
      use_solutions: False to show feedback only.
      feedback: "module:function", a function (response, row) -> text or None that remarks on a response; "" for none.
      feedback_only_without_solution: True to leave the feedback out if a rollout is shown.
      without_thinking: True to remove ``<think>...</think>`` from the rollout that is shown, and white space around it.
      text: the template of the prompt, with ``{prompt}``, ``{solution}`` and ``{feedback}``.
      solution: the template of the part for the rollout, with ``{rollout}``; empty in a row without a rollout.
      remarks: the template of the part for the feedback, with ``{feedback}``; empty in a row without feedback.
      columns: the columns of the dataset that `feedback` reads.
      max_prompt_length: as in `template`. 0: room for the prompt, a rollout, and 256 further tokens.

    Raises:
      ValueError: a template lacks a name or has an unknown name, a function is unknown, or nothing can be shown.

    References:
      "SDPO", as in trl 1.16's SuccessfulRolloutTeacherContextBuilder: at_least is 1.0 of rewards in [0, 1], without
      feedback. The authors' code has 0.5, with feedback where there is no rollout, and without thinking.
    """

    needs_rollouts = True

    def __init__(
        self, reward: Spec, at_least: float = 100.0, reference: str = "response", own: bool = False,
        use_solutions: bool = True, feedback: str = "", feedback_only_without_solution: bool = False,
        without_thinking: bool = False, text: str = "{prompt}{solution}{feedback}\n\nAnswer the question again.",
        solution: str = "\n\nA correct answer is:\n\n{rollout}", remarks: str = "\n\nRemarks on your last answer:\n\n{feedback}",
        columns: Sequence[str] = (), max_prompt_length: int = 0,
    ):  # fmt: skip
        for name, value, known in (
            ("text", text, {"prompt", "solution", "feedback"}), ("solution", solution, {"rollout"}),
            ("remarks", remarks, {"feedback"}),
        ):  # fmt: skip
            if set(names_in(value, name)) != known:
                raise ValueError(f"{name}={value!r} must have the names {', '.join(sorted(known))} in braces.")
        self.at_least = check_number("at_least", at_least)
        self.own, self.use_solutions, self.without_thinking = own, use_solutions, without_thinking
        self.feedback_only_without_solution = feedback_only_without_solution
        self.text, self.solution, self.remarks = text, solution, remarks
        if not use_solutions and not feedback:
            raise ValueError(
                "use_solutions=False without feedback shows the teacher nothing; name a function of feedback."
            )
        self.columns = ("prompt", reference, *_texts("columns", columns))
        self.max_prompt_length = _whole("max_prompt_length", max_prompt_length)
        function, keywords = resolve.look_up(reward, scores, positional=True)
        self._rewarded = lambda response, row: _called(function, response, [row[reference]], **keywords)
        self.of_feedback = bool(feedback)
        self._feedback = resolve.look_up(feedback, scores, positional=True)[0] if feedback else None

    def rows(self, rows: Sequence[Row], responses: Sequence[str] | None = None, group_size: int = 1) -> Shown:
        """Returns the rows with a rollout or feedback in the prompt, as in `View`."""
        if responses is None:
            return [None] * len(rows)
        values = [self._rewarded(response, row) for row, response in zip(rows, responses, strict=True)]
        rewards = [check_number("the reward", float(v) if isinstance(v, bool) else v) for v in values]
        remarks = [
            _text_or_none(self._feedback, text, row) if self._feedback else None
            for row, text in zip(rows, responses, strict=True)
        ]
        prompts = self.prompts([row["prompt"] for row in rows], responses, rewards, remarks, group_size)
        return [
            None if prompt is None else {**row, "prompt": prompt} for row, prompt in zip(rows, prompts, strict=True)
        ]

    def prompts(
        self, prompts: Sequence[Prompt], responses: Sequence[str], rewards: Sequence[float],
        feedback: Sequence[str | None], group_size: int,
    ) -> list[Prompt | None]:  # fmt: skip
        """Returns the prompt of each row with what the view shows, or None for a row to which it shows nothing.

        Args:
          prompts: the prompts of the rows.
          responses: the responses of the rows.
          rewards: the rewards of the responses.
          feedback: remarks on the responses; None or white space for a response without remarks.
          group_size: the number of neighbouring rows with the same prompt.
        """
        shown: list[Prompt | None] = []
        for prompt, source, remark in zip(prompts, self.demonstrations(rewards, group_size), feedback, strict=True):
            parts = {"solution": "", "feedback": ""}
            if source is not None:
                rollout = THINKING.sub("", responses[source]).strip() if self.without_thinking else responses[source]
                parts["solution"] = self.solution.format(rollout=rollout)
            if remark and remark.strip() and not (self.feedback_only_without_solution and source is not None):
                parts["feedback"] = self.remarks.format(feedback=remark)
            shown.append(fill(self.text, prompt, parts) if any(parts.values()) else None)
        return shown

    def demonstrations(self, rewards: Sequence[float], group_size: int) -> list[int | None]:
        """Returns for each row the index of the rollout that the view shows, or None."""
        if not self.use_solutions:
            return [None] * len(rewards)
        successful = [reward >= self.at_least for reward in rewards]
        groups = [range(i // group_size * group_size, (i // group_size + 1) * group_size) for i in range(len(rewards))]
        return [
            next((j for j in group if successful[j] and (self.own or j != i)), None) for i, group in enumerate(groups)
        ]


class _OwnFunction:
    """A view that a function of the user makes."""

    needs_rollouts = of_feedback = False

    def __init__(self, function: Any, keywords: dict[str, Any]):
        self.max_prompt_length = _whole("max_prompt_length", keywords.pop("max_prompt_length", 0))
        self.columns = _texts("columns", keywords.pop("columns", ()))
        self._function, self._keywords = function, keywords

    def rows(self, rows: Sequence[Row], responses: Sequence[str] | None = None, group_size: int = 1) -> Shown:
        prompts = [_text_or_none(self._function, row, **self._keywords) for row in rows]
        return [
            None if prompt is None else {**row, "prompt": prompt} for row, prompt in zip(rows, prompts, strict=True)
        ]


def _whole(name: str, value: Any) -> int:
    """Returns a whole number of at least 0."""
    if check_number(name, value, low=0) != int(value):
        raise ValueError(f"{name}={value!r} must be a whole number.")
    return int(value)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """Returns a tuple of texts."""
    if not isinstance(value, list | tuple) or not all(isinstance(entry, str) for entry in value):
        raise ValueError(f"{name}={value!r} must be a list of names, such as ('hint',).")
    return tuple(value)


def _called(function: Any, *arguments: Any, **keywords: Any) -> Any:
    """Returns the value of a function of the user. Any error becomes a ValueError that names the function."""
    try:
        return function(*arguments, **keywords)
    except Exception as error:
        name = f"{function.__module__}:{function.__name__}"
        hint = " A function reads a further column of the dataset if the key `columns` of the view names the column."
        raise ValueError(
            f"the function {name} failed: {type(error).__name__}: {error}.{hint if isinstance(error, KeyError) else ''}"
        ) from error


def _text_or_none(function: Any, *arguments: Any, **keywords: Any) -> str | None:
    """Returns the value of a function of the user, which must be a text or None."""
    value = _called(function, *arguments, **keywords)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"the function {function.__name__} returned {value!r}; it must return a text or None.")
    return value


def make_view(spec: Spec) -> View | None:
    """Returns the view that a spec names; None for the name none.

    Raises:
      ValueError: the name or a keyword is unknown, or a template is invalid.
    """
    name = (spec if isinstance(spec, str) else spec["name"]).partition("(")[0]
    if name == "none":
        return None
    is_own = ":" in name
    beside = ("columns", "max_prompt_length") if is_own else ()
    make, keywords = resolve.look_up(spec, sys.modules[__name__], positional=is_own, beside=beside)
    return _OwnFunction(make, keywords) if is_own else make(**keywords)
