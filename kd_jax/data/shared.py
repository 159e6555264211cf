"""Limits the tokenizer of a run to the ids that all models of the run have."""

from pathlib import Path

import jax
from tqdm import tqdm

from kd_jax.data.limited import common_ids, differing_tokens, shown_difference, shown_tokens
from kd_jax.data.tokenizer import Tokenizer


def fit_tokenizer(path: str, vocab_size: int, tokenizer: Tokenizer, who: str) -> Tokenizer:
    """Returns the tokenizer without the few added tokens, if any, for which a model has no ids, and says so.

    Raises:
      ValueError: the model lacks ids of other tokens, or of too many.
    """
    try:
        fitting = tokenizer.limited(vocab_size)
    except ValueError as error:
        raise ValueError(
            f"the {who} ({path}) has an output of {vocab_size} ids, fewer than the tokenizer's {tokenizer.vocab_size}: "
            f"teacher, student and tokenizer must share one vocabulary (padding beyond it is fine). {error}"
        ) from error
    if fitting is not tokenizer:
        gone = shown_tokens(tokenizer.tokens_beyond(vocab_size))
        _say(
            f"The {who} ({path}) has {vocab_size} ids and the tokenizer {tokenizer.vocab_size}. The run leaves out {gone}."
        )
    return fitting


def check_same_tokenizer(path: Path, tokenizer: Tokenizer, who: str) -> Tokenizer:
    """Compares the tokenizer in a model's folder with the run's, and returns the one to use.

    The two may differ in a few added tokens at the end. The run then uses the ids that both have, and this is said.

    Args:
      path: the model's folder.
      tokenizer: of the run.
      who: 'teacher' or 'student', for the message.

    Returns:
      The run's tokenizer, limited to the ids that both have.

    Raises:
      ValueError: the folder has no tokenizer, or the two vocabularies differ in more; up to five differing tokens are named.
    """
    if not (path / "tokenizer.json").exists():
        raise ValueError(f"{path} has no tokenizer.json, so its vocabulary cannot be compared with the run's; add it.")
    own = Tokenizer.load(path)
    ours, theirs = tokenizer.vocabulary(), own.vocabulary()
    different = differing_tokens(ours, theirs)
    if not different:
        return tokenizer
    size = common_ids(ours, theirs)
    try:
        own.tokens_beyond(size)
        fitting = tokenizer.limited(size)
    except ValueError as error:
        raise ValueError(
            f"the {who}'s tokenizer ({path}, {own.vocab_size} ids) is not the run's ({tokenizer.vocab_size} ids): "
            f"{shown_difference(different, who)}. A divergence compares id by id; choose models that share a tokenizer. They may "
            f"differ in a few added tokens at the end only. {error}"
        ) from error
    gone = [token for token, *_ in different]
    _say(
        f"The {who}'s tokenizer ({path}, {own.vocab_size} ids) and the run's ({tokenizer.vocab_size} ids) have the first {size} ids "
        f"in common. The run leaves out {shown_tokens(gone)}."
    )
    return fitting


def _say(line: str) -> None:
    if jax.process_index() == 0:
        tqdm.write(line)
