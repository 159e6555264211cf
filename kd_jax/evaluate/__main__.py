"""python -m kd_jax.evaluate --model=FOLDER --data=NAME-OR-FILE --out=DIR [--teacher=FOLDER] ...

Leaves in DIR report.html, table.md, results.jsonl (a line a generation seed, and one of all) and generations.jsonl (every text).
"""

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kd_jax import data, metrics, models, remote, report, rollouts, setup, sharding
from kd_jax.data import jsonl
from kd_jax.evaluate import harness, texts, tokens
from kd_jax.evaluate.tables import PLACES, by_place, over_seeds, table
from kd_jax.value_types import EXPECTED, whole_number


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kd_jax.evaluate",
        description="A model's texts against references, and its distributions against a teacher's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.register("type", int, _whole_number)  # what type=int means below
    add = parser.add_argument
    add("--model", required=True, help="a Hugging Face folder, a work directory of a finished run, or package:NAME")
    add("--teacher", default="", help="the same, to compare with; empty: nothing is compared")
    add(
        "--data",
        required=True,
        help=f"a file of JSON lines, or a dataset's name: docstrings, dolly, gsm8k, {', '.join(data.EVALUATION)}",
    )
    add("--out", required=True, help="a new folder for the results")
    add("--split", default="test", help="of a named dataset")
    add(
        "--data_path", default="", help="of a named dataset that would otherwise be downloaded: its file or folder here"
    )
    add("--data_sha256", default="", help="of that file, or of the download, where kd_jax does not know it")
    add("--data_dir", default="", help="where built datasets are; empty: tensorflow_datasets' default")
    add("--rows", type=int, default=0, help="the first so many; 0: all")
    add("--prompt_field", default="prompt", help="of a file")
    add("--context_field", default="", help="of a file; empty: there is none")
    add("--reference_field", default="response", help="of a file: a text, or a list of texts that are all good answers")
    add("--template", default="plain", choices=data.TEMPLATES, help="how prompts are written")
    add("--max_prompt_length", type=int, default=256, help="tokens; longer prompts are cut to their first so many")
    add("--max_new_tokens", type=int, default=256, help="of a response")
    add("--temperature", type=float, default=1.0, help="0: the likeliest token")
    add("--top_p", type=float, default=1.0, help="the likeliest tokens that hold this mass; 1: all")
    add("--top_k", type=int, default=0, help="the likeliest so many tokens; 0: all")
    add("--no_repeat_ngram_size", type=int, default=0, help="MiniLLM's and DistiLLM's evaluation has 6")
    add("--seeds", default="10,20,30,40,50", help="of generation, the papers' five; empty: nothing is generated")
    add("--numbers", action="store_true", help="count the answers whose last number is the reference's, as for GSM8K")
    add("--lm_eval", default="", help="tasks of EleutherAI's lm-eval, with commas between; pip install 'lm-eval[hf]'")
    add("--lm_eval_path", default="", help="a folder with lm-eval tasks of your own")
    add("--lm_eval_limit", type=int, default=0, help="the first so many prompts of each of these tasks; 0: all")
    add("--batch_size", type=int, default=32, help="prompts at a time")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of parameters and computation")
    add("--fsdp", type=int, default=1, help="devices that divide the parameters")
    add("--tensor", type=int, default=1, help="devices that divide each matrix")
    return parser.parse_args(argv)


def _whole_number(text: str) -> int:
    try:
        return whole_number(text)
    except ValueError:  # whose message argparse would replace
        raise argparse.ArgumentTypeError(f"{text!r} is not {EXPECTED[int]}.") from None


