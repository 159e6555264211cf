"""Assembles a run from a config."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from kd_jax import data, evaluate, models, prefixes, resolve, schedules, sharding
from kd_jax.models.trained import names_of
from kd_jax.objectives import Term, make_terms
from kd_jax.optimizer import Follow, make_optimizer, with_followers
from kd_jax.prefixes import rollouts
from kd_jax.prefixes.feed import Feed
from kd_jax.run import hub_names
from kd_jax.run.cache import cached_values, open_caches, unpacked
from kd_jax.run.checks import check_learning_rate, check_mesh, check_vocabulary
from kd_jax.run.line_arrays import make_line_arrays
from kd_jax.run.models import Models, initial_key, load_models, load_tokenizer
from kd_jax.run.remarks import remarks
from kd_jax.run.rows import (
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
from kd_jax.run.view_prompts import load_texts
from kd_jax.settings import Config, Sampling, Settings, name_of
from kd_jax.teachers import Aligned, Teacher
from kd_jax.teachers.cache_reading import Cache
from kd_jax.train_step import Batch, Metrics, TrainState, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Run:
    """An assembled run. A notebook calls the steps itself; `train.train` calls them with logs and checkpoints.

    Attributes:
      config: the settings of the run.
      mesh: the mesh of all devices.
      tokenizer: the tokenizer of teacher and student.
      models: the teacher, the student, and the teacher's parameters.
      terms: the terms of the objective.
      learning_rate: step -> learning rate.
      init_state: makes the state before the first step, including the student's initial parameters.
      abstract_state: the shapes and shardings of the state.
      train_step: the jitted function (state, teacher_params, batch) -> (state, metrics); the state is donated.
      feed: the source of the training batches, with a position that can be saved.
      eval_batches: makes an iterator that goes once over the held-out rows.
      examples: the held-out prompts that are answered at each evaluation.
      sample_examples: the held-out prompts of one evaluation batch, whose answers are shown before and after training.
      counts: for each split, the numbers of rows that were kept, truncated or dropped.
      written: the rows of the teacher's responses; None if the run trains on the data's responses.
      remarks: sentences about the rows, which the run prints at its start.
    """

    config: Settings
    mesh: jax.sharding.Mesh
    tokenizer: data.Tokenizer
    models: Models
    terms: tuple[Term, ...]
    learning_rate: optax.Schedule
    init_state: Callable[[], TrainState]
    abstract_state: TrainState
    train_step: Callable[[TrainState, PyTree, Batch], tuple[TrainState, Metrics]]
    feed: Feed
    eval_batches: Callable[[], Iterator[dict[str, np.ndarray]]]
    examples: list[evaluate.Example]
    sample_examples: list[evaluate.Example]
    counts: dict[str, dict[str, int]]
    written: data.Rows | data.Packed | None = None
    remarks: tuple[str, ...] = ()

    def batch(self, step: int, params: PyTree) -> Batch:
        """Returns the batch of update `step` on the mesh. Steps are counted from 0.

        If the source samples responses of the student, `params` are the trained parameters of a state.
        """
        return self.put(self.feed.next(step, self.models.complete(params)))

    def put(self, batch: dict[str, np.ndarray]) -> Batch:
        """Places a NumPy batch on the mesh."""
        return sharding.put_batch(self.mesh, batch)

    def evaluate(self, params: PyTree, teacher_params: PyTree = None) -> dict[str, float]:
        """Returns `evaluate.summary` of the student on the held-out rows, and `evaluate.assess` of the student's answers.

        A teacher with a view reads its own prompts of the held-out rows, but the student's prompts of the answers.
        Held-out rows have no rollouts, so a teacher whose view shows rollouts reads the student's prompts of these rows.

        Args:
          params: the trained parameters of a state, which are all parameters unless some are frozen.
          teacher_params: the result of `teacher_params`; None for the teacher's parameters before training.
        """
        teacher_params = self.models.teacher_params if teacher_params is None else teacher_params
        teacher = self.models.compared_teacher
        if isinstance(teacher, Aligned):  # distributions over tokens of two tokenizers cannot be compared
            teacher, teacher_params = None, None
        return self._evaluate(self.models.student, self.models.complete(params), teacher, teacher_params)

    def teacher_params(self, state: TrainState) -> PyTree:
        """Returns the teacher's parameters in a state. They change only if the teacher follows the student."""
        if not self.config.teacher.follow:
            return self.models.teacher_params
        return self.models.complete(state.opt_state.followers["teacher"])

    def evaluate_teacher(self) -> dict[str, float]:
        """Evaluates the teacher on the held-out rows, without a comparison to another model.

        Raises:
          ValueError: no model is loaded for the teacher.
        """
        return self._evaluate(self.models.require_teacher(), self.models.teacher_params, None, None)

    def _evaluate(
        self, model: models.Model, params: PyTree, teacher: Teacher | None, teacher_params: PyTree
    ) -> dict[str, float]:
        models_and_params = (model, params, teacher, teacher_params)
        options, chunk = self.config.data, self.config.loss.chunk or None
        values = evaluate.evaluate(
            *models_and_params, self.eval_batches(), self.mesh, vocab_size=self.tokenizer.vocab_size, chunk=chunk
        )
        if not self.examples:
            return values
        # The temperature is 1 and not the temperature of training, so that runs can be compared.
        sampling = Sampling(max_new_tokens=self.config.sampling.max_new_tokens)
        sampler = rollouts.make_sampler(self.mesh, self.tokenizer, options.max_length, sampling)
        size, seed = options.eval_batch_size, self.config.seed
        return (
            values
            | evaluate.assess(sampler, models_and_params, self.examples, batch_size=size, seed=seed, chunk=chunk)[0]
        )


