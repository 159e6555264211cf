"""From rows to batches: every mask position, truncated and dropped rows, order, shares and resuming."""

import itertools
import threading

import numpy as np
import pytest

from kd_jax import data
from tests.helpers import folders

PAD = 99


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return folders.letters(tmp_path_factory.mktemp("tokenizer") / "letters")


@pytest.fixture
def tokenize(tokenizer):
    options = {"template": "plain", "max_length": 6, "max_prompt_length": 4}
    return lambda source, **changes: data.tokenize(source, tokenizer, **options | changes)


def row(prompt, response):
    return {"prompt": prompt, "context": "", "response": response}


def batches(rows, **options):
    return data.batches(rows, **{"batch_size": 2, "max_length": 6, "seed": 3, "pad_id": PAD} | options)


def numbered(count):
    """Returns rows of one prompt token and one response token, which is the number of the row plus 100."""
    tokens = np.stack([np.full(count, 5), np.arange(count) + 100], axis=1).reshape(-1).astype(np.int32)
    ones = np.ones(count, np.int32)
    return data.Rows(tokens, np.arange(count + 1) * 2, ones, ones)


def numbers(batch):
    """Returns the numbers of the `numbered` rows in a batch, in order, with -1 for a fully masked row."""
    return np.where(batch["mask"][:, 0], batch["targets"][:, 0] - 100, -1).tolist()


