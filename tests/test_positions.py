"""Positions other than their own: what re-indexing policies attend, and what of it is refused.

The reference is the unpatched model on the kept tokens alone. In a model of one layer keys and values depend on their token
alone, so that is what re-indexing should give, however many tokens were dropped in between.
"""

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from transformers import DynamicCache

import kvpress
from kvpress.compat import CACHE
from kvpress.errors import PolicyError, UnsupportedModelError
from kvpress.policies import H2O, StreamingLLM, TokenSelect
from support.models import SPECIAL, VOCAB, build, tiny_llama, tiny_opt, token_ids

SINK, RECENT = 2, 8
REINDEXING = [
    StreamingLLM(sink=SINK, recent=RECENT),
    H2O(budget=SINK + RECENT, rope="reindex"),
    TokenSelect(n_init=SINK, n_local=RECENT, k=0, chunk=4),
]
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=512,
    **SPECIAL,
)
HEADS = dict(COMMON, head_dim=16)
ONE_HEAD = dict(COMMON, num_attention_heads=1)
FULL = dict(layer_types=["full_attention"])
VISION = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=32, patch_size=2)
IMAGE, VIDEO, START, END = 90, 91, 92, 93


def smollm3(no_rope_layers: list[int]) -> hf.PreTrainedModel:
    layers = {"num_hidden_layers": len(no_rope_layers), "no_rope_layers": no_rope_layers}
    return build(hf.SmolLM3ForCausalLM, hf.SmolLM3Config(**COMMON | layers))


def hunyuan() -> hf.PreTrainedModel:
    return build(hf.HunYuanDenseV1ForCausalLM, hf.HunYuanDenseV1Config(**HEADS))


def ministral3(scaled_from: int = 16) -> hf.PreTrainedModel:
    rope = dict(
        rope_type="yarn",
        rope_theta=1e4,
        factor=4.0,
        original_max_position_embeddings=scaled_from,
        llama_4_scaling_beta=0.5,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    )
    return build(hf.Ministral3ForCausalLM, hf.Ministral3Config(**HEADS, rope_parameters=rope, sliding_window=None))


def qwen25_vl() -> hf.PreTrainedModel:
    text = COMMON | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]))
    vision = VISION | dict(spatial_merge_size=2, window_size=8, fullatt_block_indexes=[0])
    config = hf.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return build(hf.Qwen2_5_VLForConditionalGeneration, config)


RIGHT: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: build(hf.LlamaForCausalLM, hf.LlamaConfig(**HEADS)),
    "smollm3 with rotation": lambda: smollm3([1]),
    "smollm3 without": lambda: smollm3([0]),
    "qwen3 (norm before)": lambda: build(hf.Qwen3ForCausalLM, hf.Qwen3Config(**HEADS)),
    "cohere2 without": lambda: build(hf.Cohere2ForCausalLM, hf.Cohere2Config(**COMMON, **FULL)),
    "exaone4 without": lambda: build(hf.Exaone4ForCausalLM, hf.Exaone4Config(**HEADS, **FULL, sliding_window=8)),
    "phi": lambda: build(hf.PhiForCausalLM, hf.PhiConfig(**COMMON, partial_rotary_factor=0.5)),
    "stablelm": lambda: build(hf.StableLmForCausalLM, hf.StableLmConfig(**COMMON, partial_rotary_factor=0.25)),
    "gpt-neox": lambda: build(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**ONE_HEAD, rotary_pct=0.25)),
    "glm (interleaved)": lambda: build(hf.GlmForCausalLM, hf.GlmConfig(**HEADS)),
    "persimmon": lambda: build(hf.PersimmonForCausalLM, hf.PersimmonConfig(**ONE_HEAD)),
    "gemma3": lambda: build(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**HEADS, **FULL, query_pre_attn_scalar=16)),
    "gemma4": lambda: build(
        hf.Gemma4ForCausalLM,
        hf.Gemma4TextConfig(
            **HEADS, **FULL, global_head_dim=32, vocab_size_per_layer_input=VOCAB, num_kv_shared_layers=0
        ),
    ),
    "qwen2.5-vl (text)": qwen25_vl,
}
REFUSED: dict[str, tuple[Callable[[], hf.PreTrainedModel], str]] = {
    "hunyuan (norm after)": (hunyuan, "HunYuan.*norm"),
    "ministral3 (scaled queries)": (ministral3, "Ministral3.*scale by the position"),
    "ministral3 (far ones alone)": (lambda: ministral3(16_384), "Ministral3.*scales its queries"),
    "opt (learned)": (tiny_opt, "OPT.*another kind"),
}


