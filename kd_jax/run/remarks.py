"""Sentences about the rows of a run: their format, the turns that count, what the template adds, and rows that are lost."""

from collections.abc import Mapping

from kd_jax import data
from kd_jax.data import counts
from kd_jax.data.turns import Turns
from kd_jax.run.cache import AnyRows, unpacked
from kd_jax.run.view_prompts import format_of_rows, rows_are_turns
from kd_jax.settings import Settings
from kd_jax.storage.untrusted import clip

COUNTED = {
    "all": "the loss counts all turns of the assistant",
    "turns": "each turn of the assistant is a row, and its prompt is all turns before",
    "last": "the loss counts the assistant's last turn, and the prompt is all turns before",
}


def remarks(config: Settings, tokenizer: data.Tokenizer, rows: Mapping[str, AnyRows]) -> tuple[str, ...]:
    """Returns the sentences that a run prints at its start.

    Args:
      config: the settings of the run.
      tokenizer: the tokenizer, with the chat template.
      rows: the rows by split.
    """
    sentences = []
    if (found := format_of_rows(config)) is not None and found.name != "prompt_response":
        of_turns = ""
        if found.has_turns:
            which = "turns" if rows_are_turns(config) else "all" if config.data.loss_on == "all" else "last"
            of_turns = f"; {COUNTED[which]} (data.loss_on={config.data.loss_on!r})"
        sentences.append(f"the rows are {found.described()} (format {found.name}){of_turns}")
    template = data.Template.of(config.data)
    if template.name == "chat" and (added := Turns(template, tokenizer).added()):
        sentences.append(
            f"the chat template writes this before the first turn of a user, unless a conversation has a system message: "
            f"{clip(added)!r}"
        )
    for split, of_split in rows.items():
        for name, example in unpacked(of_split).examples.items():
            sentences.append(f"{split}, {counts.NAMES[name]}: for example {example}")
    return tuple(sentences)
