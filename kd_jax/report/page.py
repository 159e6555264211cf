"""Report sections as one HTML file that loads no other file."""

import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jinja2
import numpy as np

from kd_jax import storage
from kd_jax.data.words import words
from kd_jax.report import comparison, plots, sections

MOST = 200  # the largest number of generations on a page
TEMPLATE = Path(__file__).with_name("page.html")


def write(folders: Sequence[Path | str], out: Path | str = "") -> Path:
    """Writes the page of one folder, or a page of several folders that begins with their comparison.

    Args:
      folders: the folders, each of a finished run, an evaluation or an ablation.
      out: the file; empty for report.html in the folder, if there is only one.

    Returns:
      The path of the file.

    Raises:
      ValueError: a folder has no finished run, evaluation or ablation, or there are several folders and no `out`.
    """
    if not out and len(folders) != 1:
        raise ValueError(f"the page of {len(folders)} folders needs --out=FILE.html.")
    names = _names([Path(folder).resolve() for folder in folders])
    parts = [sections.read(Path(folder), name) for folder, name in zip(folders, names, strict=True)]
    path = Path(out) if out else Path(folders[0]) / "report.html"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "rows": _rows, "svg": plots.svg, "css": plots.css, "words": _words, "authors": _authors,
        "coloured": _coloured, "paired": partial(zip, strict=True),
    }  # fmt: skip
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    generations: Sequence[sections.Generation] = parts[0].generations
    if len(parts) > 1:
        generations = sections.merged([(part.name, part.generations) for part in parts])
    count, generations = len(generations), generations[:MOST]
    texts = [text for generation in generations for text in generation.texts]
    values = [value for text in texts for value in text.kl]
    page = template.render(
        title=", ".join(part.name for part in parts), sections=parts, comparisons=_comparisons(parts),
        generations=generations, all_generations=count,
        most=max(1.0, float(np.quantile(values, 0.95))) if values else 1.0, heaviest=_heaviest(texts),
    )  # fmt: skip
    storage.write_whole(path, page)
    return path


def _comparisons(parts: Sequence[sections.Section]) -> list[tuple[str, str, list[plots.Chart]]]:
    """Returns a comparison of the runs, and a comparison of the evaluations, each as a title, a table and charts.

    A kind with only one section has no comparison.
    """
    comparisons = []
    for kind in ("run", "evaluation"):
        of_kind = [part for part in parts if part.kind == kind]
        if len(of_kind) > 1:
            lines = [line for part in of_kind for line in part.lines]
            workdirs = [folder for part in of_kind for folder in part.workdirs]
            charts = comparison.charts({}, sections.COLUMNS, lines, workdirs)
            comparisons.append((f"{len(of_kind)} {kind}s", comparison.table(lines, sections.COLUMNS), charts))
    return comparisons


def _rows(markdown: str) -> list[list[list[str]]]:
    """Returns the tables of a Markdown text as rows of cells.

    The line below the head of a table, and the text between tables, are omitted.
    """
    tables: list[list[list[str]]] = [[]]
    for line in markdown.splitlines():
        if not line.startswith("|"):
            tables += [[]] if tables[-1] else []
        elif not line.startswith("|-"):
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    return [table for table in tables if table]


def _names(folders: Sequence[Path]) -> list[str]:
    """Returns the names of the folders: the last parts of the paths, or longer parts if two last parts are equal.

    Raises:
      ValueError: a folder occurs twice.
    """
    last_parts = [folder.name for folder in folders]
    if len(set(last_parts)) == len(last_parts):
        return last_parts
    if len(set(folders)) < len(folders):
        raise ValueError(f"a folder is named twice; name each folder once: {', '.join(map(str, folders))}.")
    common = os.path.commonpath(folders)
    return [str(folder.relative_to(common)) for folder in folders]


def _authors(generations: Sequence[sections.Generation]) -> list[str]:
    return list(dict.fromkeys(text.who for generation in generations for text in generation.texts))


def _coloured(generations: Sequence[sections.Generation]) -> bool:
    return any(text.kl for generation in generations for text in generation.texts)


def _heaviest(texts: Sequence[sections.Text]) -> dict[str, float]:
    """Returns the largest finite weight of a token under each term, by the name of the term."""
    most: dict[str, float] = {}
    for text in texts:
        for name, weights in text.weights.items():
            most[name] = max(0.0, most.get(name, 0.0), *(value for value in weights if math.isfinite(value)))
    return most


def _words(text: str) -> int:
    return len(words(text))