def case_id(value: object) -> str | None:
    return value.name if isinstance(value, kvpress.Policy) else None


@torch.no_grad()
def stream(
    model: hf.PreTrainedModel, policy: kvpress.Policy, ids: torch.Tensor, chunk: int = 1
) -> tuple[torch.Tensor, list[int]]:
    """The last token's logits, [vocab], and the positions that it attended, when the model saw `ids` in chunks before it."""
    cache = DynamicCache(config=model.config.get_text_config())
    with kvpress.patch(model, policy):
        for start in range(0, ids.shape[1] - 1, chunk):
            model(ids[:, start : min(start + chunk, ids.shape[1] - 1)], **{CACHE: cache})
        held = sorted(place for place in cache.layers[0].positions[0, 0].tolist() if place >= 0)
        logits = model(ids[:, -1:], **{CACHE: cache}).logits[0, -1]
    if policy.name == "token_select":  # keeps everything, and reads the first and the last
        held = held[:SINK] + held[1 - RECENT :]
    return logits, [*held, ids.shape[1] - 1]


@torch.no_grad()
def error(model: hf.PreTrainedModel, policy: kvpress.Policy, ids: torch.Tensor, chunk: int = 1) -> float:
    """The largest difference to the dense result on the kept tokens, over the largest logit."""
    logits, held = stream(model, policy, ids, chunk)
    assert len(held) < ids.shape[1]
    dense = model(ids[:, held]).logits[0, -1]
    return float((logits - dense).abs().max() / dense.abs().max())


@pytest.mark.parametrize("policy", REINDEXING, ids=case_id)
@pytest.mark.parametrize("family", RIGHT)
def test_reindexed_is_the_dense_result_on_what_is_kept(family: str, policy: kvpress.Policy) -> None:
    """Layers without rotation, partial and interleaved rotation, and M-RoPE over text."""
    assert error(RIGHT[family](), policy, token_ids(1, 40)) < 1e-5


@pytest.mark.parametrize("policy", REINDEXING, ids=case_id)
@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_moved_is_refused_with_the_remedy(family: str, policy: kvpress.Policy) -> None:
    """A norm after the rotation, queries scaled by their position, learned positions: nothing of the model is changed."""
    make, message = REFUSED[family]
    model = make().train()
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=f"{message}.*use rope='original'.*or another policy"):
        kvpress.patch(model, policy)
    assert model.config._attn_implementation == before and all(module.training for module in model.modules())