def build(config: Config | Settings) -> Run:
    """Assembles a run, and reports any error in the config before anything is trained or written.

    With the source `prefixes.teacher`, the last action is to write the teacher's responses, or to read them from disk.

    Args:
      config: a config with the keys of `kd_jax.settings`, such as an `ml_collections.ConfigDict`.

    Raises:
      ValueError: a value of the config is wrong; the message names the key, the value, and a correct value.
    """
    settings = Settings.parse(config)
    hub_names.settle(settings)
    terms, source = make_objective(settings)
    learning_rate = _make_learning_rate(settings)
    tx = make_optimizer(settings.optimizer, learning_rate, settings.clip_norm)  # an error is reported early
    mesh = make_mesh(settings)
    caches = open_caches(settings, terms, source)
    loaded = _load_models(settings, source, terms, mesh, caches)
    if loaded.trainee.part is not None:
        frozen = names_of(loaded.student)
        tx = make_optimizer(settings.optimizer, learning_rate, settings.clip_norm, frozen=frozen)
    if follows := _follows(settings):
        tx = with_followers(tx, follows)
    terms = loaded.compared_teacher.terms(terms)
    tokenizer, options = loaded.tokenizer, settings.data
    check_vocabulary(settings, terms, tokenizer.vocab_size)
    check_length(settings, loaded)
    counts = {}
    eval_rows, counts[options.eval_split] = load_rows(settings, tokenizer, options.eval_split, options.eval_rows)
    examples = load_examples(settings, tokenizer)
    text_rows = load_text(settings, tokenizer) if settings.text.name else None
    step = make_train_step(
        loaded.student, loaded.frozen, terms, tx, vocab_size=tokenizer.vocab_size,
        temperature=settings.objective.temperature, microbatches=settings.microbatches,
        chunk=settings.loss.chunk or None, mesh=mesh, max_skipped=settings.max_skipped, followers=tuple(follows),
        part=loaded.trainee.part,
    )  # fmt: skip
    fresh_state, abstract_state, placed = _make_state(settings, loaded, tx, terms, mesh)
    eval_texts = partial(load_texts, settings, options.eval_split)
    of_eval = make_line_arrays(
        settings, loaded, eval_rows, eval_texts, counts[options.eval_split],
        members=() if isinstance(loaded.compared_teacher, Aligned) else ("teacher",),
    )  # fmt: skip
    held_out = data.batches(
        eval_rows, batch_size=options.eval_batch_size, shuffle=False, num_epochs=1,
        token_values=cached_values(settings, tokenizer, caches, "held_out", eval_rows), line_arrays=of_eval,
        **batch_options(settings, tokenizer),
    )  # fmt: skip
    # Sampling may take long, so it comes last, after all checks. The responses are on disk for later runs.
    train_texts = partial(load_texts, settings, options.train_split)
    if isinstance(source, prefixes.teacher):
        train_rows, counts[options.train_split], written = load_responses(settings, source, loaded, mesh)
        train_texts = lambda: written
    else:
        train_rows, counts[options.train_split] = load_rows(settings, tokenizer, options.train_split)
    of_train = make_line_arrays(
        settings, loaded, train_rows, train_texts, counts[options.train_split], terms=terms,
        members={member for term in terms for member in term.members}, samples=bool(source.authors),
        sampled=isinstance(source, prefixes.teacher) and not loaded.writer,
    )  # fmt: skip
    return Run(
        config=settings, mesh=mesh, tokenizer=tokenizer, models=loaded, terms=terms, learning_rate=learning_rate,
        init_state=fresh_state, abstract_state=abstract_state,
        train_step=jax.jit(step, donate_argnums=0, out_shardings=(placed, None)),
        feed=make_feed(settings, source, tokenizer, loaded, mesh, train_rows, text_rows, caches, of_train),
        eval_batches=lambda: iter(held_out), examples=examples, counts=counts,
        written=train_rows if isinstance(source, prefixes.teacher) else None,
        remarks=remarks(settings, tokenizer, {options.train_split: train_rows, options.eval_split: eval_rows}),
        sample_examples=evaluate.held_out_examples(unpacked(eval_rows), tokenizer, options.eval_batch_size),
    )  # fmt: skip


