"""From a config to a trained student: `build` assembles a run and runs nothing, `train` is the loop."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from kd_jax import checkpoint, data, evaluate, metrics, models, resolve, schedules, sharding, speed
from kd_jax.objectives import Term, make_terms
from kd_jax.setup import Models, check_mesh, check_numbers, load_data, load_models, load_tokenizer
from kd_jax.train_step import TrainState, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, assembled. A notebook steps it by hand; `train` does so with logs and checkpoints.

    Attributes:
      config: the resolved config.
      mesh: of all devices.
      tokenizer: of teacher and student.
      models: teacher and student, and the teacher's parameters.
      terms: of the objective.
      learning_rate: step -> value.
      init_state: makes the state before the first step. The student's initial parameters are made here.
      abstract_state: the state's shapes and shardings.
      train_step: (state, teacher_params, batch) -> (state, metrics), jitted; the state is donated.
      train_batches: an endless iterator of numpy batches whose position can be saved.
      eval_batches: makes an iterator that goes once over the held-out rows.
      counts: what became of the rows of each split.
    """

    config: Any
    mesh: jax.sharding.Mesh
    tokenizer: data.Tokenizer
    models: Models
    terms: tuple[Term, ...]
    learning_rate: Callable[[Any], Any]
    init_state: Callable[[], TrainState]
    abstract_state: TrainState
    train_step: Callable[..., Any]
    train_batches: Any
    eval_batches: Callable[[], Iterator[dict[str, np.ndarray]]]
    counts: dict[str, Any]

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A numpy batch onto the mesh."""
        return sharding.put_batch(self.mesh, batch)

    def evaluate(self, params: Any) -> dict[str, float]:
        """The student with these parameters on the held-out rows, see `evaluate.token_sums`."""
        return self._evaluate(self.models.student, params, self.models.teacher, self.models.teacher_params)

    def evaluate_teacher(self) -> dict[str, float]:
        """The teacher's cross-entropy and perplexity on the held-out rows."""
        return self._evaluate(self.models.teacher, self.models.teacher_params, None, None)

    def _evaluate(self, student: Any, params: Any, teacher: Any, teacher_params: Any) -> dict[str, float]:
        return evaluate.evaluate(
            student, params, teacher, teacher_params, self.eval_batches(), self.mesh,
            vocab_size=self.tokenizer.vocab_size, chunk=self.config.loss.chunk or None,
        )  # fmt: skip


