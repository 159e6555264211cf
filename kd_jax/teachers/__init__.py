"""The teachers: one protocol for a model that runs with the student, and for a cache that was written before the run.

Code outside this package uses `as_teacher`, `for_terms` and `compare`, and never asks which kind of teacher it has. The
kinds are `Online` (a model), `Viewed` (a model that reads another prompt),
`Aligned` (a model with another tokenizer), `CachedHidden`, `CachedTopK` and
`CachedSamples` (the three kinds of a cache), and `NoTeacher`. The module `cache_files` writes the files of a cache, and
`cache_reading` opens them. `Student` is the student as a training step runs it beside the teachers.
"""

from kd_jax.teachers.aligned import Aligned
from kd_jax.teachers.cached import CachedHidden, CachedSamples, CachedTopK
from kd_jax.teachers.compare import as_teacher, compare, for_terms
from kd_jax.teachers.online import Online
from kd_jax.teachers.protocol import NoTeacher, Outputs, Teacher, teacher_arrays
from kd_jax.teachers.student import Student
from kd_jax.teachers.viewed import Viewed

__all__ = [
    "Aligned",
    "CachedHidden",
    "CachedSamples",
    "CachedTopK",
    "NoTeacher",
    "Online",
    "Outputs",
    "Student",
    "Teacher",
    "Viewed",
    "as_teacher",
    "compare",
    "for_terms",
    "teacher_arrays",
]