@pytest.mark.parametrize("make", [hunyuan, ministral3])
def test_the_remedy_works(make: Callable[[], hf.PreTrainedModel]) -> None:
    """With room for all, rope="original" is the dense result."""
    model, ids = make(), token_ids(1, 40)
    policy = StreamingLLM(recent=100, rope="original")
    with torch.no_grad():
        dense = model(ids).logits[0, -1]
        with kvpress.patch(model, policy):
            cache = model(ids[:, :-1], use_cache=True)[CACHE]
            logits = model(ids[:, -1:], **{CACHE: cache}).logits[0, -1]
    torch.testing.assert_close(logits, dense, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", REINDEXING, ids=case_id)
def test_some_layers_without_rotation(policy: kvpress.Policy) -> None:
    """With room for all, two layers of either kind give the dense result; keys of one are stored as they come."""
    model, ids = smollm3([0, 1]), token_ids(1, 30)
    roomy = {"streaming_llm": {"recent": 100}, "h2o": {"budget": 100, "rope": "reindex"}}.get(policy.name, {})
    with torch.no_grad():
        dense = model(ids).logits[0, -1]
        with kvpress.patch(model, type(policy)(**roomy)):
            cache = model(ids[:, :-1], use_cache=True)[CACHE]
            logits = model(ids[:, -1:], **{CACHE: cache}).logits[0, -1]
    torch.testing.assert_close(logits, dense, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", REINDEXING[:2], ids=case_id)
@pytest.mark.parametrize("tokens", [2_000, 30_000, 90_000])
def test_error_does_not_grow_with_what_was_seen(tokens: int, policy: kvpress.Policy) -> None:
    """A model rounds the angles of far positions to float32; what is dropped must not leave that rounding behind."""
    model = tiny_llama(layers=1, heads=2, kv_heads=1, head_dim=32)
    assert error(model, policy, token_ids(1, tokens, 3), chunk=1024) < 1e-5


def test_far_rows_of_a_prompt() -> None:
    """A later turn's rows attend the sinks and the window as exactly as a decode step's, in a padded batch too."""
    model = tiny_llama(layers=1, heads=2, kv_heads=1, head_dim=32)
    ids, more = token_ids(2, 60_000, 3), token_ids(2, 5, 4)
    mask = torch.ones(2, 60_005, dtype=torch.long)
    mask[1, :7] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        with kvpress.patch(model, StreamingLLM(sink=SINK, recent=RECENT)):
            for start in range(0, 60_000, 2_000):
                part = slice(start, start + 2_000)
                model(
                    ids[:, part],
                    **{CACHE: cache},
                    attention_mask=mask[:, : start + 2_000],
                    position_ids=places[:, part],
                    logits_to_keep=1,
                )
            logits = model(more, **{CACHE: cache}, attention_mask=mask, position_ids=places[:, 60_000:]).logits
        for row, first in enumerate([0, 7]):
            kept = torch.cat((ids[row, first : first + SINK], ids[row, -RECENT:], more[row]))[None]
            dense = model(kept).logits[0, -5:]
            assert (logits[row] - dense).abs().max() < 5e-5 * dense.abs().max()


def image_inputs(model: hf.PreTrainedModel) -> dict[str, torch.Tensor]:
    """A text with one image of 4 x 4 patches, which are 4 tokens."""
    text = token_ids(1, 12) % 80 + 2
    image = torch.tensor([[START, IMAGE, IMAGE, IMAGE, IMAGE, END]])
    ids = torch.cat((text[:, :4], image, text[:, 4:]), dim=1)
    width = 3 * model.config.vision_config.temporal_patch_size * model.config.vision_config.patch_size**2
    pixels = torch.randn(16, width, generator=torch.Generator().manual_seed(1))
    extra = {"mm_token_type_ids": (ids == IMAGE).long()}
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]]), **extra}


@pytest.mark.parametrize("policy", REINDEXING, ids=case_id)
def test_an_image_with_positions_of_several_axes(policy: kvpress.Policy) -> None:
    """Refused when it comes, before anything is stored; text goes on."""
    model = qwen25_vl()
    inputs = image_inputs(model)
    dense = model.generate(**inputs, max_new_tokens=4, do_sample=False)  # runs unpatched
    assert dense.shape[1] == 22
    cache = DynamicCache(config=model.config.text_config)
    with kvpress.patch(model, policy):
        with pytest.raises(PolicyError, match=r"image.*consecutive.*use "):
            model.generate(**inputs, max_new_tokens=4, **{CACHE: cache})
        assert cache.get_seq_length() == 0
        assert model.generate(input_ids=token_ids(1, 12), max_new_tokens=4).shape[1] == 16


def test_an_image_at_original_positions() -> None:
    """The remedy: with room for all, the dense result."""
    model = qwen25_vl()
    inputs = image_inputs(model)
    options = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    dense = model.generate(**inputs, **options)
    with kvpress.patch(model, StreamingLLM(recent=100, rope="original")):
        ours = model.generate(**inputs, **options)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(dense.logits), atol=1e-4, rtol=1e-4)


