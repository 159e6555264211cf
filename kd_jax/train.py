"""Trains a student from a config: `build` assembles a run without training, and `train` runs the training loop."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath

from kd_jax import (
    data,
    evaluate,
    loop,
    metrics,
    prefixes,
    quantisation,
    resolve,
    results,
    rollouts,
    schedules,
    setup_identity,
    sharding,
    storage,
)
from kd_jax.data.counts import sentence, warnings
from kd_jax.feed import Feed
from kd_jax.objectives import Term, make_terms
from kd_jax.optimizer import make_optimizer
from kd_jax.setup import Models, load_models, load_tokenizer
from kd_jax.setup_cache import kept_rows, open_cache
from kd_jax.setup_checks import check_learning_rate
from kd_jax.setup_numbers import check_mesh, check_numbers
from kd_jax.setup_rows import (
    batch_options,
    check_length,
    learns_from_text,
    load_examples,
    load_responses,
    load_rows,
    load_text,
    make_feed,
    make_source,
)
from kd_jax.storage import checkpoint, directory, remote
from kd_jax.train_step import TrainState, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Run:
    """An assembled run. A notebook calls the steps itself; `train` calls them with logs and checkpoints.

    Attributes:
      config: the resolved config.
      mesh: the mesh of all devices.
      tokenizer: the tokenizer of teacher and student.
      models: the teacher, the student, and the teacher's parameters.
      terms: the terms of the objective.
      learning_rate: step -> learning rate.
      init_state: makes the state before the first step, including the student's initial parameters.
      abstract_state: the shapes and shardings of the state.
      train_step: (state, teacher_params, batch) -> (state, metrics), jitted; the state is donated.
      feed: the source of the training batches, with a position that can be saved.
      eval_batches: makes an iterator that goes once over the held-out rows.
      examples: the held-out prompts that are answered at each evaluation.
      shown: the held-out prompts whose answers are shown before and after training, as many as one evaluation batch
        has.
      counts: for each split, the numbers of rows that were kept, truncated or dropped.
      written: the rows of the teacher's responses; None if the run trains on the data's responses.
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
    feed: Feed
    eval_batches: Callable[[], Iterator[dict[str, np.ndarray]]]
    examples: list[evaluate.Example]
    shown: list[evaluate.Example]
    counts: dict[str, Any]
    written: Any = None

    def batch(self, step: int, params: Any) -> dict[str, jax.Array]:
        """Returns the batch of update `step` on the mesh. Steps are counted from 0.

        Where the source has the student write responses, they are sampled with the parameters `params`.
        """
        return self.put(self.feed.next(step, params))

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Places a numpy batch on the mesh."""
        return sharding.put_batch(self.mesh, batch)

    def evaluate(self, params: Any) -> dict[str, float]:
        """Returns the measures of student parameters on the held-out rows.

        The measures are those of `evaluate.summary` on the rows and of `evaluate.assess` on the answers.
        """
        return self._evaluate(self.models.student, params, self.models.compared, self.models.teacher_params)

    def evaluate_teacher(self) -> dict[str, float]:
        """Evaluates the teacher on the held-out rows, without a comparison to another model."""
        return self._evaluate(self.models.teacher, self.models.teacher_params, None, None)

    def _evaluate(self, *both: Any) -> dict[str, float]:
        options, chunk = self.config.data, self.config.loss.chunk or None
        values = evaluate.evaluate(
            *both, self.eval_batches(), self.mesh, vocab_size=self.tokenizer.vocab_size, chunk=chunk
        )
        if not self.examples:
            return values
        # The temperature is 1, and not that of training, so that runs can be compared.
        sampler = rollouts.Sampler(self.mesh, self.tokenizer, options.max_length, self.config.sampling.max_new_tokens)
        size, seed = options.eval_batch_size, self.config.seed
        return values | evaluate.assess(sampler, both, self.examples, batch_size=size, seed=seed, chunk=chunk)[0]


def build(config: Any) -> Run:
    """Assembles a run, and reports any error in the config before anything is trained or written.

    With the source `prefixes.teacher`, the last action is that the teacher's responses are written, or read from disk.

    Args:
      config: an ml_collections.ConfigDict with the keys of `configs/base.py`.

    Raises:
      ValueError: a value of the config is wrong; the message names the value and a right one.
    """
    check_numbers(config)
    sampling = config.sampling
    terms = make_terms(
        config.objective.terms, config.objective.temperature, sampling.teacher_share, sampling.max_new_tokens
    )
    source = make_source(config, terms)
    learning_rate = resolve.build(config.learning_rate, schedules)
    if schedules.as_stateful(learning_rate).init() != ():
        raise ValueError(
            f"learning_rate={config.learning_rate.name!r} follows the loss; a learning rate follows the step."
        )
    check_learning_rate(learning_rate, config.steps)
    tx = make_optimizer(config.optimizer, learning_rate, config.clip_norm)
    mesh = sharding.make_mesh(**config.mesh)
    check_mesh(config, mesh)
    cache = open_cache(config, terms, source)
    needs_teacher, text_only = any(term.needs_teacher for term in terms), learns_from_text(config, source, terms)
    loaded = load_models(config, load_tokenizer(config, text_only), mesh, needs_teacher, text_only)
    tokenizer = loaded.tokenizer
    if cache:
        loaded = dataclasses.replace(
            loaded, compared=cache.teacher, teacher_params=cache.load_params(mesh, config.teacher.sharding)
        )
    terms = loaded.compared.terms(terms)
    check_length(config, loaded)
    counts = {}
    eval_rows, counts[config.data.eval_split] = load_rows(
        config, tokenizer, config.data.eval_split, config.data.eval_rows
    )
    examples = load_examples(config, tokenizer)
    text_rows = load_text(config, tokenizer) if config.text.name else None
    step = make_train_step(
        loaded.student, loaded.compared, terms, tx, vocab_size=tokenizer.vocab_size,
        temperature=config.objective.temperature, microbatches=config.microbatches, chunk=config.loss.chunk or None,
        mesh=mesh, max_skipped=config.max_skipped,
    )  # fmt: skip
    key = jax.random.key(config.seed)
    make_state = partial(init_state, tx=tx, terms=terms)
    abstract_state = jax.eval_shape(make_state, loaded.student.abstract_params(), key=key)
    placed = sharding.tree_shardings(mesh, abstract_state)

    def fresh_state() -> TrainState:
        params = loaded.init_student(jax.random.fold_in(key, 0))
        return jax.jit(make_state, out_shardings=placed)(params, key=key)

    held_out = data.batches(
        eval_rows, batch_size=config.data.eval_batch_size, shuffle=False, num_epochs=1,
        beside=kept_rows(config, tokenizer, cache, "held_out", eval_rows), **batch_options(config, tokenizer),
    )  # fmt: skip
    # The responses come last because writing them may take long. They stay on disk if a later run fails.
    if isinstance(source, prefixes.teacher):
        train_rows, counts[config.data.train_split] = load_responses(config, source, loaded, mesh)
    else:
        train_rows, counts[config.data.train_split] = load_rows(config, tokenizer, config.data.train_split)
    return Run(
        config=config, mesh=mesh, tokenizer=tokenizer, models=loaded, terms=terms, learning_rate=learning_rate,
        init_state=fresh_state, abstract_state=sharding.with_shardings(abstract_state, placed),
        train_step=jax.jit(step, donate_argnums=0, out_shardings=(placed, None)),
        feed=make_feed(config, source, tokenizer, loaded, mesh, train_rows, text_rows, cache),
        eval_batches=lambda: iter(held_out), examples=examples, counts=counts,
        written=train_rows if isinstance(source, prefixes.teacher) else None,
        shown=evaluate.held_out_examples(eval_rows, tokenizer, config.data.eval_batch_size),
    )  # fmt: skip


def train(config: Any, workdir: str, quiet: bool = False) -> dict[str, Any]:
    """Trains and evaluates a student, and writes all results to `workdir`.

    The results are metrics, checkpoints, a report page, plots, samples and the student's folder. A second call on the
    same directory resumes the run, with the numbers of an uninterrupted run. On another mesh or another number of hosts
    the numbers are equal up to rounding.

    Args:
      config: the config, as in `build`.
      workdir: the run's folder, a path or an address such as gs://bucket/run; made if it does not exist.
      quiet: whether to print only warnings and errors.

    Returns:
      The dict of `results.finish`: {"teacher": ..., "before": ..., "after": ...}, each a result of `Run.evaluate`.

    Raises:
      ValueError: before anything is written, if the config is wrong, or if the directory is in use or belongs to
        another config or to other contents of the files that the config names (see `setup_identity`); or if all
        checkpoints are damaged.
      FloatingPointError: a loss or a gradient is not finite.
      loop.Stopped: SIGTERM or a preemption notice arrived, and the state is saved, or there was nothing to save.
      loop.Interrupted: a KeyboardInterrupt; Ctrl-C was pressed, and the state is saved, or there was nothing to save.
    """
    resolved, first = config.to_dict(), jax.process_index() == 0
    with storage.room(workdir), loop.Notices() as notices, contextlib.ExitStack() as stack:
        copied = remote.work_directory(workdir, jax.process_count(), writes=first)
        workdir, place = stack.enter_context(copied)  # for an address, `workdir` is now a local folder
        sharding.least_of_processes(1)  # no process reads the folder before the first process has the copy
        stack.enter_context(notices.raised())  # this block ends before the last copy to the address
        is_there = epath.Path(workdir).is_dir()
        directory.check(workdir, resolved)  # checked first, so that no lock file is left in a folder of another program
        if first and is_there:
            stack.enter_context(directory.alone(workdir))  # the lock is taken before any slow work
            directory.check(workdir, resolved)
        setup_identity.check(workdir, config)  # checked before anything is built from changed contents
        run = build(config)
        # this also checks the teacher's responses, which are read or written anew
        setup_identity.check(workdir, config, run)
        if first and not is_there:
            stack.enter_context(directory.alone(workdir))
            directory.check(workdir, resolved)  # another process may have made the folder since the first check
        rounding = quantisation.error(run)
        # A new run reads its student before it writes anything. A resumed run needs no initial state.
        state = None if checkpoint.has_steps(place.shared) else run.init_state()
        if first:
            directory.write_config(workdir, resolved)
            setup_identity.write(workdir, config, run)
            if rounding:
                (epath.Path(workdir) / quantisation.FILE).write_text(json.dumps(rounding) + "\n", encoding="utf-8")
        place.store()  # the config must be stored before the checkpoints that belong to it
        manager = stack.enter_context(checkpoint.open_manager(place.shared, config.keep_checkpoints))
        if state is None:
            state, damaged = checkpoint.restore(manager, run.abstract_state, run.feed)
            state = _allowed(state, config.max_skipped)
            for line in damaged:
                metrics.tqdm.write(f"{line}; it is put aside, and the run goes on from step {int(state.step)}.")
        if first and not quiet:
            metrics.tqdm.write(environment(run, state))
            for line in too_long(run):
                metrics.tqdm.write(line)
            if rounding:
                metrics.tqdm.write(quantisation.sentence(rounding))
        with metrics.Writer(workdir, int(state.step), silent=not first) as writer:
            state = loop.run_steps(run, state, workdir, writer, manager, notices, quiet, place)
        return results.finish(run, state.params, workdir, quiet)


def _allowed(state: TrainState, max_skipped: int) -> TrainState:
    """Returns a restored state whose count of skipped steps is at most `max_skipped`, which may be lower than before.

    Then only a new non-finite step can exceed the limit.
    """
    skipped = np.int32(min(int(state.skipped), max_skipped))
    return dataclasses.replace(state, skipped=jax.device_put(skipped, state.skipped.sharding))


def environment(run: Run, state: TrainState) -> str:
    """Returns one line with the devices, the mesh, the parameter counts and the row counts."""
    device = jax.devices()[0]
    mesh = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    teacher = run.models.compared.described(run.config.teacher.path)
    if run.models.writer:
        writer = _count(run.models.writer.model.abstract_params())
        teacher = f"teacher {writer}, of which only its text is used, since its tokenizer is another one"
    rows = "; ".join(sentence(split, counts) for split, counts in run.counts.items())
    return (
        f"{len(jax.devices())} {device.platform} device(s), {jax.process_count()} process(es) | mesh {mesh} | {teacher}, "
        f"student {_count(state.params)} parameters | {rows} | step {int(state.step)} of {run.config.steps}"
    )


def too_long(run: Run) -> list[str]:
    """Returns a warning, with advice, for each split in which many prompts or responses are too long."""
    options = run.config.data
    other = {"drop": "cut, which truncates the prompts", "cut": "drop, which leaves such rows out"}[
        options.long_prompts
    ]
    advice = {
        "prompts": f"Raise data.max_prompt_length={options.max_prompt_length}, and data.max_length={options.max_length} with it; "
        f"or set data.long_prompts to {other}.",
        "responses": f"Raise data.max_length={options.max_length}, or lower data.max_prompt_length="
        f"{options.max_prompt_length}.",
    }
    return [line for split, counts in run.counts.items() for line in warnings(split, counts, **advice)]


def _count(params: Any) -> str:
    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:.2f}M"
