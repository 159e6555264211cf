"""From rows of text to rows of tokens: prompt, response and end token, with counts of dropped and truncated rows."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from kd_jax.data.encoding import Encoded, Encoder
from kd_jax.data.prompts import Template
from kd_jax.data.rows import Rows, Texts, from_pieces
from kd_jax.data.tokenizer import Tokenizer
from kd_jax.data.turns import Spans

SHOWN = 60  # the largest number of characters of a row that is shown
COUNTS = ("read", "prompts_cut", "prompts_dropped", "responses_cut", "responses_dropped", "empty", "own_prefix")


def tokenize(
    source: Texts,
    tokenizer: Tokenizer,
    *,
    template: str | Template,
    max_length: int,
    max_prompt_length: int,
    long_prompts: str = "drop",
    long_responses: str = "cut",
    loss_on: str = "response",
) -> tuple[Rows, dict[str, int]]:
    """Returns the rows of the source as prompt, response and one end token, with at most max_length + 1 tokens.

    A row has one more token than `max_length` because it gives inputs [:-1] and targets [1:]. Prompt and response are
    encoded as one text (`Tokenizer.encode_pairs`).

    Args:
      source: rows with prompt, context and response.
      tokenizer: the tokenizer, whose `eos_id` is the end token.
      template: the template: plain, alpaca or chat (`kd_jax.data.prompts`).
      max_length: the number of tokens of a model's input.
      max_prompt_length: the largest number of tokens of a prompt.
      long_prompts: the treatment of a longer prompt. "cut" truncates the user's text, the context first, and never the
        template's own tokens. "drop" drops the row.
      long_responses: the treatment of a response that does not fit with its end token. "cut" truncates the response and
        adds no end token, because a truncated response has no end. "drop" drops the row.
      loss_on: "response" or "last" counts the response and its end token in the loss, which is the assistant's last turn
        of a conversation. "all" counts all turns of the assistant in a conversation, and the prompt of other rows as
        well. With "all", only `max_length` limits a conversation: its last turns are truncated.

    Returns:
      The rows, and these counts: read, prompts_cut, prompts_dropped, responses_cut, responses_dropped, empty (rows
        whose response has no token, which are dropped), own_prefix (prompts whose text begins with the tokenizer's
        `prefix_ids`) and kept. `Rows.examples` shows one row of each count of dropped or truncated rows.

    Raises:
      ValueError: `max_prompt_length` leaves no room for a response or for the template, a choice is unknown, or all
        rows are dropped.

    References:
      Long prompts are truncated in DistiLLM and dropped in MiniLLM.
    """
    _check_choice("long_prompts", long_prompts, ("drop", "cut"))
    _check_choice("long_responses", long_responses, ("cut", "drop"))
    _check_choice("loss_on", loss_on, ("response", "all", "last"))
    if not 0 < max_prompt_length < max_length:
        raise ValueError(
            f"max_prompt_length={max_prompt_length} must be at least 1 and less than max_length={max_length}, or no "
            f"response fits."
        )
    encoder = Encoder(tokenizer, template, max_prompt_length, long_prompts == "cut", all_turns=loss_on == "all")
    rows, counts, first = _assemble(
        encoder.rows(source), tokenizer, max_length, max_prompt_length, long_responses, loss_on
    )
    rows = dataclasses.replace(rows, examples={name: shown_row(source[index]) for name, index in first.items()})
    if not counts["kept"]:
        raise ValueError(
            f"no row is left of {counts['read']}: {counts['prompts_dropped']} prompts are longer than "
            f"max_prompt_length={max_prompt_length} tokens (raise it, or long_prompts='cut'), "
            f"{counts['responses_dropped']} responses do not fit into max_length={max_length} (raise it, or "
            f"long_responses='cut'), {counts['empty']} responses are empty."
        )
    return rows, counts


def from_ids(
    pairs: Sequence[tuple[list[int], list[int]]], tokenizer: Tokenizer, *, max_length: int, loss_on: str = "response"
) -> tuple[Rows, dict[str, int]]:
    """Returns rows made from ids, such as sampled responses. Each row gets one end token.

    Args:
      pairs: (ids of a prompt, ids of its response). End tokens after the response are replaced by the trained end
        token.
      tokenizer, max_length, loss_on: the arguments of `tokenize`. Longer responses are truncated.

    Returns:
      The rows and counts, as `tokenize` returns them.
    """
    encoded = (Encoded(prompt, response, False, False) for prompt, response in pairs)
    return _assemble(encoded, tokenizer, max_length, max_length, "cut", loss_on)[:2]


def _assemble(
    encoded_rows: Iterable[Encoded], tokenizer: Tokenizer, max_length: int, max_prompt_length: int, long_responses: str,
    loss_on: str,
) -> tuple[Rows, dict[str, int], dict[str, int]]:  # fmt: skip
    """Joins prompt, response and end token of each row, and counts the rows that are dropped or truncated.

    Returns:
      The rows, the counts, and the index of the first row of each count.
    """
    counts, first = dict.fromkeys(COUNTS, 0), dict[str, int]()
    pieces: list[_Piece] = []
    sources: list[int] = []
    for index, encoded in enumerate(encoded_rows):
        if encoded.spans:
            piece, problem = _piece_of_turns(encoded, max_length, max_prompt_length, long_responses, loss_on)
        else:
            piece, problem = _piece_of_response(
                encoded, tokenizer, max_length, max_prompt_length, long_responses, loss_on
            )
        happened = {"prompts_cut": encoded.truncated, "own_prefix": encoded.own_prefix, problem: bool(problem)}
        for name in ("read", *(name for name, is_so in happened.items() if is_so)):
            counts[name] += 1
            first.setdefault(name, index)
        if piece is not None:
            pieces.append(piece)
            sources.append(index)
    counts["kept"] = len(pieces)
    lengths = np.array([piece.prompt_length for piece in pieces], np.int32)
    begins = np.array([piece.first_counted for piece in pieces], np.int32)
    masks = None
    if any(piece.spans for piece in pieces):
        masks = [_mask(piece) for piece in pieces]
    shown = {name: index for name, index in first.items() if name not in ("read", "own_prefix")}
    return from_pieces([p.ids for p in pieces], lengths, begins, np.array(sources, np.int32), masks), counts, shown


class _Piece(NamedTuple):
    """The tokens of a row. `spans` are the counted parts; () if all tokens from `first_counted` on count."""

    ids: Int[np.ndarray, " L"]
    prompt_length: int
    first_counted: int
    spans: Spans = ()


def _piece_of_response(
    encoded: Encoded, tokenizer: Tokenizer, max_length: int, max_prompt_length: int, long_responses: str, loss_on: str
) -> tuple[_Piece | None, str]:
    """Returns prompt, response and one end token; None for a dropped row. The text names the count of the row, or is ""."""
    prompt, response = encoded.prompt, tokenizer.strip_ends(encoded.response)
    if not response:
        return None, "empty"
    if len(prompt) > max_prompt_length:
        return None, "prompts_dropped"
    room = max_length + 1 - len(prompt)
    response = [*response, tokenizer.eos_id]
    too_long = len(response) > room
    if too_long and long_responses == "drop":
        return None, "responses_dropped"
    first = 0 if loss_on == "all" else len(prompt)
    ids = np.array(prompt + response[:room], np.int32)
    return _Piece(ids, len(prompt), first), "responses_cut" if too_long else ""


def _piece_of_turns(
    encoded: Encoded, max_length: int, max_prompt_length: int, long_responses: str, loss_on: str
) -> tuple[_Piece | None, str]:
    """Returns a conversation; None for a dropped row. The text names the count of the row, or is ""."""
    if loss_on != "all" and len(encoded.prompt) > max_prompt_length:
        return None, "prompts_dropped"
    ids, room = encoded.prompt + encoded.response, max_length + 1
    if len(ids) > room and long_responses == "drop":
        return None, "responses_dropped"
    spans = tuple((begin, min(end, room)) for begin, end in encoded.spans if begin < min(end, room))
    if not spans:
        return None, "prompts_dropped" if encoded.response else "empty"
    ids, too_long = ids[: spans[-1][1]], len(ids) > room
    prompt_length = min(len(encoded.prompt), spans[-1][0])
    is_one = len(spans) == 1 and spans[0][1] == len(ids)
    return _Piece(
        np.array(ids, np.int32), prompt_length, spans[0][0], () if is_one else spans
    ), "responses_cut" * too_long


def _mask(piece: _Piece) -> Bool[np.ndarray, " L"]:
    """Returns True for each token of a row that the loss counts."""
    mask = np.zeros(len(piece.ids), bool)
    for begin, end in piece.spans or ((piece.first_counted, len(piece.ids)),):
        mask[begin:end] = True
    return mask


def shown_row(row: Mapping[str, str]) -> str:
    """Returns a phrase that shows a row: its name, and the beginning of its prompt or else of its response.

    Example:
      >>> shown_row({"name": "chat.jsonl:3", "prompt": "What is a shard?", "context": "", "response": "A part."})
      "chat.jsonl:3, 'What is a shard?'"
    """
    text = " ".join((row["prompt"] or row["response"]).split())
    name = f"{row['name']}, " if row.get("name") else ""
    return f"{name}{text[:SHOWN]!r}{'...' if len(text) > SHOWN else ''}"


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}.")
