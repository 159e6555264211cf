"""The pipeline from rows of text to batches of tokens.

Rows are tokenised once, and the seed decides the global order. Iteration over the batches can be resumed at any batch.
"""

import sys
from collections.abc import Callable, Mapping, Sequence

import grain
import numpy as np
from jaxtyping import Bool, Int

from kd_jax.data.encoding import Encoder
from kd_jax.data.prompts import Template
from kd_jax.data.rows import LineArrays, Packed, Rows, Texts, TokenValues, from_pieces
from kd_jax.data.tokenizer import Tokenizer


def pack(source: Texts, tokenizer: Tokenizer, *, max_length: int) -> tuple[Rows, dict[str, int]]:
    """Returns the responses as one stream, split into rows of max_length + 1 tokens. All tokens are counted.

    The function is for plain text. An end token follows each response, and only the last row needs padding. Adjacent
    rows overlap by one token, so that each token after the first is a target exactly once.

    Args:
      source: rows whose `response` is text, such as the dataset `text`.
      tokenizer: the tokenizer.
      max_length: the number of tokens of a model's input.

    Returns:
      The rows, and the counts read (rows of the source) and kept (rows of tokens).

    Raises:
      ValueError: there is no text, or `max_length` is below 1.
    """
    if max_length < 1:
        raise ValueError(f"max_length={max_length} must be at least 1.")
    pieces = [
        np.array([*tokenizer.strip_ends(encoded.response), tokenizer.eos_id], np.int32)
        for encoded in Encoder(tokenizer, "plain").rows(source)
        if encoded.response
    ]
    if not pieces:
        raise ValueError(f"there is no text to pack in the {len(source)} rows.")
    stream = np.concatenate(pieces)
    starts = range(0, len(stream) - 1, max_length)
    zeros = np.zeros(len(starts), np.int32)
    packed = from_pieces([stream[start : start + max_length + 1] for start in starts], zeros, zeros)
    return packed, {"read": len(source), "kept": len(packed)}


def batches(
    rows: Rows | Packed,
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    shuffle: bool = True,
    num_epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    pad_id: int,
    token_values: TokenValues | None = None,
    line_arrays: LineArrays | None = None,
    order: Callable[[int], int] | None = None,
) -> grain.IterDataset:
    """Returns batches of a fixed shape: this process's share of each global batch.

    A process gets every `process_count`-th row of a global batch. The global order depends only on the seed, and each
    epoch has its own order. Batch i holds the same rows for any number of processes. With several epochs, a batch may
    hold the end of one epoch and the start of the next. The iterator's `get_state` and `set_state` are exact: a resumed
    run reads the same batches as an uninterrupted run.

    Args:
      rows: the rows from `tokenize`, `pack`, `join` or `pack_rows`.
      batch_size: the number of rows of a global batch.
      max_length: the number of tokens of a row of the batch. Each of `rows` has at most max_length + 1 tokens.
      seed: the seed of the order, in [0, 2^32).
      shuffle: False to read the rows in their own order.
      num_epochs: the number of epochs; None for no end. With a number, the last batch is filled up with fully masked
        rows. So each row is read, and every process gets the same number of batches.
      process_index, process_count: the values of `jax.process_index()` and `jax.process_count()`.
      pad_id: the padding token, on the right of shorter rows.
      token_values: additional values of the rows' tokens, which become arrays by name, [batch_size / process_count,
        max_length, ...]. For packed rows, `token_values` is indexed by the rows before packing.
      line_arrays: additional arrays of the batch, also indexed by the rows before packing.
      order: a function from a position in the sequence of all global batches to the index of the row there, as in
        `kd_jax.data.orders`, in place of `seed` and `shuffle`; None for the order of these two.

    Returns:
      An iterable of dicts of NumPy arrays, each [batch_size / process_count, max_length]: tokens and targets (int32),
        mask (True if `tokens` has a token) and loss_mask (True if the target counts). For packed rows, mask is int32:
        each token's segment, from 1, and 0 at padding.

    Raises:
      ValueError: the processes cannot share the batch evenly, rows are longer than max_length + 1, or a number is out
        of range.

    Example:
      >>> rows = Rows(np.array([5, 6, 7, 8]), np.array([0, 4]), np.array([2]), np.array([2]))
      >>> batch = next(iter(batches(rows, batch_size=1, max_length=4, seed=0, pad_id=0, num_epochs=1)))
      >>> batch["tokens"], batch["targets"]
      (array([[5, 6, 7, 0]], dtype=int32), array([[6, 7, 8, 0]], dtype=int32))
      >>> batch["mask"], batch["loss_mask"]
      (array([[ True,  True,  True, False]]), array([[False,  True,  True, False]]))
    """
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} is not a multiple of the number of processes, {process_count}.")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must be at least 0 and below process_count={process_count}.")
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs={num_epochs} must be None or at least 1.")
    single = rows.rows if isinstance(rows, Packed) else rows
    longest = int(np.diff(single.offsets).max())
    if longest > max_length + 1:
        raise ValueError(
            f"the longest row has {longest} tokens; max_length={max_length} has room for {max_length + 1}."
        )
    in_order = grain.MapDataset.range(len(rows))
    shuffled = (in_order.shuffle(seed) if shuffle else in_order).repeat()  # each epoch has its own order
    # grain's type allows None, which only a filtered dataset has.
    row_at: Callable[[int], int | None] = shuffled.__getitem__ if order is None else order
    num_rows = sys.maxsize if num_epochs is None else len(rows) * num_epochs

    def make_batch(index: int) -> dict[str, np.ndarray]:
        start = index * batch_size
        positions = range(start + process_index, start + batch_size, process_count)
        indices = [i for position in positions if position < num_rows and (i := row_at(position)) is not None]
        groups = [rows.groups[index] if isinstance(rows, Packed) else (index,) for index in indices]
        batch = pad(single, groups, len(positions), max_length, pad_id, token_values)
        if line_arrays is not None:
            batch |= line_arrays.of_lines(groups, len(positions))
        return batch if isinstance(rows, Packed) else batch | {"mask": batch["mask"] > 0}

    # The elements are batches, so that one index is the complete state. The rows are in memory, so two threads are
    # enough to prepare the next batches. The arrays of `token_values` may be large, so fewer batches are buffered.
    num_batches = num_rows // batch_size if num_epochs is None else -(-num_rows // batch_size)
    read_options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8 if token_values is None else 2)
    return grain.MapDataset.range(num_batches).map(make_batch).to_iter_dataset(read_options)


