"""Needle prompts: exact lengths, depths, seeds, scoring."""

import pytest

from kvpress.demo.needle import Haystack, PromptError, is_found
from support.tiny_saved import byte_tokenizer


@pytest.fixture(scope="module")
def haystack():
    return Haystack(byte_tokenizer())


@pytest.mark.parametrize("depth", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("length", [337, 700, 5001])
def test_length_is_exact_and_the_needle_is_there_once(haystack, length, depth):
    needle = haystack.needle(length, depth, seed=3)
    text = haystack.tokenizer.decode(needle.input_ids)
    sentence = f" One of the special magic numbers for {needle.city} is: {needle.number}."
    assert len(needle.input_ids) == needle.length == length
    assert needle.input_ids[0] == haystack.tokenizer.bos_token_id
    assert text.count(sentence) == text.count(needle.number) == 1
    assert text.endswith(f"One of the special magic numbers for {needle.city} is:")
    start = needle.start
    assert haystack.tokenizer.decode(needle.input_ids[start : start + len(sentence)]) == sentence


def test_needle_stands_at_its_depth(haystack):
    starts = [haystack.needle(20_000, depth, seed=0).start / 20_000 for depth in (0, 0.25, 0.5, 0.75, 1)]
    assert starts == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.03)


def test_text_longer_than_the_books_goes_round(haystack):
    assert len(haystack.needle(400_000, 0.5, seed=0).input_ids) == 400_000


def test_same_seed_same_prompt(haystack):
    assert haystack.needle(900, 0.5, seed=1) == haystack.needle(900, 0.5, seed=1)
    others = [haystack.needle(900, 0.5, seed=2), haystack.needle(900, 0.6, seed=1), haystack.needle(901, 0.5, seed=1)]
    assert haystack.needle(900, 0.5, seed=1).number not in {other.number for other in others}


@pytest.mark.parametrize(
    ("length", "depth", "said"), [(50, 0.5, "at least"), (900, 1.5, "outside"), (900, -0.1, "outside")]
)
def test_impossible_prompts(haystack, length, depth, said):
    with pytest.raises(PromptError, match=said):
        haystack.needle(length, depth, seed=0)


def test_shortest_prompt_that_the_error_names_works(haystack):
    with pytest.raises(PromptError) as error:
        haystack.needle(10, 0.5, seed=0)
    shortest = int(str(error.value).split()[-1])
    assert len(haystack.needle(shortest, 0.5, seed=0).input_ids) >= shortest


def test_scoring(haystack):
    needle = haystack.needle(900, 0.5, seed=1)
    assert is_found(needle, f" {needle.number}.\nThe")
    assert is_found(needle, needle.number)
    assert not is_found(needle, f"{needle.number}0")
    assert not is_found(needle, f"1{needle.number}")
    assert not is_found(needle, needle.number[:-1])
    assert not is_found(needle, "")
