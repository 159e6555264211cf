"""Loads the rows of a config (dataset, second stream, teacher's responses), and makes the feed of a run's batches."""

import json
from collections.abc import Mapping

import jax
import numpy as np

from kd_jax import data, evaluate, metrics, prefixes, resolve, sharding
from kd_jax.data import counts
from kd_jax.data.options import dataset_options
from kd_jax.objectives import Term
from kd_jax.prefixes import Source, responses, rollouts
from kd_jax.prefixes.feed import Author, Feed
from kd_jax.run.cache import AnyRows, cached_values, unpacked
from kd_jax.run.checks import check_room, check_sampling, check_template, check_term, check_views
from kd_jax.run.line_arrays import LineArrays
from kd_jax.run.models import Models, Writer
from kd_jax.run.ranking import check_order, load_order
from kd_jax.run.span_checks import check_spans
from kd_jax.run.view_prompts import columns_read, is_plain_text, load_texts, rows_are_turns
from kd_jax.settings import Settings, name_of
from kd_jax.storage import remote
from kd_jax.storage.checksum import digest
from kd_jax.storage.files import Json
from kd_jax.teachers.cache_reading import Cache, JoinedValues

Counts = dict[str, int]  # the numbers of kept, truncated and dropped rows


def make_source(config: Settings, terms: tuple[Term, ...]) -> Source:
    """Returns the prefix source that a config names, checked against the config's terms.

    Raises:
      ValueError: a source, a number or a combination is invalid; the message names the key.
    """
    try:
        make, keywords = resolve.look_up(config.prefixes, prefixes, positional=False)
        source = make(**keywords)
        # A schedule with values out of range is reported early.
        for step in np.linspace(0, config.steps - 1, 50).astype(int):
            source.choose(source.init(), step=int(step), total=config.steps, uniform=0.0, stored=0)
    except ValueError as error:
        raise ValueError(f"prefixes: {error}") from error
    for term in terms:
        check_term(config, source, term)
    check_spans(config, source, terms)
    check_views(config, source, terms)
    if config.text.name and not any(term.rows == "text" for term in terms):
        raise ValueError(
            f"text.name={config.text.name!r}, but no term has rows='text'; add a term, or leave text.name empty."
        )
    if source.authors or source.origins == ("teacher",):
        check_sampling(config, source)
    check_order(config, source)
    if "student" not in source.authors and (config.sampling.teacher_share or config.sampling.rollouts_per_prompt > 1):
        raise ValueError(
            f"sampling.teacher_share={config.sampling.teacher_share} and sampling.rollouts_per_prompt="
            f"{config.sampling.rollouts_per_prompt} change the responses of the student, but with prefixes.name="
            f"{name_of(config.prefixes)!r} the student writes nothing; set 0 and 1."
        )
    return source


def check_length(config: Settings, loaded: Models) -> None:
    """Checks that the models accept rows of data.max_length tokens.

    Raises:
      ValueError: the rows are longer than the positions of a model.
    """
    if loaded.max_positions < config.data.max_length:
        raise ValueError(
            f"data.max_length={config.data.max_length} is longer than the {loaded.max_positions} positions of the models; set "
            f"data.max_length to {loaded.max_positions} or less."
        )


def load_rows(config: Settings, tokenizer: data.Tokenizer, split: str, limit: int = 0) -> tuple[AnyRows, Counts]:
    """Loads the rows of a split for training or evaluation, with counts of the kept, truncated and dropped rows.

    Held-out rows are scored on their responses, regardless of `data.loss_on`, and are never packed.
    """
    options, training = config.data, split == config.data.train_split
    source = load_texts(config, split)
    if limit and limit < len(source):
        source = [source[i] for i in range(limit)]
    if is_plain_text(config):
        check_template(config)
        if options.name == "text" or options.packing == "stream":
            return data.pack(source, tokenizer, max_length=options.max_length)
    if not training:
        return _tokenize(config, tokenizer, source, "response")
    return _packed(config, *_tokenize(config, tokenizer, source, options.loss_on))


def _packed(config: Settings, rows: data.Rows, row_counts: Counts) -> tuple[AnyRows, Counts]:
    """Returns the rows as `data.packing` combines them."""
    options = config.data
    if options.packing == "none":
        return rows, row_counts
    combine = data.pack_rows if options.packing == "rows" else data.join
    packed = combine(rows, max_length=options.max_length)
    return packed, row_counts | {"packed into": len(packed)}


def _tokenize(
    config: Settings, tokenizer: data.Tokenizer, source: data.Texts, loss_on: str
) -> tuple[data.Rows, Counts]:
    options, template = config.data, data.Template.of(config.data)
    loss_on = (
        "response" if rows_are_turns(config) else loss_on
    )  # a row is one turn, with the turns before as its prompt
    rows, row_counts = data.tokenize(
        source, tokenizer, template=template, max_length=options.max_length,
        max_prompt_length=options.max_prompt_length, long_prompts=options.long_prompts,
        long_responses=options.long_responses, loss_on=loss_on,
    )  # fmt: skip
    return rows, counts.with_length(row_counts, source, tokenizer, template)


