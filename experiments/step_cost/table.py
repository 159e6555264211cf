"""Prints the tables of README.md from the files of JSON lines in this folder.

python -m experiments.step_cost.table
"""

import json
import statistics
from pathlib import Path

HERE = Path(__file__).parent


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


def losses() -> list[list[str]]:
    """Returns a row per loss.

    The columns are time and memory relative to full logits, time relative to the products, and memory at three sizes.
    """
    full = {line["loss"]: line for line in read("losses.jsonl") if "full_cpu_s" in line}
    products = {line["loss"]: line for line in read("losses.jsonl") if "products_cpu_s" in line}
    memory = {(line["loss"], line["tokens"], line["vocab"]): line["chunked_temp_mb"] for line in read("memory.jsonl")}
    rows = [["loss", "CPU s", "of full", "full's memory / ours", "of products", "MB", "N = 16,384", "and V = 131,072"]]
    for name, line in full.items():
        sizes = [memory[name, *job] for job in ((4096, 32768), (16384, 32768), (16384, 131072))]
        ratios = [f"{line['time_ratio']:.2f}", f"{line['memory_ratio']:.1f}", f"{products[name]['time_ratio']:.2f}"]
        rows.append([name, f"{line['chunked_cpu_s']:.2f}", *ratios, *(f"{size:.1f}" for size in sizes)])
    return rows


def of_forward_kl() -> list[list[str]]:
    """Returns a row per loss, with its time and planned memory relative to forward KL, which ran alternately with it."""
    rows = [["loss", "CPU s", "of forward KL", "MB", "of forward KL"]]
    for line in read("divergences.jsonl"):
        memory = line["chunked_temp_mb"] / line["forward_kl_temp_mb"]
        time = f"{line['chunked_cpu_s']:.2f}", f"{line['time_ratio']:.2f}"
        rows.append([line["loss"], *time, f"{line['chunked_temp_mb']:.1f}", f"{memory:.2f}"])
    return rows


def peers(name: str, by: tuple[str, ...], columns: dict[str, str]) -> list[list[str]]:
    """Returns a row per implementation, with the minimum of each column over the rounds."""
    groups: dict[tuple, list[dict]] = {}
    for line in read(name):
        groups.setdefault(tuple(line[key] for key in by), []).append(line)
    rows = [[*by, *columns.values(), "rounds"]]
    for key, lines in groups.items():
        least = [f"{min(line[column] for line in lines if column in line):,}" for column in columns]
        rows.append([*map(str, key), *least, str(len(lines))])
    return rows


def quickstart() -> list[list[str]]:
    rows = [["compilation", "trace, s", "lower, s", "compile, s", "in all, s"]]
    for line in read("quickstart.jsonl"):
        kind = "from the cache" if line["cached"] else "cold"
        rows.append([kind, *(str(line[f"{part}_s"]) for part in ("trace", "lower", "compile", "compile_in_all"))])
    return rows


def markdown(rows: list[list[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, f"| --- |{' --: |' * (len(rows[0]) - 1)}", *body]) + "\n"


def main() -> None:
    print(markdown(losses()))
    print(markdown(of_forward_kl()))
    masked = [["loss", "mesh", "half masked / none masked"]]
    for line in read("masked.jsonl"):
        masked.append(
            [f"{line['loss']}, N = {line['tokens']:,}", line["mesh"] or "one device", str(line["time_ratio"])]
        )
    print(markdown(masked))
    print(
        markdown(
            peers(
                "peers.jsonl",
                ("impl", "loss"),
                {"cpu_s": "CPU s", "wall_s": "wall s", "peak_over_mb": "peak over start, MB"},
            )
        )
    )
    step = {"cpu_s_min": "CPU s a step", "step_s_min": "wall s", "peak_over_before_mib": "peak over start, MiB"}
    print(markdown(peers("steps.jsonl", ("impl",), step)))
    print(markdown(quickstart()))
    waits = [line["pipeline_over_memory"] for line in read("quickstart.jsonl") if "pipeline_over_memory" in line]
    print("pipeline over memory, wall:", statistics.median(waits))


if __name__ == "__main__":
    main()