GAPS = {
    "inside a prompt": [[0, 1, 2, 3, 7, 8, 9, 10]],
    "packed": [[0, 1, 2, 3, 0, 1, 2, 3]],
    "backwards": [[7, 6, 5, 4, 3, 2, 1, 0]],
    "in one sequence": [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 9]],
}


@pytest.mark.parametrize("policy", REINDEXING, ids=case_id)
@pytest.mark.parametrize("places", GAPS.values(), ids=GAPS)
def test_gaps_in_a_prompt(places: list[list[int]], policy: kvpress.Policy) -> None:
    """Refused before anything is stored."""
    model, cache = tiny_llama(), None
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), kvpress.patch(model, policy):
        with pytest.raises(PolicyError, match=f"sequence {len(places) - 1} .*{policy.name}"):
            model(token_ids(len(places), 8), **{CACHE: cache}, position_ids=torch.tensor(places))
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("policy", REINDEXING, ids=case_id)
@pytest.mark.parametrize("count", [1, 3], ids=["step", "turn"])
@pytest.mark.parametrize("first", [None, 5], ids=["plain", "ahead"])
def test_a_gap_between_passes(first: int | None, count: int, policy: kvpress.Policy) -> None:
    """Given ahead of the first pass or not, position ids go on where they were, or are refused; the cache stays as it was."""
    model, ids = tiny_llama(), token_ids(1, 20)
    start = first or 0
    given = None if first is None else torch.arange(5, 15)[None]
    after = torch.arange(start + 10, start + 10 + count)[None]
    with torch.no_grad(), kvpress.patch(model, policy):
        cache = DynamicCache(config=model.config)
        model(ids[:, :10], **{CACHE: cache}, position_ids=given)
        for wrong in [after + 1, after - 1] + ([None] if first else []):
            with pytest.raises(PolicyError, match="one by one"):
                model(ids[:, 10 : 10 + count], **{CACHE: cache}, position_ids=wrong)
        assert cache.get_seq_length() == 10
        got = model(ids[:, 10 : 10 + count], **{CACHE: cache}, position_ids=after).logits
    with torch.no_grad(), kvpress.patch(model, policy):
        cache = DynamicCache(config=model.config)
        model(ids[:, :10], **{CACHE: cache})
        plain = model(ids[:, 10 : 10 + count], **{CACHE: cache}).logits
    torch.testing.assert_close(got, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", REINDEXING, ids=case_id)
def test_left_padding_without_position_ids(policy: kvpress.Policy) -> None:
    """The model counts columns then, which is a constant ahead of a sequence's tokens, and gives the same result."""
    model, ids = tiny_llama(), token_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = []
    for given in (None, places):
        with torch.no_grad(), kvpress.patch(model, policy):
            cache = DynamicCache(config=model.config)
            for start, stop in ((0, 12), (12, 17), (17, 18), (18, 19)):
                at = None if given is None else given[:, start:stop]
                out = model(ids[:, start:stop], **{CACHE: cache}, attention_mask=mask[:, :stop], position_ids=at)
        logits.append(out.logits[:, -1])
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_right_padding_needs_position_ids() -> None:
    """Columns of padding between tokens are a gap when the model counts columns."""
    model, ids = tiny_llama(), token_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, 6:8] = 0
    with torch.no_grad(), kvpress.patch(model, StreamingLLM(sink=SINK, recent=RECENT)):
        cache = model(ids[:, :8], use_cache=True, attention_mask=mask[:, :8])[CACHE]
        with pytest.raises(PolicyError, match="sequence 0"):
            model(ids[:, 8:], **{CACHE: cache}, attention_mask=mask)


@pytest.mark.parametrize("policy", REINDEXING, ids=case_id)
def test_patching_looks_and_leaves_no_trace(policy: kvpress.Policy) -> None:
    """A model in training mode with dropout: modes, random state, results and gradients are as they were."""
    config = hf.GPTNeoXConfig(**COMMON, rotary_pct=0.5, hidden_dropout=0.3, attention_dropout=0.3)
    model = build(hf.GPTNeoXForCausalLM, config).train()
    model.gpt_neox.final_layer_norm.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    kvpress.patch(model, policy).unpatch()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
