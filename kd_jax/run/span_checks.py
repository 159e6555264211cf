"""Checks of a config in which the teacher has a tokenizer of its own."""

from collections.abc import Sequence

from kd_jax.objectives import Term
from kd_jax.prefixes import Source
from kd_jax.run.models import STUDENT
from kd_jax.run.view_prompts import make_views
from kd_jax.settings import Settings, name_of


def check_spans(config: Settings, source: Source, terms: Sequence[Term]) -> None:
    """Checks that spans of text can be compared, if a term has kind='spans'.

    Raises:
      ValueError: a setting does not fit; the message names the key.
    """
    term = next((term for term in terms if term.spans is not None), None)
    if term is None:
        return
    name, options, teacher = f"objective.terms.{term.name}", config.data, config.teacher
    if teacher.cache:
        raise ValueError(
            f"{name} has kind='spans', for which the teacher reads tokens of its own, but teacher.cache={teacher.cache!r} has "
            f"values at the student's tokens. Leave teacher.cache empty, and set teacher.path."
        )
    if teacher.path in ("", STUDENT):
        raise ValueError(
            f"{name} has kind='spans', which compares the student with another model, but teacher.path={teacher.path!r}. Set the "
            f"folder of a teacher."
        )
    if "teacher" in make_views(config):
        raise ValueError(
            f"{name} has kind='spans' and teacher.view={name_of(teacher.view)!r}: a teacher with tokens of its own reads the row's "
            f"prompt. Set teacher.view.name='none'."
        )
    if config.student.init == "layers":
        raise ValueError(
            f"{name} has kind='spans', but student.init='layers' copies the teacher's embedding, so that both models have one "
            f"tokenizer. Choose a divergence, or another student.init."
        )
    if options.name == "text" or options.packing != "none":
        raise ValueError(
            f"{name} has kind='spans', which aligns the response of each row, but data.name={options.name!r} and data.packing="
            f"{options.packing!r} join rows. Choose a dataset with prompts, and data.packing='none'."
        )
    if rows := [other.name for other in terms if other.spans is not None and other.rows == "text"]:
        raise ValueError(
            f"objective.terms.{rows[0]} has kind='spans' and rows='text', but the second stream has no responses that can be "
            f"aligned. Set rows='all', 'data', 'teacher' or 'student'."
        )
    if config.sampling.teacher_share or "teacher" in source.authors:
        what = f"sampling.teacher_share={config.sampling.teacher_share:g}"
        if "teacher" in source.authors:
            what = f"prefixes.name={name_of(config.prefixes)!r}"
        raise ValueError(
            f"{name} has kind='spans', for which the teacher has tokens of its own, but with {what} the teacher samples tokens of "
            f"the student's vocabulary. Set prefixes.name='student' or 'teacher', and sampling.teacher_share=0."
        )