def load_examples(config: Settings, tokenizer: data.Tokenizer) -> list[evaluate.Example]:
    """Loads the held-out prompts that are answered at each evaluation, with their references.

    Raises:
      ValueError: the dataset has no prompts, or prompts and responses do not fit into a row together.
    """
    options = config.data
    if not config.eval_prompts:
        return []
    if is_plain_text(config):
        raise ValueError(
            f"eval_prompts={config.eval_prompts}, but the rows of data.name={options.name!r} have no prompts; set eval_prompts=0."
        )
    check_room(config)
    source = load_texts(config, options.eval_split)
    rows = [source[i] for i in range(min(config.eval_prompts, len(source)))]
    return evaluate.read_examples(
        [row | {"references": [row["response"]]} for row in rows], tokenizer, template=data.Template.of(options),
        max_prompt_length=options.max_prompt_length, cut=options.long_prompts == "cut",
    )  # fmt: skip


def load_text(config: Settings, tokenizer: data.Tokenizer) -> data.Rows:
    """Loads the second stream: rows joined end to end, in which every token counts."""
    options, length = config.text, config.data.max_length
    keywords = dataset_options(config, "text")
    source = data.load(options.name, split=options.split, data_dir=config.data.data_dir or None, **keywords)
    if is_plain_text(config, "text"):
        return data.pack(source, tokenizer, max_length=length)[0]
    return data.join(_tokenize(config, tokenizer, source, "all")[0], max_length=length)


def learns_from_text(config: Settings, source: Source, terms: tuple[Term, ...]) -> bool:
    """Returns True if the student learns at most from the teacher's text, so that both may have different tokenizers."""
    uses_tokens = "teacher" in source.authors or config.sampling.teacher_share or config.student.init == "layers"
    return not uses_tokens and not any("teacher" in term.members for term in terms)


def load_responses(
    config: Settings, source: prefixes.teacher, loaded: Models, mesh: jax.sharding.Mesh
) -> tuple[AnyRows, Counts, data.Texts]:
    """Returns the dataset's prompts with the teacher's responses, as tokens with counts, and as texts.

    The responses are sampled first if they are not on disk.

    Rows have the ids that the teacher sampled. The text is encoded again only if the teacher has another tokenizer.

    Raises:
      ValueError: prompt and response are too long for the teacher, or no response ends.
    """
    options, tokenizer, template = config.data, loaded.tokenizer, data.Template.of(config.data)
    writer = loaded.writer or Writer(loaded.require_teacher(), loaded.teacher_params, tokenizer)
    split = load_texts(config, options.train_split)
    rows = [split[i] for i in range(min(source.num_rows or len(split), len(split)))]
    sampler = rollouts.make_sampler(mesh, writer.tokenizer, options.max_length, config.sampling)
    if options.max_prompt_length + sampler.max_new_tokens > writer.model.config.max_positions:
        raise ValueError(
            f"data.max_prompt_length={options.max_prompt_length} plus sampling.max_new_tokens={sampler.max_new_tokens} is more "
            f"than the {writer.model.config.max_positions} positions of the teacher; lower one of them."
        )
    prompts = data.encode_prompts(
        rows, tokenizer=writer.tokenizer, template=template, max_length=options.max_prompt_length,
        cut=options.long_prompts == "cut",
    )  # fmt: skip
    settings = {key: getattr(config.sampling, key) for key in ("max_new_tokens", "temperature", "top_p", "top_k")}
    settings |= {key: getattr(options, key) for key in ("template", "max_prompt_length", "long_prompts", "batch_size")}
    settings |= template.set_apart()
    if columns := tuple(columns_read(config)):  # views and conditions read these values from the stored rows
        settings |= {"columns": columns, "values": digest(json.dumps([[row[c] for c in columns] for row in rows]))}
    settings |= {"seed": source.seed, "teacher": str(writer.model.config), "dtype": config.teacher.dtype}
    settings |= {"tokenizer": writer.tokenizer.fingerprint(), "ends": writer.tokenizer.end_ids}
    made_from = responses.fingerprint(writer.params, [responses.RESPONSES_VERSION, settings, prompts])
    address = f"{options.data_dir or data.DEFAULT_DIR}/kd_jax_responses/{made_from}"
    with remote.folder_beside(address, writes=jax.process_index() == 0) as folder:
        responses.write_responses(
            folder, rows, prompts, sampler, writer.model, writer.params, batch_size=options.batch_size,
            seed=source.seed, settings=settings | {"path": config.teacher.path, "data": options.name, "rows": len(rows)},
            progress=lambda it: metrics.tqdm(it, desc="responses of the teacher", unit="batch"),
        )  # fmt: skip
    sharding.barrier("the folder of the responses is copied")  # no process reads before the folder is copied
    path = remote.local_file(f"{address}/responses.jsonl")
    written = responses.read_responses(path)
    metrics.tqdm.write(f"the teacher's responses: {path}, {len(written)} of {len(rows)} ended and are used")
    if loaded.writer:
        tokenized = _tokenize(config, tokenizer, written, options.loss_on)
    else:
        ids = [(row["prompt_ids"], row["response_ids"]) for row in written]
        loss_on = "response" if rows_are_turns(config) else options.loss_on
        tokenized = data.from_ids(ids, tokenizer, max_length=options.max_length, loss_on=loss_on)
    packed, row_counts = _packed(config, *tokenized)
    texts = [{**row, "response": row.get("reference", ""), "written": row["response"]} for row in written]
    return packed, {"prompts": len(rows)} | row_counts, texts


