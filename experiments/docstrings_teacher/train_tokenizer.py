"""Trains the tokenizer of the docstrings teacher: 4,096 byte-level BPE tokens for Python and its docstrings.

    python -m experiments.docstrings_teacher.train_tokenizer FOLDER

Writes tokenizer.json and tokenizer_config.json, which transformers can also read.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kd_jax import data

VOCABULARY = 4096
END, PAD = "<|endoftext|>", "<|pad|>"


def train(texts: Iterator[str]) -> Tokenizer:
    """Returns a byte-level BPE tokenizer of VOCABULARY tokens. It encodes and decodes every text without a change."""
    tokenizer = Tokenizer(models.BPE())
    # Each digit is a token, so that the tokens of a number do not depend on its neighbours. A line end and
    # the indentation after it become one token.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    """Trains on the split `train`, and writes the tokenizer to the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to which the tokenizer is written")
    parser.add_argument("--data_dir", help="folder of the built datasets (default: the folder of tensorflow_datasets)")
    arguments = parser.parse_args()
    rows = data.load("docstrings", split="train", data_dir=arguments.data_dir)
    tokenizer = train(f"{row['prompt']}\n{row['response']}" for row in (rows[i] for i in range(len(rows))))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(arguments.folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": 256,
    }
    (arguments.folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
