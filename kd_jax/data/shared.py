"""The tokenizer of a run, limited to the ids that all models of the run have."""

from pathlib import Path

import jax
from tqdm import tqdm

from kd_jax.data.limited import common_ids, differing_tokens, shown_difference, shown_tokens
from kd_jax.data.tokenizer import Tokenizer

# The uses of a teacher with another tokenizer, for a message.
ACROSS = (
    ", or compare spans of text with a term of kind='spans' (configs/alm.py), or learn from the teacher's text "
    "(configs/seqkd.py)"
)


def fit_tokenizer(path: str, vocab_size: int, tokenizer: Tokenizer, who: str) -> Tokenizer:
    """Returns the tokenizer without the few added tokens for which a model has no ids. Removed tokens are printed.

    Args:
      path: the model, for messages.
      vocab_size: the number of ids of the model.
      tokenizer: the tokenizer of the run.
      who: "teacher" or "student", for messages.

    Raises:
      ValueError: the model lacks an id of a token that is not an added token, or lacks the ids of too many tokens.
    """
    try:
        fitting = tokenizer.limited(vocab_size)
    except ValueError as error:
        raise ValueError(
            f"the {who} ({path}) has an output of {vocab_size} ids, fewer than the tokenizer's {tokenizer.vocab_size}: "
            f"teacher, student and tokenizer must share one vocabulary (padding after the last id is allowed). {error}"
        ) from error
    if fitting is not tokenizer:
        removed = shown_tokens(tokenizer.tokens_beyond(vocab_size))
        _print(
            f"The {who} ({path}) has {vocab_size} ids and the tokenizer {tokenizer.vocab_size}. The run does not use {removed}."
        )
    return fitting


def check_same_tokenizer(path: Path, tokenizer: Tokenizer, who: str) -> Tokenizer:
    """Compares the tokenizer in a model's folder with the run's tokenizer, and returns the tokenizer to use.

    The two tokenizers may differ in a few added tokens at the end. The run then uses only the common ids, and the other
    tokens are printed.

    Args:
      path: the model's folder.
      tokenizer: the tokenizer of the run.
      who: "teacher" or "student", for messages.

    Returns:
      The run's tokenizer, limited to the common ids.

    Raises:
      ValueError: the folder has no tokenizer, or the vocabularies differ in more than a few added tokens at the end. The
        message names up to five differing tokens.
    """
    if not (path / "tokenizer.json").exists():
        raise ValueError(f"{path} has no tokenizer.json, so its vocabulary cannot be compared with the run's; add it.")
    model_tokenizer = Tokenizer.load(path)
    ours, theirs = tokenizer.vocabulary(), model_tokenizer.vocabulary()
    different = differing_tokens(ours, theirs)
    if not different:
        return tokenizer
    size = common_ids(ours, theirs)
    try:
        model_tokenizer.tokens_beyond(size)
        fitting = tokenizer.limited(size)
    except ValueError as error:
        raise ValueError(
            f"the {who}'s tokenizer ({path}, {model_tokenizer.vocab_size} ids) is not the run's ({tokenizer.vocab_size} ids): "
            f"{shown_difference(different, who)}. A divergence compares id by id; choose models that share a "
            f"tokenizer{ACROSS if who == 'teacher' else ''}. The tokenizers may only differ in a few "
            f"added tokens at the end. {error}"
        ) from error
    removed = [token for token, *_ in different]
    _print(
        f"The {who}'s tokenizer ({path}, {model_tokenizer.vocab_size} ids) and the run's ({tokenizer.vocab_size} ids) have the "
        f"first {size} ids in common. The run does not use {shown_tokens(removed)}."
    )
    return fitting


def _print(line: str) -> None:
    if jax.process_index() == 0:
        tqdm.write(line)