def prompt_of(tokens: Int[np.ndarray, " L"], loss_mask: Bool[np.ndarray, " L"]) -> list[int]:
    """Returns the ids of the prompt of a row of a batch: all tokens before the first target that counts.

    Args:
      tokens: the row's tokens.
      loss_mask: True if the target at a position counts.
    """
    return tokens[: loss_mask.argmax() + 1].tolist()


def pad(
    rows: Rows, groups: Sequence[Sequence[int]], num_rows: int, max_length: int, pad_id: int,
    token_values: TokenValues | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Returns the arrays of a batch as in `batches`, except that the mask always holds segments.

    Args:
      rows: the rows from which the batch is made.
      groups: the indices of the rows that share a row of the batch.
      num_rows: the number of rows of the batch. Rows without a group are padding and count nowhere.
      max_length, pad_id, token_values: the arguments of `batches`.
    """
    tokens = np.full((num_rows, max_length), pad_id, np.int32)
    targets = np.full((num_rows, max_length), pad_id, np.int32)
    segments = np.zeros((num_rows, max_length), np.int32)
    loss_mask = np.zeros((num_rows, max_length), bool)
    fill_values = {} if token_values is None else token_values.fill_values
    more = {name: np.full((num_rows, max_length, *fill.shape), fill, fill.dtype) for name, fill in fill_values.items()}
    for batch_row, group in enumerate(groups):
        end = 0
        for segment, index in enumerate(group, start=1):
            row = rows[index]
            start, end = end, end + len(row) - 1
            tokens[batch_row, start:end] = row[:-1]
            targets[batch_row, start:end] = row[1:]
            segments[batch_row, start:end] = segment
            counted = loss_mask[batch_row, start:end] = rows.targets_counted(index)
            for name, values in {} if token_values is None else token_values.read(index).items():
                more[name][batch_row, start:end][counted] = values
    return {"tokens": tokens, "targets": targets, "mask": segments, "loss_mask": loss_mask, **more}


def encode_prompts(
    rows: Sequence[Mapping[str, str]], *, tokenizer: Tokenizer, template: str | Template, max_length: int, cut: bool
) -> list[list[int] | None]:
    """Returns the ids of each row's rendered prompt.

    Args:
      rows: rows with prompt and context.
      tokenizer, template: the arguments of `tokenize`.
      max_length: the largest number of tokens of a prompt.
      cut: True to truncate the user's text of a longer prompt, as in `tokenize`. With False, None replaces the ids of a
        longer prompt.

    Raises:
      ValueError: no prompt can be truncated to fit, as in `tokenize`.
    """
    encoder = Encoder(tokenizer, template, max_length, truncates=cut)
    prompts = (encoded.prompt for encoded in encoder.rows([{**row, "response": ""} for row in rows]))
    return [ids if len(ids) <= max_length else None for ids in prompts]
