"""Writes the student of a run to a folder, such as the packaged teacher's folder, in bfloat16.

python -m experiments.docstrings_teacher.export runs/docstrings_teacher kd_jax/assets/docstrings_teacher
"""

import shutil
import sys
from pathlib import Path

import jax.numpy as jnp

from kd_jax import data, models


def main(workdir: str, out: str) -> None:
    source = Path(workdir) / "student"
    model, params = models.load_pretrained(source)
    tokenizer = data.Tokenizer.load(source)
    fresh = Path(out).with_suffix(".new")
    models.save_pretrained(fresh, model, params, tokenizer, dtype=jnp.bfloat16)
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
    print(out, sum(file.stat().st_size for file in Path(out).iterdir()), "bytes")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
