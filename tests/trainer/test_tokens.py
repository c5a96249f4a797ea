"""Any text becomes tokens and nothing of it is lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from bridge.backends.metaworld_tasks import HELD_OUT, MT10, MT40, MT50, TRAINING
from runtime.policy import InstructionError, encode
from trainer.tokens import PADDING, TokenizerError, build_tokenizer

INSTRUCTIONS = ["open the drawer", "close the window", "press the button"]
TOKENIZER = build_tokenizer(INSTRUCTIONS, 512, 64)


def text_of(ids: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]") -> str:
    words = [TOKENIZER.id_to_token(int(i)) for i in ids if i]
    return str(decoders.ByteLevel().decode(words))


@given(st.text(max_size=16))
def test_every_text_comes_back(text: str) -> None:
    ids = encode(TOKENIZER, text, 96)
    assert ids.shape == (96,)
    assert ids.dtype == np.int64
    assert ids.min() >= 0 and ids.max() < TOKENIZER.get_vocab_size() <= 512
    real = int((ids != 0).sum())
    assert (ids[:real] != 0).all()  # padding comes last
    assert text_of(ids) in (text, f" {text}")


def test_padding_cannot_be_spelt() -> None:
    for tokenizer in (TOKENIZER, Tokenizer.from_str(TOKENIZER.to_str())):
        assert (encode(tokenizer, f"{PADDING} x", 64) != 0).sum() > 3
        assert tokenizer.token_to_id(PADDING) == 0


def test_known_words_are_short_and_the_order_of_instructions_does_not_matter() -> None:
    assert (encode(TOKENIZER, "open the drawer", 64) != 0).sum() <= 3
    assert build_tokenizer([*reversed(INSTRUCTIONS), INSTRUCTIONS[0]], 512, 64).to_str() == TOKENIZER.to_str()


@pytest.mark.parametrize("tasks", [MT10, MT40, MT50], ids=["mt10", "mt40", "mt50"])
@pytest.mark.parametrize("vocabulary", [512, 1024])
def test_wordings_that_it_was_not_built_from_fit_as_well(tasks: tuple[str, ...], vocabulary: int) -> None:
    tokenizer = build_tokenizer([text for task in tasks for text in TRAINING[task]], vocabulary, 24)
    rows = [encode(tokenizer, text, 24).tolist() for task in tasks for text in (*TRAINING[task], *HELD_OUT[task])]
    assert len({tuple(row) for row in rows}) == 9 * len(tasks)


def test_held_out_wordings_fit_a_policy_of_one_task() -> None:
    for task in MT50:
        tokenizer = build_tokenizer(TRAINING[task], 512, 32)
        assert all(len(encode(tokenizer, text, 32)) == 32 for text in HELD_OUT[task])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InstructionError, match="the policy takes 4"):
        build_tokenizer(["a rather long instruction of many words", *INSTRUCTIONS], 257, 4)
    with pytest.raises(TokenizerError, match="at least 257"):
        build_tokenizer(INSTRUCTIONS, 256, 64)
    assert build_tokenizer([], 257, 4).get_vocab_size() == 257
