"""python -m kd_jax.evaluate --model=FOLDER [--data=NAME-OR-FILE] --out=DIR [--teacher=FOLDER] ...

If --model is the work directory of a finished run, or its exported student, then the run's dataset, template and
lengths are the defaults. The command writes to DIR:

- report.html and table.md,
- results.jsonl, with one line for each generation seed and a last line for all seeds,
- generations.jsonl, with every generated text.
"""

import dataclasses
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from jaxtyping import PyTree

from kd_jax import command, data, metrics, models, report, sharding, storage
from kd_jax.data import counts, jsonl
from kd_jax.data.scores import rouge_tokens
from kd_jax.data.shared import check_same_tokenizer, fit_tokenizer
from kd_jax.evaluate import arguments, harness, texts, tokens
from kd_jax.evaluate.of_run import filled, model_folder, template_of
from kd_jax.evaluate.tables import PLACES, by_place, over_seeds, table
from kd_jax.prefixes import rollouts
from kd_jax.settings import Sampling
from kd_jax.settings.value_types import whole_number
from kd_jax.storage import remote
from kd_jax.storage.files import Json


@dataclasses.dataclass(frozen=True)
class Models:
    """A model and its teacher on a mesh. The teacher and its parameters may be None."""

    mesh: jax.sharding.Mesh
    tokenizer: data.Tokenizer
    model: models.Model
    params: PyTree
    teacher: models.Model | None
    teacher_params: PyTree

    @property
    def models_and_params(self) -> tuple[models.Model, PyTree, models.Model | None, PyTree]:
        """The model, its parameters, the teacher, and the teacher's parameters, in the order of `texts.assess`."""
        return self.model, self.params, self.teacher, self.teacher_params


def run(args: SimpleNamespace) -> Json:
    """Evaluates the model, writes the results, and returns the last line of results.jsonl.

    Raises:
      ValueError: an argument or a file is wrong. Every check comes before anything is computed or written.
    """
    with storage.room(args.out), remote.work_directory(args.out, writes=jax.process_index() == 0) as (out, _):
        return _run(args, Path(out))


def _run(args: SimpleNamespace, out: Path) -> Json:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out={out} is not empty; choose a new folder.")
    for name in ("rows", "lm_eval_limit"):
        if (value := getattr(args, name)) < 0:
            raise ValueError(f"--{name}={value} must be at least 0; 0 means no limit.")
    args, notes = filled(args)
    template, seeds = template_of(args), _seeds(args.seeds)
    for line in notes if jax.process_index() == 0 else ():
        metrics.tqdm.write(line)
    lm_eval = None
    if args.lm_eval:
        options = {"batch_size": args.batch_size, "limit": args.lm_eval_limit or None}
        lm_eval = harness.make(args.lm_eval, args.lm_eval_path, dtype=args.dtype, **options)
    loaded = load(args)
    rows = read_rows(args)
    examples = texts.read_examples(
        rows, loaded.tokenizer, template=template, max_prompt_length=args.max_prompt_length, cut=True
    )
    # The tasks come first, because the download of a task may fail.
    tasks = lm_eval(model_folder(args.model, "--model")) if lm_eval is not None and jax.process_index() == 0 else []
    batches, prompts = given_batches(args, loaded.tokenizer, rows)
    given = tokens.collect(*loaded.models_and_params, batches, loaded.mesh, vocab_size=loaded.tokenizer.vocab_size)
    lines, written, own = [], [], []
    for seed in seeds:
        line, seed_texts, seed_tokens = texts.assess(
            make_sampler(args, loaded), loaded.models_and_params, examples, batch_size=args.batch_size, seed=seed,
            numbers=args.numbers,
            progress=lambda starts, seed=seed: metrics.tqdm(starts, desc=f"seed {seed}", unit="batch"),
        )  # fmt: skip
        lines.append({"seed": seed} | line)
        written += seed_texts
        own.append(seed_tokens)
    results: Json = {
        "rows": len(examples),
        "prompts": prompts,
        "given": tokens.summary(given),
        "seeds": over_seeds(lines),
    }
    if lines:
        results["rouge_l_words"] = rouge_tokens(text for example in examples for text in example.references)
    if loaded.teacher is not None:
        places = {"given": by_place(given)} | ({"own": by_place(_joined(own))} if own else {})
        results["by_place"] = {"places": PLACES, **places}
    results |= {"lm_eval": tasks} if tasks else {}
    results["arguments"] = vars(args)
    if jax.process_index() == 0:
        out.mkdir(parents=True, exist_ok=True)
        for name, entries in (("generations", written), ("results", [*lines, results])):
            storage.write_json_lines(out / f"{name}.jsonl", entries)
        storage.write_whole(out / "table.md", table(results) + "\n")
        report.write_environment(out)
        report.write([out])
    return results


