"""Tables of an evaluation: numbers over seeds, along a response, and as Markdown."""

import statistics

import numpy as np

from kd_jax import metrics
from kd_jax.report.comparison import rouge_line
from kd_jax.storage.files import Json

BUCKETS = (0, 4, 16, 64, 256)  # the first position of each part of a response for which exposure bias is shown
PLACES = tuple(f"{a + 1} to {b}" for a, b in zip(BUCKETS, (*BUCKETS[1:], "..."), strict=True))


def over_seeds(lines: list[dict[str, float]]) -> dict[str, tuple[float, float | None]]:
    """Returns the mean and standard deviation of each number over the seeds. The deviation of one seed is None."""
    columns = {name: [line[name] for line in lines] for name in (lines[0] if lines else ()) if name != "seed"}
    return {n: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else None) for n, v in columns.items()}


def by_place(values: dict[str, np.ndarray]) -> dict[str, list[float | None]]:
    """Returns means over the parts of a response that begin at `BUCKETS`, and None for a part without tokens."""
    bucket = np.searchsorted(BUCKETS, values["place"], side="right")
    inside = [bucket == i for i in range(1, len(BUCKETS) + 1)]
    names = ("forward_kl", "reverse_kl", "total_variation")
    return {name: [float(values[name][i].mean()) if i.any() else None for i in inside] for name in names}


def table(results: Json) -> str:
    """Returns the results of an evaluation as Markdown.

    The tables are: scores of the written texts, distributions on given and own text, their difference along a response,
    and scores on the tasks of lm-eval.
    """
    seeds = results["seeds"]
    has_own = any(name.startswith("own_") for name in seeds)
    parts = []
    if seeds:
        scores = [[name, _spread(*spread)] for name, spread in seeds.items() if not name.startswith("own_")]
        parts.append(metrics.table([["written text", f"{results['rows']} prompts"], *scores]))
        parts.append(rouge_line(results["rouge_l_words"]))
    rows = [["tokens", "given text", *(("own text",) if has_own else ())]]
    for name, value in results["given"].items():
        spread = seeds.get(f"own_{name}")
        rows.append([name, f"{value:.4f}", *((_spread(*spread) if spread else "",) if has_own else ())])
    parts.append(metrics.table(rows))
    if "own" in (places := results.get("by_place", {})):
        number = lambda value: "" if value is None else f"{value:.4f}"
        rows = [["KL(q, p) by place", "given text", "own text", "exposure bias"]]
        for place, given, own in zip(PLACES, places["given"]["reverse_kl"], places["own"]["reverse_kl"], strict=True):
            bias = None if given is None or own is None else own - given
            if given is not None or own is not None:
                rows.append([place, number(given), number(own), number(bias)])
        parts.append(metrics.table(rows))
    if tasks := results.get("lm_eval"):
        rows = [["lm-eval", "metric", "shots", "prompts", "score"]]
        for score in tasks:
            error = "" if score["error"] is None else f" ± {score['error']:.4f}"
            counts = ("" if score[name] is None else str(score[name]) for name in ("shots", "prompts"))
            rows.append([score["task"], score["metric"], *counts, f"{score['value']:.4f}{error}"])
        parts.append(metrics.table(rows))
    return "\n\n".join(parts)


def _spread(mean: float, deviation: float | None) -> str:
    return f"{mean:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")