def test_masks_position_by_position(tokenize):
    rows, counts = tokenize([row("ab", "cd"), row("", "c")])
    assert [rows[i].tolist() for i in range(2)] == [[1, 10, 11, 12, 13, 0], [1, 12, 0]]
    assert rows.prompt_lengths.tolist() == [3, 1]
    assert {name: count for name, count in counts.items() if count} == {"read": 2, "kept": 2}
    (batch,) = batches(rows, shuffle=False, num_epochs=1)
    np.testing.assert_array_equal(batch["tokens"], [[1, 10, 11, 12, 13, PAD], [1, 12, PAD, PAD, PAD, PAD]])
    np.testing.assert_array_equal(batch["targets"], [[10, 11, 12, 13, 0, PAD], [12, 0, PAD, PAD, PAD, PAD]])
    np.testing.assert_array_equal(batch["mask"], [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch["loss_mask"], [[0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32", "targets": "int32", "mask": "bool", "loss_mask": "bool",
    }  # fmt: skip


def test_loss_on_all_counts_the_prompt_but_not_its_first_token(tokenize):
    rows, _ = tokenize([row("ab", "cd")], loss_on="all")
    (batch,) = batches(rows, shuffle=False, num_epochs=1, batch_size=1)
    np.testing.assert_array_equal(batch["loss_mask"], [[1, 1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(batch["mask"], [[1, 1, 1, 1, 1, 0]])
    assert rows.prompt_lengths.tolist() == [3]


def test_a_chat_template_writes_its_own_special_tokens(tokenize):
    rows, _ = tokenize([row("ab", "c")], template="chat")
    assert rows[0].tolist() == [10, 11, 12, 0]


SOURCE = [
    row("a", "bc"),  # bos a | b c end
    row("abcd", "ef"),  # bos a b c d: one token too many
    row("abc", "defg"),  # bos a b c | d e f g end: two tokens too many
    row("abc", "de"),  # bos a b c | d e end: fits exactly
    row("abc", "def"),  # bos a b c | d e f end: the end does not fit
    row("a", ""),
]


def test_what_is_too_long_is_cut(tokenize):
    rows, counts = tokenize(SOURCE, long_prompts="cut", long_responses="cut")
    assert [rows[i].tolist() for i in range(len(rows))] == [
        [1, 10, 11, 12, 0],
        [1, 10, 11, 12, 14, 15, 0],
        [1, 10, 11, 12, 13, 14, 15],  # a truncated response has no end token
        [1, 10, 11, 12, 13, 14, 0],
        [1, 10, 11, 12, 13, 14, 15],
    ]
    assert (counts["prompts_cut"], counts["responses_cut"], counts["empty"], counts["kept"]) == (1, 2, 1, 5)
    assert counts["prompts_dropped"] == counts["responses_dropped"] == 0


def test_what_is_too_long_is_dropped(tokenize):
    rows, counts = tokenize(SOURCE, long_prompts="drop", long_responses="drop")
    assert [rows[i].tolist() for i in range(len(rows))] == [[1, 10, 11, 12, 0], [1, 10, 11, 12, 13, 14, 0]]
    assert (counts["prompts_dropped"], counts["responses_dropped"], counts["empty"], counts["kept"]) == (1, 2, 1, 2)
    assert counts["read"] == 6


def test_tokenize_errors(tokenize):
    with pytest.raises(ValueError, match="max_prompt_length=6 must be at least 1 and less than max_length=6"):
        tokenize(SOURCE, max_prompt_length=6)
    with pytest.raises(ValueError, match="long_prompts='skip' must be one of drop, cut"):
        tokenize(SOURCE, long_prompts="skip")
    with pytest.raises(ValueError, match="long_responses='.*' must be one of cut, drop"):
        tokenize(SOURCE, long_responses="")
    with pytest.raises(ValueError, match="loss_on='.*' must be one of response, all"):
        tokenize(SOURCE, loss_on="prompt")
    with pytest.raises(
        ValueError, match=r"no row is left of 3: 1 prompts .*max_prompt_length=4.* 1 responses .* 1 responses are empty"
    ):
        tokenize([SOURCE[1], SOURCE[2], SOURCE[5]], long_responses="drop")


def test_pack_counts_each_token_once(tokenizer):
    source = [row("", "abc"), row("", "de"), row("", ""), row("", "fghi")]
    rows, counts = data.pack(source, tokenizer, max_length=4)
    stream = [10, 11, 12, 0, 13, 14, 0, 15, 16, 17, 18, 0]
    assert [rows[i].tolist() for i in range(len(rows))] == [stream[0:5], stream[4:9], stream[8:]]
    assert counts == {"read": 4, "kept": 3}
    targets = [
        b["targets"][b["loss_mask"]].tolist()
        for b in batches(rows, batch_size=1, max_length=4, shuffle=False, num_epochs=1)
    ]
    assert list(itertools.chain(*targets)) == stream[1:]
    with pytest.raises(ValueError, match="no text to pack in the 1 rows"):
        data.pack([row("", "")], tokenizer, max_length=4)
    with pytest.raises(ValueError, match="max_length=0 must be at least 1"):
        data.pack(source, tokenizer, max_length=0)


def test_an_evaluation_reads_each_row_once_in_order_and_fills_up():
    read = list(batches(numbered(7), batch_size=4, shuffle=False, num_epochs=1))
    assert [numbers(batch) for batch in read] == [[0, 1, 2, 3], [4, 5, 6, -1]]
    assert not read[1]["mask"][3].any() and not read[1]["loss_mask"][3].any()
    assert (read[1]["tokens"][3] == PAD).all()


def test_the_order_is_the_seeds_and_another_in_each_epoch():
    def epochs(seed):
        read = iter(batches(numbered(10), batch_size=5, seed=seed))
        return [numbers(next(read)) + numbers(next(read)) for _ in range(3)]

    first = epochs(3)
    assert first == epochs(3) != epochs(4)
    assert all(sorted(epoch) == list(range(10)) for epoch in first)
    assert first[0] != first[1] != first[2] and first[0] != list(range(10))


@pytest.mark.parametrize("options", [{}, {"shuffle": False, "num_epochs": 2}], ids=["training", "evaluation"])
def test_processes_share_each_global_batch(options):
    rows, steps = numbered(11), 4
    whole = [numbers(b) for b, _ in zip(batches(rows, batch_size=6, **options), range(steps), strict=False)]
    for count in (2, 3):
        shares = [
            [
                numbers(b)
                for b, _ in zip(
                    batches(rows, batch_size=6, process_index=k, process_count=count, **options),
                    range(steps),
                    strict=False,
                )
            ]
            for k in range(count)
        ]
        assert {len(share) for share in shares} == {len(whole)}
        for step, batch in enumerate(whole):
            for k, share in enumerate(shares):
                assert share[step] == batch[k::count]


def test_a_state_resumes_with_the_next_batch():
    rows = numbered(10)
    reading = iter(batches(rows, batch_size=3))
    for _ in range(5):  # into the second epoch
        next(reading)
    state = reading.get_state()
    expected = [numbers(next(reading)) for _ in range(4)]
    resumed = iter(batches(rows, batch_size=3))
    resumed.set_state(state)
    assert [numbers(next(resumed)) for _ in range(4)] == expected
    reading.set_state(state)  # an iterator that has read further also returns to the state
    assert [numbers(next(reading)) for _ in range(4)] == expected


def test_batches_leave_no_thread_behind():
    before = set(threading.enumerate())
    reading = iter(batches(numbered(10)))
    next(reading)
    started = [thread for thread in threading.enumerate() if thread not in before]
    assert started  # the iterator reads ahead
    reading.close()
    for thread in started:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in started)


def test_batches_errors(tokenize):
    rows = numbered(4)
    with pytest.raises(ValueError, match="batch_size=5 is not a multiple of the number of processes, 2"):
        batches(rows, batch_size=5, process_count=2)
    with pytest.raises(ValueError, match="process_index=2 must be at least 0 and below process_count=2"):
        batches(rows, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="num_epochs=0 must be None or at least 1"):
        batches(rows, num_epochs=0)
    with pytest.raises(ValueError, match="the longest row has 7 tokens; max_length=5 has room for 6"):
        batches(tokenize(SOURCE)[0], max_length=5)


def test_a_source_needs_only_a_length_and_an_index(tokenize):
    # A source of tfds raises no IndexError at the end, so the code must not iterate over it.
    source = type("Source", (), {"__len__": lambda self: 1, "__getitem__": lambda self, i: SOURCE[0]})()
    assert tokenize(source)[1]["read"] == 1
