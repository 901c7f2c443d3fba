"""Prompts of different lengths in one row: nothing is computed of padding, and each is what it is alone, under every policy."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import kvpress
from kvpress import PolicyError, UnsupportedModelError
from kvpress.compat import CACHE
from kvpress.policies import H2O, GemFilter, SnapKV
from kvpress.tokens import Ragged
from support.matrix import CASES, VOCAB, Case, check, expect, kept, prompt, rows_to_ask, sharp_llama
from support.models import tiny_opt
from support.refusals import refused
from support.tiny_families import tiny_family

NEW = 4
# No token comes twice: keys of equal tokens tie, and rounding, which no batch has like another, would choose.
TOKENS = (3 + torch.randperm(VOCAB - 3, generator=torch.Generator().manual_seed(1))).tolist()
TEXTS = [TOKENS[:24], TOKENS[24:27], TOKENS[27:42], TOKENS[42:43]]

every_policy = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@pytest.fixture(scope="module")
def model() -> Any:
    return sharp_llama()


def generate(model: Any, **inputs: Any) -> Any:
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}
    return model.generate(**{**options, **inputs}, return_dict_in_generate=True, output_logits=True)


def passes_of(text: list[int], output: Any, row: int) -> list[list[int]]:
    return [text, *([token] for token in output.sequences[row, -len(output.logits) : -1].tolist())]


class Rows:
    """Notes the shapes of what the first MLP of a model is given, while it is open."""

    def __init__(self, model: Any) -> None:
        self.mlp, self.shapes = model.model.layers[0].mlp, []

    def __enter__(self) -> list[tuple[int, ...]]:
        self.hook = self.mlp.register_forward_pre_hook(lambda _, args: self.shapes.append(tuple(args[0].shape[:2])))
        return self.shapes

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


# ------------------------------------------------------------------ the row


def test_a_row_and_back() -> None:
    """Tokens in the dimension asked for; padding is zero, wherever it is."""
    columns = [torch.tensor([2, 3]), torch.tensor([], dtype=torch.int64), torch.tensor([0, 1, 3])]
    ragged = Ragged(columns, 4)
    x = torch.arange(1.0, 13).view(3, 4)
    assert ragged.total == 5
    assert ragged.joined(x).tolist() == [[3, 4, 9, 10, 12]]
    assert ragged.apart(ragged.joined(x)).tolist() == [[0, 0, 3, 4], [0] * 4, [9, 10, 0, 12]]
    heads = x[:, None, :, None].expand(3, 2, 4, 5)
    row = torch.stack((ragged.joined(x), ragged.joined(x)), 1)[..., None].expand(1, 2, 5, 5)
    assert torch.equal(ragged.apart(row, dim=2), heads * (ragged.apart(ragged.joined(x)) > 0)[:, None, :, None])
    axes = torch.stack((x, -x))  # positions with several axes
    assert ragged.joined(axes, 1).tolist() == [[[3, 4, 9, 10, 12]], [[-3, -4, -9, -10, -12]]]
    assert ragged.joined(x[:1]).tolist() == [[3, 4, 1, 2, 4]]  # of one row for all


# ------------------------------------------------------------------ every policy


@pytest.mark.every_case
@every_policy
def test_each_prompt_is_what_it_is_alone(model: Any, case: Case) -> None:
    """Logits and what is kept, for prompts of very different lengths, of a single token too."""
    with kvpress.patch(model, case.policy), Rows(model) as rows:
        output = generate(model, **kvpress.prepack(model, TEXTS))
    run = [sum(max(1, case.run_of(len(text))) for text in TEXTS)]
    looked = isinstance(case.policy, GemFilter) and case.policy.r > 0
    whole = [sum(map(len, TEXTS))] * looked
    assert rows[: len(whole + run)] == [(1, count) for count in whole + run]  # nothing of padding
    assert rows[len(whole + run)] == (4, 1)  # and steps as ever
    for row, text in enumerate(TEXTS):
        steps = expect(model, case, passes_of(text, output, row))
        check(steps, [logits[row] for logits in output.logits], output[CACHE], row)


@every_policy
@torch.no_grad()
def test_a_second_turn(model: Any, case: Case) -> None:
    """By hand, without position ids; the second turn is ragged, too, and one sequence has nothing in it."""
    first, second = [TOKENS[:6], TOKENS[6:17], TOKENS[17:19]], [TOKENS[20:28], TOKENS[28:31], []]
    more = torch.tensor([[0] * (8 - len(text)) + text for text in second])
    more_mask = torch.tensor([[0] * (8 - len(text)) + [1] * len(text) for text in second])
    with kvpress.patch(model, case.policy), Rows(model) as rows:
        inputs = kvpress.prepack(model, first)
        mask, cache = inputs["attention_mask"], inputs[CACHE]
        logits = [model(**inputs, **rows_to_ask(model, 11)).logits[:, -1]]
        mask = torch.cat((mask, torch.ones(3, 1)), 1)
        logits.append(model(torch.tensor([[5], [6], [7]]), attention_mask=mask, **{CACHE: cache}).logits[:, -1])
        mask = torch.cat((mask, more_mask), 1)
        options = rows_to_ask(model, 8)
        logits.append(model(more, attention_mask=mask, **{CACHE: cache}, **options).logits[:, -1])
        count = cache.get_seq_length()
    assert count == 11 + 1 + 8
    if not isinstance(case.policy, GemFilter):
        # Steps taken back and fed again (cache correction) make the second turn longer.
        assert rows[0] == (1, 19) and rows[-1][0] == 1 and rows[-1][1] < 3 * 8
    for row in range(2):
        steps = expect(model, case, [first[row], [5 + row], second[row]])
        check(steps, [one[row] for one in logits], cache, row)


# ------------------------------------------------------------------ ways to generate


@pytest.mark.parametrize("policy", ["full", SnapKV(budget=0.5, window=4), H2O(budget=0.4)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 7},
        {"output_hidden_states": True},
    ],
    ids=str,
)
def test_as_a_padded_batch(model: Any, policy: Any, options: dict[str, Any]) -> None:
    def run(inputs: dict[str, Any]) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return generate(model, **inputs, **options)

    with kvpress.patch(model, policy):
        inputs = kvpress.prepack(model, TEXTS)
        padded = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        expected, got = run(padded), run(inputs)
    assert torch.equal(expected.sequences, got.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
    if "output_hidden_states" in options:
        real = inputs["attention_mask"][..., None]
        for ours, theirs in zip(got.hidden_states[0], expected.hidden_states[0], strict=True):
            assert ours.shape == theirs.shape and not (ours * (1 - real)).any()
            torch.testing.assert_close(ours, theirs * real, atol=1e-4, rtol=1e-4)


def test_it_is_the_unpatched_model_alone(model: Any) -> None:
    """Within 1e-5 of the model on each prompt; and no prompt sees another: changing one changes nothing of the others."""
    with kvpress.patch(model, "full"):
        output = generate(model, **kvpress.prepack(model, TEXTS))
        others = generate(model, **kvpress.prepack(model, [prompt(24, 9), *TEXTS[1:]]))
        held = kept(output[CACHE], 2)
    for row, text in enumerate(TEXTS):
        alone = generate(model, input_ids=torch.tensor([text]))
        torch.testing.assert_close(
            torch.stack(output.logits)[:, row], torch.stack(alone.logits)[:, 0], atol=1e-5, rtol=1e-5
        )
    assert torch.equal(torch.stack(output.logits)[:, 1:], torch.stack(others.logits)[:, 1:])
    assert held[0][0] == list(range(len(TEXTS[2]) + NEW - 1))


def test_positions_by_the_mask_and_learned_ones() -> None:
    """OPT numbers tokens by its mask, and adds learned vectors."""
    model = tiny_opt()
    with kvpress.patch(model, "full"):
        output = generate(model, **kvpress.prepack(model, TEXTS))
        bare = model(**kvpress.prepack(model, TEXTS)).logits[:, -1]
    torch.testing.assert_close(bare, output.logits[0], atol=1e-5, rtol=1e-5)
    for row, text in enumerate(TEXTS):
        alone = generate(model, input_ids=torch.tensor([text]))
        torch.testing.assert_close(
            torch.stack(output.logits)[:, row], torch.stack(alone.logits)[:, 0], atol=1e-5, rtol=1e-5
        )


def test_positions_with_several_axes() -> None:
    """A model for images, given text: its position ids have an axis for time, height and width."""
    model = tiny_family("qwen2_vl")
    texts = [[(token % 80) + 3 for token in text] for text in TEXTS]
    with kvpress.patch(model, "full"):
        output = generate(model, **kvpress.prepack(model, texts))
        for row, text in enumerate(texts):
            ids = torch.tensor([text])
            alone = generate(model, input_ids=ids, attention_mask=torch.ones_like(ids))
            theirs = torch.stack(alone.logits)[:, 0]
            torch.testing.assert_close(torch.stack(output.logits)[:, row], theirs, atol=1e-4, rtol=1e-4)


def test_embeddings(model: Any) -> None:
    with kvpress.patch(model, "full"), torch.no_grad():
        inputs = kvpress.prepack(model, TEXTS)
        by_ids = model(**kvpress.prepack(model, TEXTS)).logits[:, -1]
        vectors = model.get_input_embeddings()(inputs.pop("input_ids"))
        torch.testing.assert_close(model(**inputs, inputs_embeds=vectors).logits[:, -1], by_ids, atol=1e-5, rtol=1e-5)


def test_prompts_of_one_length_have_nothing_to_pack(model: Any) -> None:
    texts = [prompt(9, seed) for seed in range(3)]
    with kvpress.patch(model, SnapKV(budget=0.5, window=2)), Rows(model) as rows:
        packed = generate(model, **kvpress.prepack(model, torch.tensor(texts)))
        plain = generate(model, input_ids=torch.tensor(texts))
    assert rows[0] == (3, 9)
    assert torch.equal(torch.stack(packed.logits), torch.stack(plain.logits))


def test_a_copy_and_a_reset(model: Any) -> None:
    """A copied cache packs as the one it was copied from; after a reset it is as any new cache."""
    with kvpress.patch(model, "full"), torch.no_grad():
        inputs = kvpress.prepack(model, TEXTS)
        copied = {**inputs, CACHE: copy.deepcopy(inputs[CACHE])}
        with Rows(model) as rows:
            one, other = model(**inputs).logits[:, -1], model(**copied).logits[:, -1]
            assert torch.equal(one, other)
            inputs[CACHE].reset()
            places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            again = model(**inputs, position_ids=places).logits[:, -1]
    assert rows == [(1, 43), (1, 43), (4, 24)]
    torch.testing.assert_close(again, one, atol=1e-4, rtol=1e-4)


def test_scores_run_no_padding(model: Any) -> None:
    contexts, texts = TEXTS[:3], [[5, 6, 7], [8], [9, 10]]
    with kvpress.patch(model, SnapKV(budget=0.5, window=2)):
        alone = [kvpress.score(model, *pair) for pair in zip(contexts, texts, strict=True)]
        with Rows(model) as rows:
            scores = kvpress.score(model, contexts, texts)
    assert rows[0] == (1, 24 + 3 + 15)
    for got, expected in zip(scores, alone, strict=True):
        assert got.log_probs == pytest.approx(expected.log_probs, abs=1e-4)


# ------------------------------------------------------------------ what cannot work


def test_bad_prompts(model: Any) -> None:
    with refused("LlamaForCausalLM is not patched", "kvpress.patch(model, policy)", "'full'"):
        kvpress.prepack(model, TEXTS)
    with kvpress.patch(model, "full"):
        for prompts, words in (
            ([], ("prompts=[]", "list of token ids for each")),
            (5, ("prompts=5", "list of token ids for each")),
            (TEXTS[0], ("list of token ids for each",)),
            (["a text"], ("texts", "tokenizer(texts)['input_ids']")),
            ("a text", ("'a text'", "list of token ids for each")),
            ([[1], []], ("a prompt is empty", "start token")),
            ([[1], [97]], ("token 97", "from 0 to 96")),
            ([[1], [-1]], ("token -1", "from 0 to 96")),
            ([[1], [1.5]], ("token 1.5",)),
            ([[1], 3], ("a prompt is 3",)),
            ([[1], [[3]]], ("token [3]",)),
        ):
            with refused(*words):
                kvpress.prepack(model, prompts)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gemma3_text", "without full attention"),
        ("qwen3_next", "without full attention"),
        ("kosmos-2.5", "makes logits"),
    ],
)
def test_models_that_cannot(name: str, words: str) -> None:
    model = tiny_family(name)
    with kvpress.patch(model, "full"), refused(words, "padded batch", error=UnsupportedModelError):
        kvpress.prepack(model, [[3, 4], [5]])


def test_scores_of_a_model_that_cannot() -> None:
    model = tiny_family("gemma3_text")
    with kvpress.patch(model, "full"):
        scores = kvpress.score(model, [[3, 4, 5], [6]], [[7], [8]])
        assert scores[1].log_probs == pytest.approx(kvpress.score(model, [6], [8]).log_probs, abs=1e-4)


def test_more_inputs_for_each_token(model: Any) -> None:
    with kvpress.patch(model, "full"):
        inputs = kvpress.prepack(model, TEXTS)
        kinds: Tensor = torch.zeros_like(inputs["input_ids"])
        with refused("brings token_type_ids for each token", "leave token_type_ids out", "kvpress.prepack"):
            model(**inputs, token_type_ids=kinds)
        assert inputs[CACHE].get_seq_length() == 0


def test_a_cache_of_another_policy(model: Any) -> None:
    with kvpress.patch(model, "full"):
        inputs = kvpress.prepack(model, TEXTS)
    with (
        kvpress.patch(model, SnapKV(budget=9, window=2)),
        pytest.raises(PolicyError, match="belongs to the policy full"),
    ):
        model(**inputs)
