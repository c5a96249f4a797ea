"""The tokenizer of the reference VLA: byte-level BPE, learned from the instructions of one deployment."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from bridge.errors import FieldtuneError
from runtime.policy import encode

# No text can spell it: byte-level BPE writes a space as another character.
PADDING = "<no token>"
SMALLEST = 256 + 1  # every byte, and padding


class TokenizerError(FieldtuneError):
    """The tokenizer cannot be made as asked; the message says what to change."""


def build_tokenizer(instructions: Iterable[str], vocabulary: int, max_tokens: int) -> Tokenizer:
    """A tokenizer of at most `vocabulary` tokens that pads to `max_tokens` with id 0.

    Every text can be encoded, since every byte is a token. Equal instructions, in whatever order, give an equal
    tokenizer. Raises `TokenizerError` if the vocabulary has no room for the bytes, `InstructionError` if an instruction
    needs more than `max_tokens`.
    """
    if vocabulary < SMALLEST:
        raise TokenizerError(
            f"trainer.vla.vocabulary is {vocabulary}, it must be at least {SMALLEST}: every byte and padding"
        )
    known = sorted(set(instructions))
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    learner.train_from_iterator(
        known,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[PADDING],  # the first token, hence id 0
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    content = json.loads(learner.to_str())
    # A special token is looked for in every text. Padding is to be an entry of the vocabulary and nothing else.
    content["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.enable_padding(length=max_tokens, pad_id=0, pad_token=PADDING)
    for instruction in known:
        encode(tokenizer, instruction, max_tokens)
    return tokenizer
