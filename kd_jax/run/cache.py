"""Opens a teacher's cache for a config, and checks that the cache is sufficient for the config and fits the run's rows."""

import json
from collections.abc import Mapping

from kd_jax import data, divergences, resolve
from kd_jax.data.options import dataset_options
from kd_jax.objectives import Comparison, Term
from kd_jax.prefixes import Source
from kd_jax.run.view_prompts import described_view
from kd_jax.settings import Settings, name_of
from kd_jax.storage import remote
from kd_jax.storage.checksum import digest
from kd_jax.storage.files import Json
from kd_jax.teachers.cache_files import describe_rows, differences
from kd_jax.teachers.cache_reading import Cache, CachedValues, JoinedValues, key_of_cache

AnyRows = data.Rows | data.Packed
# The keys of config.data that decide the rows. Of the values of data.packing, only "stream" changes the rows.
DECIDE = (
    "name", "train_split", "eval_split", "eval_rows", "template", "max_length", "max_prompt_length", "long_prompts",
    "long_responses", "loss_on",
)  # fmt: skip


def unpacked(rows: AnyRows) -> data.Rows:
    """Returns the rows that are packed, or the rows themselves."""
    return rows.rows if isinstance(rows, data.Packed) else rows


def made_from(config: Settings, tokenizer: data.Tokenizer) -> Json:
    """Returns the values that a cache and a run must share besides their rows.

    The entry "settings" has the keys that can explain why rows differ.
    """
    template = data.Template.of(config.data)
    text = template.name + (tokenizer.chat_template or "" if template.name == "chat" else "")
    text += json.dumps(options, sort_keys=True) if (options := template.set_apart()) else ""
    settings = {f"data.{key}": getattr(config.data, key) for key in DECIDE}
    settings |= {f"data.{key}": value for key, value in options.items()}
    settings["data.packing"] = "stream" if config.data.packing == "stream" else "none or rows"
    settings["data.options"] = {key: str(value) for key, value in dataset_options(config).items()}
    return {
        "tokenizer": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "template": digest(text)[:12],
        "settings": settings,
    }


def open_caches(config: Settings, terms: tuple[Term, ...], source: Source) -> dict[str, Cache]:
    """Opens the caches that a config names, and checks that each cache is sufficient for the config.

    Returns:
      The caches by the name of the frozen model; {} if the config names none.

    Raises:
      ValueError: a cache is invalid, or has less than the config needs.
    """
    folders = {"teacher": config.teacher.cache} | {name: member.cache for name, member in config.members.items()}
    return {member: _open(config, terms, source, member, folder) for member, folder in folders.items() if folder}


def _open(config: Settings, terms: tuple[Term, ...], source: Source, member: str, folder: str) -> Cache:
    if member == "teacher" and config.student.init == "layers":
        raise ValueError(
            f"student.init='layers' copies layers of the teacher's model, but teacher.cache={config.teacher.cache!r} has no "
            f"model. Save the student's folder on a machine with enough memory for the teacher, and set "
            f"student.init='pretrained' and student.path."
        )
    cache = Cache.open(remote.local_folder(folder), member)
    check_use(config, terms, source, cache.kind, cache.manifest["k"], member)
    wanted, written = config.objective.temperature, cache.manifest["splits"]["train"]["temperature"]
    if cache.kind != "hidden" and any(member in term.members for term in terms):
        if lines := differences(written, wanted, "objective.temperature"):
            raise ValueError(cache.refusal(lines))
    return cache


def cached_values(
    config: Settings, tokenizer: data.Tokenizer, caches: Mapping[str, Cache], split: str, rows: AnyRows
) -> JoinedValues | None:
    """Returns the cached values of a split, 'train' or 'held_out'; None without caches.

    Raises:
      ValueError: a cache was made with another tokenizer, another template, or other rows; the message has the
        differences.
    """
    if not caches:
        return None
    return JoinedValues(tuple(_values(config, tokenizer, cache, split, unpacked(rows)) for cache in caches.values()))