def make_objective(settings: Settings) -> tuple[tuple[Term, ...], prefixes.Source]:
    """Returns the terms of the objective and the source of the rows, checked against each other.

    Raises:
      ValueError: a term, the source, or their combination is invalid; the message names the key.
    """
    objective, sampling = settings.objective, settings.sampling
    terms = make_terms(
        objective.terms, objective.temperature, sampling.teacher_share, sampling.max_new_tokens, tuple(settings.members)
    )
    return terms, make_source(settings, terms)


def make_mesh(settings: Settings) -> jax.sharding.Mesh:
    """Returns the mesh of all devices, which divides the batches of the settings.

    Raises:
      ValueError: the sizes do not fit the devices, or a batch cannot be divided.
    """
    mesh = sharding.make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    check_mesh(settings, mesh)
    return mesh


def _make_learning_rate(settings: Settings) -> optax.Schedule:
    learning_rate = resolve.build(settings.learning_rate, schedules)
    if schedules.as_stateful(learning_rate).init() != ():
        raise ValueError(
            f"learning_rate={name_of(settings.learning_rate)!r} is a schedule that follows the loss, but a learning rate "
            f"follows the step; choose a schedule of kd_jax.schedules without a state."
        )
    check_learning_rate(learning_rate, settings.steps)
    return learning_rate


def _follows(settings: Settings) -> dict[str, Follow]:
    """Returns the frozen models that follow the student, by name."""
    frozen = {"teacher": settings.teacher, **settings.members}
    return {
        name: Follow(model.follow, model.follow_every, model.follow_copy_first)
        for name, model in frozen.items()
        if model.follow
    }


def _load_models(
    settings: Settings,
    source: prefixes.Source,
    terms: tuple[Term, ...],
    mesh: jax.sharding.Mesh,
    caches: dict[str, Cache],
) -> Models:
    """Loads the models of the run. A cache replaces the teacher, or a member."""
    needs_teacher = any("teacher" in term.members for term in terms)
    compares_spans = any(term.spans is not None for term in terms)
    own_tokenizer = compares_spans or learns_from_text(settings, source, terms)
    tokenizer = load_tokenizer(settings, own_tokenizer)
    loaded = load_models(settings, tokenizer, mesh, needs_teacher, own_tokenizer, compares_spans)
    if isinstance(loaded.compared_teacher, Aligned):
        loaded = dataclasses.replace(loaded, compared_teacher=loaded.compared_teacher.for_terms(terms))
    params = {
        name: cache.load_params(mesh, (settings.teacher if name == "teacher" else settings.members[name]).sharding)
        for name, cache in caches.items()
    }
    members = loaded.members | {name: cache.teacher for name, cache in caches.items() if name != "teacher"}
    member_params = loaded.member_params | {name: tree for name, tree in params.items() if name != "teacher"}
    loaded = dataclasses.replace(loaded, members=members, member_params=member_params)
    if "teacher" not in caches:
        return loaded
    return dataclasses.replace(
        loaded, compared_teacher=caches["teacher"].teacher, teacher_params=params["teacher"]
    )  # fmt: skip


def _make_state(
    settings: Settings, loaded: Models, tx: optax.GradientTransformation, terms: tuple[Term, ...],
    mesh: jax.sharding.Mesh,
) -> tuple[Callable[[], TrainState], TrainState, PyTree]:  # fmt: skip
    """Returns the function that makes the first state, the state's shapes with shardings, and the shardings."""
    key = jax.random.key(settings.seed)
    make_state = partial(init_state, tx=tx, terms=terms)
    abstract_state = jax.eval_shape(make_state, loaded.trainee.abstract, key=key)
    placed = sharding.tree_shardings(mesh, abstract_state)

    def fresh_state() -> TrainState:
        params = loaded.init_student(initial_key(settings))
        return jax.jit(make_state, out_shardings=placed)(params, key=key)

    return fresh_state, sharding.with_shardings(abstract_state, placed), placed
