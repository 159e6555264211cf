"""Settings of a run, typed and checked.

`keys` declares every key of a config once, `student_keys` those of the student, and `term_keys` those of a term.
`Settings.parse` turns a config into `Settings`. `declare` reads a config by such a declaration. This package does not
import JAX, because the help of the commands reads it first.
"""

from kd_jax.settings.declare import Config, defaults, is_open, is_section, keys_of, open_names
from kd_jax.settings.keys import Data, Member, Mesh, Sampling, Settings, Student, Teacher, Text, name_of
from kd_jax.settings.student_keys import Lora
from kd_jax.settings.term_keys import Policy, Spec, Term

__all__ = [
    "Config", "Data", "Lora", "Member", "Mesh", "Policy", "Sampling", "Settings", "Spec", "Student", "Teacher", "Term", "Text",
    "defaults", "is_open", "is_section", "keys_of", "name_of", "open_names",
]  # fmt: skip