def _values(config: Settings, tokenizer: data.Tokenizer, cache: Cache, split: str, rows: data.Rows) -> CachedValues:
    name_of_split = {"train": config.data.train_split, "held_out": config.data.eval_split}[split]
    view = {"view": described_view(config, cache.member, rows, name_of_split)}
    key, about = f"{split} rows", describe_rows(rows) | view
    # The caches of earlier versions have no entry `view`.
    written = cache.manifest | {key: {name: cache.manifest["splits"][split].get(name, {}) for name in about}}
    wanted = made_from(config, tokenizer) | {key: about}
    lines = {name: differences(written[name], value, name) for name, value in wanted.items()}
    explanation = lines.pop("settings")
    if any(lines.values()):
        raise ValueError(cache.refusal([line for entry in (*lines.values(), explanation) for line in entry]))
    return CachedValues(cache, split, rows)


def check_use(
    config: Settings, terms: tuple[Term, ...], source: Source, kind: str, k: int | None = None, member: str = "teacher"
) -> None:
    """Checks that a cache of this kind is sufficient for a config.

    Args:
      config: the config of the run.
      terms: the terms of the objective.
      source: the source of the rows.
      kind: the kind of the cache.
      k: the number of tokens in a cache of kind 'top_k'; None to allow any number that a term needs.
      member: the name of the frozen model that the cache replaces.

    Raises:
      ValueError: the config needs the teacher itself, or more of the teacher's distributions than the cache has.
    """
    if source.authors or source.origins != ("data",):
        raise ValueError(
            f"a cache has values for the rows of the dataset only, but prefixes.name={name_of(config.prefixes)!r} samples new rows "
            f"and needs the {member} itself. Use prefixes.name='data', or leave {key_of_cache(member)} empty."
        )
    if member != "teacher" and kind != "hidden":
        raise ValueError(
            f"{key_of_cache(member)} has a cache of kind {kind!r}, but a member is compared beside other models, which needs its "
            f"whole distributions. Use a cache of kind 'hidden'."
        )
    for term in terms:
        where = f"objective.terms.{term.name}"
        if member not in term.members:
            continue
        if term.rows == "text":
            raise ValueError(
                f"{where} compares with a teacher on rows='text', but a cache has values only for the rows of the section data."
            )
        needed = term.loss.sufficient_k if kind == "top_k" and isinstance(term.loss, Comparison) else None
        if needed is not None and k is not None and needed > k:
            raise ValueError(
                f"{where} has vocabulary.k={needed}, but the cache has only the teacher's {k} likeliest tokens. Set a smaller k, or "
                f"write a cache with a larger one."
            )
        readers = [key for key in term.whole_readers if key != "vocabulary" or needed is None]
        if kind != "hidden" and readers:
            raise ValueError(
                f"{where} needs the teacher's distribution over the whole vocabulary for its {', '.join(readers)}, but a "
                f"cache of kind {kind!r} has only a part of it. Use a cache of kind 'hidden'."
            )
        if kind == "samples":
            _check_samples(where, config.objective.terms[term.name])


def _check_samples(where: str, spec: Json) -> None:
    assistant = spec["assistant"]
    assistant = assistant if isinstance(assistant, str) or assistant is None else assistant["name"]
    function, _ = resolve.look_up(spec["divergence"], divergences, positional=True)
    if (
        function is not divergences.forward_kl
        or tuple(spec["pair"]) != ("teacher", "student")
        or assistant not in (None, "none")
    ):
        raise ValueError(
            f"{where} has divergence {function.__name__!r}, pair {tuple(spec['pair'])} and assistant {assistant!r}. A cache of "
            f"kind 'samples' gives unbiased values only for forward_kl of ('teacher', 'student') without an assistant. Use a "
            f"cache of kind 'hidden' or 'top_k'."
        )