@dataclasses.dataclass(frozen=True)
class Models:
    """A model and its teacher, or None, on a mesh."""

    mesh: jax.sharding.Mesh
    tokenizer: data.Tokenizer
    model: models.Model
    params: Any
    teacher: models.Model | None
    teacher_params: Any

    @property
    def both(self) -> tuple[models.Model, Any, models.Model | None, Any]:
        """As `texts.assess` takes them."""
        return self.model, self.params, self.teacher, self.teacher_params


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates, writes the results, and returns what stands in the last line of results.jsonl.

    Raises:
      ValueError: whatever is wrong, before anything is computed or written.
    """
    with remote.work_directory(args.out, writes=jax.process_index() == 0) as (out, _):
        return _run(args, Path(out))


def _run(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out={out} has something in it; choose a new folder.")
    seeds = _seeds(args.seeds)
    lm_eval = None
    if args.lm_eval:
        options = {"batch_size": args.batch_size, "limit": args.lm_eval_limit or None}
        lm_eval = harness.make(args.lm_eval, args.lm_eval_path, dtype=args.dtype, **options)
    of = load(args)
    rows = read_rows(args)
    examples = texts.read_examples(
        rows, of.tokenizer, template=args.template, max_prompt_length=args.max_prompt_length, cut=True
    )
    # First, since a task may have to be downloaded, and that may fail.
    tasks = lm_eval(model_folder(args.model)) if lm_eval is not None and jax.process_index() == 0 else []
    given = tokens.collect(
        *of.both, given_batches(args, of.tokenizer, rows), of.mesh, vocab_size=of.tokenizer.vocab_size
    )
    lines, written, own = [], [], []
    for seed in seeds:
        line, its_texts, its_tokens = texts.assess(
            make_sampler(args, of), of.both, examples, batch_size=args.batch_size, seed=seed, numbers=args.numbers,
            progress=lambda it, seed=seed: metrics.tqdm(it, desc=f"seed {seed}", unit="batch"),
        )  # fmt: skip
        lines.append({"seed": seed} | line)
        written += its_texts
        own.append(its_tokens)
    found: dict[str, Any] = {"rows": len(examples), "given": tokens.summary(given), "seeds": over_seeds(lines)}
    if of.teacher is not None:
        places = {"given": by_place(given)} | ({"own": by_place(_joined(own))} if own else {})
        found["by_place"] = {"places": PLACES, **places}
    found |= {"lm_eval": tasks} if tasks else {}
    found["arguments"] = vars(args)
    if jax.process_index() == 0:
        out.mkdir(parents=True, exist_ok=True)
        for name, entries in (("generations", written), ("results", [*lines, found])):
            content = "".join(json.dumps(entry) + "\n" for entry in entries)
            (out / f"{name}.jsonl").write_text(content, encoding="utf-8")
        (out / "table.md").write_text(table(found) + "\n", encoding="utf-8")
        report.write_environment(out)
        report.write([out])
    return found


def load(args: argparse.Namespace) -> Models:
    """The models that the arguments name, on the mesh, checked against each other and the lengths."""
    mesh = sharding.make_mesh(-1, args.fsdp, args.tensor)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if args.batch_size < 1 or args.batch_size % ways:
        raise ValueError(
            f"--batch_size={args.batch_size} must be a multiple of the {ways} devices that divide a batch."
        )
    folder, place = model_folder(args.model), partial(sharding.tree_shardings, mesh)
    tokenizer = data.Tokenizer.load(folder)
    model, params = models.load_pretrained(folder, dtype=args.dtype, shardings=place)
    teacher, teacher_params = None, None
    if args.teacher:
        folder = model_folder(args.teacher)
        setup.check_same_tokenizer(folder, tokenizer, "teacher")
        teacher, teacher_params = models.load_pretrained(folder, dtype=args.dtype, shardings=place)
    room = min(m.config.max_positions for m in (model, teacher) if m is not None)
    if args.max_prompt_length + args.max_new_tokens > room:
        raise ValueError(
            f"--max_prompt_length={args.max_prompt_length} and --max_new_tokens={args.max_new_tokens} are more than the {room} "
            f"positions that the models have; lower one of them."
        )
    return Models(mesh, tokenizer, model, params, teacher, teacher_params)


def model_folder(path: str) -> Path:
    """A work directory's student, or the folder itself."""
    folder = setup.folder(path)
    return folder / "student" if (folder / "student" / "config.json").exists() else folder


def read_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows with prompt, context and references, of a file or of a dataset by name."""
    if args.data.endswith((".jsonl", ".jsonl.gz", ".json")):
        path = remote.local_file(args.data)
        if not path.is_file():
            raise ValueError(f"there is no file --data={path}.")
        fields = {"prompt": args.prompt_field, "references": args.reference_field}
        fields |= {"context": args.context_field} if args.context_field else {}
        rows = list(jsonl.read_references(path, fields))
    else:
        if args.data in data.EVALUATION and args.template != "plain":
            raise ValueError(
                f"--template={args.template}, but the prompts of --data={args.data} have Alpaca's already: leave it at plain, or "
                f"name a file in --data and its fields instruction and input in --prompt_field and --context_field."
            )
        options = {"path": args.data_path, "sha256": args.data_sha256}
        options = {name: value for name, value in options.items() if value}
        rows = data.load_references(args.data, split=args.split, data_dir=args.data_dir or None, **options)
    return rows[: args.rows] if args.rows else rows


def given_batches(args: argparse.Namespace, tokenizer: data.Tokenizer, rows: list[dict[str, Any]]) -> Any:
    """Prompts with their first references, in the rows' order."""
    length = args.max_prompt_length + args.max_new_tokens
    responses = [row | {"response": row["references"][0]} for row in rows]
    given, _ = data.tokenize(
        responses, tokenizer, template=args.template, max_length=length, max_prompt_length=args.max_prompt_length,
        long_prompts="cut",
    )  # fmt: skip
    batches = data.batches(
        given, batch_size=args.batch_size, max_length=length, seed=0, shuffle=False, num_epochs=1,
        pad_id=tokenizer.pad_id, process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    return metrics.tqdm(batches, desc="given text", unit="batch", total=-(-len(given) // args.batch_size))


def make_sampler(args: argparse.Namespace, of: Models) -> rollouts.Sampler:
    """How the arguments say that responses are drawn."""
    return rollouts.Sampler(
        of.mesh, of.tokenizer, args.max_prompt_length + args.max_new_tokens, args.max_new_tokens, args.temperature,
        args.top_p, args.top_k, args.no_repeat_ngram_size,
    )  # fmt: skip


def main() -> None:
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache/kd_jax/xla"))
    args = arguments()
    try:
        print(table(run(args)))
        print(f"\nwrote {args.out}/report.html")
    except (ValueError, OSError) as error:
        sys.exit(f"kd_jax.evaluate: {error}")


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",") if seed.strip()]
    except ValueError:
        raise ValueError(f"--seeds={text!r} must be whole numbers with commas between.") from None


if __name__ == "__main__":
    main()