def build(config: Any) -> Run:
    """Assembles a run, and finds whatever is wrong with the config before anything is trained or written.

    Args:
      config: an ml_collections.ConfigDict with the keys of `configs/base.py`.

    Raises:
      ValueError: whatever is wrong, in a paragraph that names the value and what would be right.
    """
    check_numbers(config)
    terms = make_terms(config.objective.terms, config.objective.temperature)
    if absent := [term.name for term in terms if term.rows in ("teacher", "student")]:
        raise ValueError(
            f"objective.terms.{absent[0]}.rows={config.objective.terms[absent[0]].rows!r} counts no row: all are data's."
        )
    learning_rate = resolve.build(config.learning_rate, schedules)
    tx = resolve.build(config.optimizer, optax, learning_rate=learning_rate)
    if config.clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(resolve.check_number("clip_norm", config.clip_norm, 0.0)), tx)
    mesh = sharding.make_mesh(**config.mesh)
    check_mesh(config, mesh)
    tokenizer = load_tokenizer(config)
    needs_teacher = any(term.needs_teacher for term in terms)
    loaded = load_models(config, tokenizer, mesh, needs_teacher)
    train_rows, eval_rows, counts = load_data(config, tokenizer, min(loaded.max_positions, config.data.max_length))

    step = make_train_step(
        loaded.student, loaded.teacher, terms, tx, vocab_size=tokenizer.vocab_size,
        temperature=config.objective.temperature, microbatches=config.microbatches, chunk=config.loss.chunk or None,
        mesh=mesh,
    )  # fmt: skip
    key = jax.random.key(config.seed)
    make_state = partial(init_state, tx=tx, terms=terms)
    abstract_state = jax.eval_shape(make_state, loaded.student.abstract_params(), key=key)
    placed = sharding.tree_shardings(mesh, abstract_state)

    def fresh_state() -> TrainState:
        params = loaded.init_student(jax.random.fold_in(key, 0))
        return jax.jit(make_state, out_shardings=placed)(params, key=key)

    batch_options = dict(
        max_length=config.data.max_length, seed=config.seed, pad_id=tokenizer.pad_id,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    train_batches = iter(data.batches(train_rows, batch_size=config.data.batch_size, **batch_options))
    held_out = data.batches(
        eval_rows, batch_size=config.data.eval_batch_size, shuffle=False, num_epochs=1, **batch_options
    )
    return Run(
        config=config, mesh=mesh, tokenizer=tokenizer, models=loaded, terms=terms, learning_rate=learning_rate,
        init_state=fresh_state, abstract_state=sharding.with_shardings(abstract_state, placed),
        train_step=jax.jit(step, donate_argnums=0, out_shardings=(placed, None)), train_batches=train_batches,
        eval_batches=lambda: iter(held_out), counts=counts,
    )  # fmt: skip


def train(config: Any, workdir: str, quiet: bool = False) -> dict[str, dict[str, float]]:
    """Trains, evaluates, and leaves in `workdir` metrics, checkpoints, plots, samples and the student's folder.

    The same call on the same directory goes on where it was stopped, with the numbers of a run that never was.

    Args:
      config: as in `build`.
      workdir: of this run; made if it does not exist.
      quiet: no progress bar.

    Returns:
      {"teacher": ..., "before": ..., "after": ...}, each what `Run.evaluate` returns.

    Raises:
      ValueError: before anything is written, if the config is wrong, or if the directory belongs to another one.
      FloatingPointError: the loss is not finite.
    """
    resolved = config.to_dict()
    check_workdir(workdir, resolved)
    run = build(config)
    # A new run reads its student before it writes anything; a resumed one has no use for an initial state.
    state = None if checkpoint.has_steps(workdir) else run.init_state()
    checkpoint.write_config(workdir, resolved)
    with checkpoint.open_manager(workdir, config.keep_checkpoints) as manager:
        if state is None:
            state = checkpoint.restore(manager, run.abstract_state, run.train_batches)
        tqdm_write(environment(run, state))
        with metrics.Writer(workdir, int(state.step)) as writer:
            state = _loop(run, state, workdir, writer, manager, quiet)
    return _finish(run, state, workdir)


def check_workdir(workdir: str, resolved: dict[str, Any]) -> None:
    """Refuses a directory of another run, or one with something else in it, and says what differs."""
    difference = checkpoint.config_difference(workdir, resolved)
    if difference:
        raise ValueError(
            f"the work directory {workdir} belongs to another config. Choose another --workdir, or take these back:\n  "
            + "\n  ".join(difference)
        )
    folder = Path(workdir)
    if difference is None and folder.exists() and (not folder.is_dir() or checkpoint.foreign_files(folder)):
        raise ValueError(f"the work directory {workdir} has something else in it; choose an empty or a new one.")


def environment(run: Run, state: TrainState) -> str:
    """One line: devices, mesh, parameter counts, rows."""
    device = jax.devices()[0]
    mesh = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    teacher = f"teacher {_count(run.models.teacher_params)}" if run.models.teacher else "no teacher"
    rows = "; ".join(f"{split} {counts}" for split, counts in run.counts.items())
    return (
        f"{len(jax.devices())} {device.platform} device(s), {jax.process_count()} process(es) | mesh {mesh} | {teacher}, "
        f"student {_count(state.params)} parameters | {rows} | step {int(state.step)} of {run.config.steps}"
    )


def _loop(run: Run, state: TrainState, workdir: str, writer: metrics.Writer, manager: Any, quiet: bool) -> TrainState:
    config, first = run.config, int(state.step)
    if first == 0:
        writer.write(0, "eval", run.evaluate(state.params))
    profiled = tuple(config.profile_steps) if first < min(config.profile_steps, default=0) else ()
    pending: list[tuple[int, Any]] = []
    needs_teacher = any(term.needs_teacher for term in run.terms)
    clock = speed.Clock(run.models.student, run.models.teacher if needs_teacher else None, config.data.max_length)
    with metrics.progress(config.steps, first, quiet) as bar:
        for step in range(first + 1, config.steps + 1):
            if step in profiled[:1]:
                jax.profiler.start_trace(str(Path(workdir) / "profile"))
            state, sums = run.train_step(state, run.models.teacher_params, run.put(next(run.train_batches)))
            pending.append((step, sums))
            if step in profiled[1:]:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            evaluating = step % config.eval_every == 0 or step == config.steps
            saving = step % config.checkpoint_every == 0 or step == config.steps
            # The previous step's numbers are read while this one runs; all of them before anything is saved.
            keep = 0 if evaluating or saving else 1
            if len(pending) > config.log_every or keep == 0:
                ready, pending = pending[: len(pending) - keep], pending[len(pending) - keep :]
                lap = clock.lap(_write_steps(run, writer, ready))
                writer.write(ready[-1][0], "speed", lap)
                bar.set_postfix(
                    {"loss": f"{float(ready[-1][1]['loss'][0]):.4f}"} | {n: f"{v:,.4g}" for n, v in lap.items()}
                )
            bar.update()
            if evaluating:
                writer.write(step, "eval", run.evaluate(state.params))
            if saving:
                checkpoint.save(manager, step, state, run.train_batches)
            if evaluating or saving:
                clock.restart()
    manager.wait_until_finished()
    return state


def _write_steps(run: Run, writer: metrics.Writer, steps: list[tuple[int, Any]]) -> float:
    tokens = 0.0
    for step, sums in steps:
        values = metrics.averages(jax.device_get(sums))
        if not math.isfinite(values["loss"] + values["gradient_norm"]):
            raise FloatingPointError(
                f"at step {step} the loss is {values['loss']} and the gradient's norm {values['gradient_norm']}; the last "
                f"checkpoint is from before. The loss's terms: "
                + ", ".join(f"{name}={value:g}" for name, value in values.items() if "/loss" in name)
            )
        tokens += values["tokens"]
        writer.write(step, "train", values | {"learning_rate": float(run.learning_rate(step - 1))})
    return tokens


def _finish(run: Run, state: TrainState, workdir: str) -> dict[str, dict[str, float]]:
    lines = [line for line in metrics.read(workdir) if line["split"] == "eval"]
    result = {"before": lines[0], "after": lines[-1]}
    if run.models.teacher is not None:
        result = {"teacher": run.evaluate_teacher()} | result
    folder = Path(workdir)
    (folder / "table.md").write_text(result_table(result) + "\n")
    (folder / "samples.md").write_text(_samples(run, state.params))
    plots = metrics.plot(workdir)
    export = folder / "student"
    if not export.exists():
        models.save_pretrained(export, run.models.student, state.params, run.tokenizer)
    tqdm_write((folder / "samples.md").read_text())
    tqdm_write(result_table(result))
    tqdm_write("wrote " + ", ".join(str(path) for path in [*plots, folder / "samples.md", export]))
    return {who: {k: v for k, v in values.items() if k not in ("step", "split")} for who, values in result.items()}


def result_table(result: dict[str, dict[str, float]]) -> str:
    """teacher / student before / student after, a row a metric."""
    names = [n for n in result["after"] if n not in ("step", "split")]
    title = {"before": "student before", "after": "student after"}
    rows = [["held-out rows", *(title.get(who, who) for who in result)]]
    for name in names:
        rows.append([name, *(f"{values[name]:.4f}" if name in values else "" for values in result.values())])
    return metrics.table(rows)


def _samples(run: Run, params: Any, count: int = 5) -> str:
    rows = (
        dict(zip(batch, row, strict=True)) for batch in run.eval_batches() for row in zip(*batch.values(), strict=True)
    )
    chosen = list(itertools.islice((row for row in rows if row["loss_mask"].any()), count))
    prompts = [row["tokens"][: row["loss_mask"].argmax() + 1].tolist() for row in chosen]
    texts = {"reference": [run.tokenizer.decode(row["targets"][row["loss_mask"]].tolist()) for row in chosen]}
    who = {"student": (run.models.student, params)}
    if run.models.teacher is not None:
        who = {"teacher": (run.models.teacher, run.models.teacher_params)} | who
    room = max(1, min(run.config.sample_tokens, run.models.max_positions - max(map(len, prompts))))
    for name, (model, its_params) in who.items():
        texts[name] = evaluate.sample(
            model, its_params, run.tokenizer, prompts, max_new_tokens=room, seed=run.config.seed
        )
    blocks = []
    for row, prompt in enumerate(prompts):
        parts = "\n\n".join(f"**{name}**: {texts[name][row]}" for name in texts)
        blocks.append(f"### Row {row + 1}\n\n~~~\n{run.tokenizer.decode(prompt)}\n~~~\n\n{parts}\n")
    return "\n".join(blocks)


def _count(params: Any) -> str:
    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:.2f}M"


def tqdm_write(text: str) -> None:
    """Prints without tearing the progress bar."""
    metrics.tqdm.write(text)