def load(args: SimpleNamespace) -> Models:
    """Returns the models that the arguments name, on the mesh.

    Raises:
      ValueError: the batch size does not divide over the devices, or a model or a tokenizer is invalid, or the models
        have different tokenizers, or a model does not accept the requested lengths.
    """
    mesh = sharding.make_mesh(-1, args.fsdp, args.tensor)
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if args.batch_size < 1 or args.batch_size % devices:
        raise ValueError(
            f"--batch_size={args.batch_size} must be a multiple of the {devices} devices that divide a batch."
        )
    folder, shardings = model_folder(args.model, "--model"), partial(sharding.tree_shardings, mesh)
    teacher_folder = model_folder(args.teacher, "--teacher") if args.teacher else None  # before loading
    tokenizer = data.with_template_end(data.Tokenizer.load(folder), template_of(args))
    model, params = models.load_pretrained(folder, dtype=args.dtype, shardings=shardings)
    tokenizer = fit_tokenizer(args.model, model.config.vocab_size, tokenizer, "model")
    teacher, teacher_params = None, None
    if teacher_folder:
        tokenizer = check_same_tokenizer(teacher_folder, tokenizer, "teacher")
        teacher, teacher_params = models.load_pretrained(teacher_folder, dtype=args.dtype, shardings=shardings)
        tokenizer = fit_tokenizer(args.teacher, teacher.config.vocab_size, tokenizer, "teacher")
    longest = min(m.config.max_positions for m in (model, teacher) if m is not None)
    if args.max_prompt_length + args.max_new_tokens > longest:
        raise ValueError(
            f"--max_prompt_length={args.max_prompt_length} and --max_new_tokens={args.max_new_tokens} are together "
            f"more than the {longest} tokens that both models accept; lower one of the flags."
        )
    return Models(mesh, tokenizer, model, params, teacher, teacher_params)


def read_rows(args: SimpleNamespace) -> list[Json]:
    """Returns the rows of a file or of a named dataset, with prompt, context and references."""
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
                f"--template={args.template}, but the prompts of --data={args.data} already have the Alpaca template: "
                "use --template=plain, or name a file in --data and its fields instruction and input in "
                "--prompt_field and --context_field."
            )
        options = {"path": args.data_path, "sha256": args.data_sha256}
        options = dict(args.data_options) | {name: value for name, value in options.items() if value}
        rows = data.load_references(args.data, split=args.split, data_dir=args.data_dir or None, **options)
    return rows[: args.rows] if args.rows else rows


def given_batches(
    args: SimpleNamespace, tokenizer: data.Tokenizer, rows: list[Json]
) -> tuple[Iterable[dict[str, np.ndarray]], dict[str, int]]:
    """Returns batches of the prompts with their first references, in the rows' order, and the counts of the rows.

    The counts are the numbers of rows that were read, truncated and dropped. The counts are also printed.
    """
    length = args.max_prompt_length + args.max_new_tokens
    responses = [row | {"response": row["references"][0]} for row in rows]
    given, row_counts = data.tokenize(
        responses, tokenizer, template=template_of(args), max_length=length, max_prompt_length=args.max_prompt_length,
        long_prompts="cut",
    )  # fmt: skip
    batches = data.batches(
        given, batch_size=args.batch_size, max_length=length, seed=0, shuffle=False, num_epochs=1,
        pad_id=tokenizer.pad_id, process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    row_counts = counts.with_length(row_counts, responses, tokenizer, template_of(args))
    if jax.process_index() == 0:
        advice = {
            "prompts": f"Raise --max_prompt_length={args.max_prompt_length}.",
            "responses": f"Raise --max_new_tokens={args.max_new_tokens}, which also limits the references.",
        }
        for line in (counts.sentence(args.data, row_counts), *counts.warnings(args.data, row_counts, **advice)):
            metrics.tqdm.write(line)
    total = -(-len(given) // args.batch_size)
    return metrics.tqdm(batches, desc="given text", unit="batch", total=total), row_counts


def make_sampler(args: SimpleNamespace, loaded: Models) -> rollouts.Sampler:
    """Returns the sampler of responses that the arguments describe."""
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.top_k)
    max_length = args.max_prompt_length + args.max_new_tokens
    return rollouts.make_sampler(loaded.mesh, loaded.tokenizer, max_length, sampling, args.no_repeat_ngram_size)


def main() -> None:
    command.start()
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache/kd_jax/xla"))
    args = arguments.parse(sys.argv[1:])
    with command.ends_well("kd_jax.evaluate", lambda: f"no results are saved, and {args.out} is unchanged"):
        print(table(run(args)))
        print(f"\nwrote {args.out}/report.html")


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _seeds(text: str) -> list[int]:
    try:
        seeds = [whole_number(seed) for seed in text.split(",") if seed.strip()]
    except ValueError:
        raise ValueError(f"--seeds={text!r} must be whole numbers, separated by commas.") from None
    if any(not 0 <= seed < 2**32 for seed in seeds):
        raise ValueError(f"--seeds={text!r} must be at least 0 and below {2**32}.")
    return seeds


if __name__ == "__main__":
    main()
