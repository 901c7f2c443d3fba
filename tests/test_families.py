"""Model families: what a patched model computes with room for everything is transformers' own dense result."""

import pytest
import torch
import transformers as hf

import kvpress
from kvpress.compat import CACHE
from kvpress.policies import H2O, Full, SnapKV, StreamingLLM

COMMON: dict = dict(
    hidden_size=64,
    num_attention_heads=4,
    num_hidden_layers=3,
    intermediate_size=64,
    vocab_size=97,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
GROUPED = dict(COMMON, num_key_value_heads=2)
HEADS = dict(GROUPED, head_dim=16)
HYBRID = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention", "full_attention"])
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)

FAMILIES = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**HEADS)),
    "llama-yarn": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            **HEADS,
            rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=128),
        )
    ),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**HEADS, sliding_window=None)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**HEADS)),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**HEADS, **EXPERTS)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED, sliding_window=None)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**HEADS, **HYBRID, query_pre_attn_scalar=16)),
    "gemma2-softcap": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**HEADS, **HYBRID, query_pre_attn_scalar=16, attn_implementation="eager")
    ),
    "gpt-oss-sinks": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**HEADS, **HYBRID, num_local_experts=4, num_experts_per_tok=2)
    ),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**COMMON, rotary_pct=0.25)),
    "glm-interleaved": lambda: hf.GlmForCausalLM(hf.GlmConfig(**HEADS)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            hidden_size=64,
            word_embed_proj_dim=64,
            ffn_dim=64,
            num_attention_heads=4,
            num_hidden_layers=3,
            vocab_size=97,
            max_position_embeddings=512,
            pad_token_id=0,
            eos_token_id=None,
        )
    ),
}
ROOMY = [Full(), StreamingLLM(recent=500), H2O(budget=500), SnapKV(budget=500)]
TIGHT = [StreamingLLM(sink=2, recent=8), H2O(budget=10), SnapKV(budget=10, window=4)]


def build(family: str) -> hf.PreTrainedModel:
    """A small random model whose attention is not uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[family]().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (parameter.dim() > 1 and "proj" in name) or "query_key_value" in name or "sinks" in name:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: hf.PreTrainedModel, inputs: dict[str, torch.Tensor]) -> hf.generation.GenerateDecoderOnlyOutput:
    return model.generate(
        **inputs,
        max_new_tokens=10,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )


def for_family(family: str, policy: kvpress.Policy) -> kvpress.Policy:
    """Learned positions cannot be re-indexed."""
    return (
        StreamingLLM(sink=2, recent=policy.recent, rope="original")
        if family == "opt" and policy.name == "streaming_llm"
        else policy
    )  # type: ignore[attr-defined]


@pytest.mark.parametrize("policy", ROOMY, ids=lambda policy: policy.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_result(family: str, policy: kvpress.Policy) -> None:
    """A left-padded batch, prompt and decode, against the unpatched model; and not a trace afterwards."""
    model = build(family)
    dense = generate(model, batch())
    with kvpress.patch(model, for_family(family, policy)):
        ours = generate(model, batch())
    assert torch.equal(ours.sequences, dense.sequences)
    for got, expected in zip(ours.logits, dense.logits, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    again = generate(model, batch())
    assert all(torch.equal(a, b) for a, b in zip(again.logits, dense.logits, strict=True))


@pytest.mark.parametrize("policy", TIGHT, ids=lambda policy: policy.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_entries_give_the_masked_dense_result(family: str, policy: kvpress.Policy) -> None:
    """What a decode step computes over the kept entries is the eager model with everything else masked out.

    Not for re-indexed positions, which have no mask that would show them: those keep their original ones here.
    """
    model = build(family)
    if policy.name == "streaming_llm":
        policy = StreamingLLM(sink=2, recent=8, rope="original")
    ids = torch.randint(3, 97, (1, 25), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), kvpress.patch(model, policy) as handle:
        first = model(ids[:, :24], use_cache=True)
        cache = first[CACHE]
        acted = [index for index, layer in enumerate(cache.layers) if hasattr(layer, "positions")]
        held = {index: cache.layers[index].positions.clone() for index in acted}
        ours = model(ids[:, 24:], **{CACHE: cache}).logits[0, -1]
        assert handle.report().to_dict()["seen"] == 25
    expected = masked_dense(model, ids, held)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def masked_dense(model: hf.PreTrainedModel, ids: torch.Tensor, held: dict[int, torch.Tensor]) -> torch.Tensor:
    """The last token's logits of an eager forward in which, per layer and kv head, it sees only the held positions."""
    model.set_attn_implementation("eager")
    last = ids.shape[1] - 1
    hooks = []

    def restrict(positions: torch.Tensor):  # type: ignore[no-untyped-def]
        def hook(module, args, kwargs):  # type: ignore[no-untyped-def]
            mask = kwargs["attention_mask"]
            if mask is None:
                mask = torch.zeros(1, 1, last + 1, last + 1).masked_fill(
                    torch.ones(last + 1, last + 1).triu(1).bool(), torch.finfo(torch.float32).min
                )
            heads = model.config.num_attention_heads
            mask = mask.expand(1, heads, last + 1, last + 1).clone()
            for head in range(heads):
                kv_head = head // (heads // positions.shape[1])
                seen = {position for position in positions[0, kv_head].tolist() if position >= 0} | {last}
                for position in set(range(last + 1)) - seen:
                    mask[0, head, last, position] = torch.finfo(torch.float32).min
            return args, {**kwargs, "attention_mask": mask}

        return hook

    for module in model.modules():
        if type(module).__name__.endswith("Attention") and getattr(module, "layer_idx", None) in held:
            hooks.append(module.register_forward_pre_hook(restrict(held[module.layer_idx]), with_kwargs=True))
    logits = model(ids, use_cache=False).logits[0, -1]
    for hook in hooks:
        hook.remove()
    return logits


def test_sliding_layers_stay_as_they_are() -> None:
    """A hybrid's sliding layers keep transformers' cache layer, and the report says what they hold."""
    model = build("gemma3")
    with torch.no_grad(), kvpress.patch(model, H2O(budget=10)) as handle:
        cache = model(batch()["input_ids"][:1], use_cache=True)[CACHE]
        figures = handle.report().to_dict()
    assert type(cache.layers[0]).__name__ == "DynamicSlidingWindowLayer"
    assert [layer["kept"] for layer in figures["layers"]] == [7, 10, 10]
    assert figures["layers"][0]["bytes"] == cache.layers[0].keys.nbytes * 2


def test_linear_layers_are_left_alone() -> None:
    """Qwen3-Next: one attention layer among linear ones."""
    with torch.random.fork_rng():
        model = hf.Qwen3NextForCausalLM(
            hf.Qwen3NextConfig(**{**HEADS, "num_hidden_layers": 4}, **EXPERTS, shared_expert_intermediate_size=32)
        ).eval()
    dense = generate(model, {"input_ids": batch()["input_ids"]})
    with kvpress.patch(model, H2O(budget=500)) as handle:
        ours = generate(model, {"input_ids": batch()["input_ids"]})
    assert torch.equal(ours.sequences, dense.sequences)
    assert [layer["layer"] for layer in handle.report().to_dict()["layers"]] == [3]