def batch_options(config: Settings, tokenizer: data.Tokenizer) -> Json:
    """Returns the keywords of `data.batches` that all batches of a run share."""
    return dict(
        max_length=config.data.max_length, seed=config.seed, pad_id=tokenizer.pad_id,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip


def make_feed(
    config: Settings, source: Source, tokenizer: data.Tokenizer, loaded: Models, mesh: jax.sharding.Mesh,
    rows: AnyRows, text: data.Rows | None, caches: Mapping[str, Cache], line_arrays: LineArrays | None = None,
) -> Feed:  # fmt: skip
    """Returns the feed of a run's batches. For a curriculum the rows are ranked first, if no ranking is on disk.

    Args:
      config: the config of the run.
      source: the source of `make_source`.
      tokenizer: the tokenizer of both models.
      loaded: the models; the student's parameters come with each step.
      mesh: the mesh of the batches and the models.
      rows: the rows of `load_rows` or `load_responses`.
      text: the rows of `load_text`; None without a second stream.
      caches: the caches that replace frozen models, by name.
      line_arrays: the maker of the further arrays of `rows`, or None.

    Raises:
      ValueError: some rows have no prompt, but the source or the order of the rows needs answers to prompts; or a
        curriculum has more stages than rows.
    """
    if source.authors and (empty := int(np.sum(unpacked(rows).prompt_lengths == 0))):
        raise ValueError(
            f"{empty} of the {len(rows)} rows of data.name={config.data.name!r} have an empty prompt, to which "
            f"prefixes.name={name_of(config.prefixes)!r} cannot sample responses; remove these rows, or choose another template."
        )
    options = batch_options(config, tokenizer)
    order = load_order(config, tokenizer, loaded, mesh, unpacked(rows))
    share, repeats = config.sampling.teacher_share, config.sampling.rollouts_per_prompt
    text_batches = None
    if text is not None:
        no_values = JoinedValues(tuple(cache.no_values() for cache in caches.values())) if caches else None
        of_text = None if line_arrays is None else line_arrays.without_columns(text)
        text_batches = iter(
            data.batches(
                text, batch_size=config.text.batch_size, token_values=no_values, line_arrays=of_text, **options
            )
        )
    token_values = cached_values(config, tokenizer, caches, "train", rows)
    mixture = (loaded.require_teacher(), loaded.teacher_params, share) if share else None
    authors = {"student": Author(loaded.student, None, mixture)}
    if "teacher" in source.authors:
        authors["teacher"] = Author(loaded.require_teacher(), loaded.teacher_params)
    batches = data.batches(
        rows, batch_size=config.data.batch_size, token_values=token_values, line_arrays=line_arrays, order=order, **options
    )  # fmt: skip
    return Feed(
        source, iter(batches),
        text_batches=text_batches,
        sampler=rollouts.make_sampler(mesh, tokenizer, config.data.max_length, config.sampling),
        authors={name: authors[name] for name in source.authors},
        total_steps=config.steps, batch_size=config.data.batch_size,
        epoch_batches=max(1, len(rows) * repeats // config.data.batch_size), seed=config.seed,
        rollouts_per_prompt=repeats,
        progress=lambda it: metrics.tqdm(it, desc="responses", unit="batch", leave=False),
        rollout_arrays=line_arrays,
    )  # fmt: skip


def show(sampler: rollouts.Sampler, step: int, rows: rollouts.Rows, count: int = 2) -> str:
    """Returns the first prompts and responses that were sampled for a step, for the log."""
    texts = sampler.text(rollouts.take(rows, np.arange(min(count, len(rows["lengths"])))))
    return "\n".join(f"--- sampled for step {step}\n{prompt}\n>>> {response}" for prompt, response in texts)
