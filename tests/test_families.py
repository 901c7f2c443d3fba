"""Model families: what a patched model computes with room for everything is transformers' own dense result."""

import os

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

import kvpress
from kvpress import UnsupportedModelError
from kvpress.compat import CACHE, NEWEST_TESTED
from kvpress.policies import H2O, Full, SnapKV, StreamingLLM
from support.family_checks import check_family
from support.models import tiny_llama
from support.refusals import refused
from support.tiny_families import family_names, tiny_family

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


# ------------------------------------------------------------------ families by the rule of tiny_families.py

# What is right under every kind of policy, and what has no positions that can be re-indexed.
RIGHT = [
    "apertus",
    "arcee",
    "bamba",
    "bitnet",
    "cohere",
    "cwm",
    "deepseek_vl",
    "ernie4_5",
    "exaone4",
    "gemma",
    "gemma3",
    "glm4",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "granitemoehybrid",
    "helium",
    "jamba",
    "llava",
    "mixtral",
    "nemotron",
    "olmo2",
    "olmo_hybrid",
    "olmoe",
    "phi",
    "phi3",
    "qwen2_moe",
    "qwen2_5_vl",
    "qwen3",
    "qwen3_5_text",
    "seed_oss",
    "smollm3",
    "starcoder2",
]
NOT_MOVED = ["hunyuan_v1_dense", "bart", "bert", "biogpt", "gpt2", "gpt_bigcode"]
REFUSED = {
    "diffllama": "runs attention 2 times",
    "doge": "attention mask of its own",
    "minimax": "cache of its own kind",
    "falcon_h1": "attention and a recurrent state in one cache layer",
    "falcon_mamba": "a recurrent state of fixed size",
    "inkling_text": "sliding-window attention",
    "deepseek_v32": "indexed sparse attention",
    "glm_moe_dsa": "indexed sparse attention",
    "qwen4_exp_text": "indexed sparse attention",
    "minimax_m3_vl": "block_indices",
    "paligemma": "both directions",
    "git": "AttentionInterface",
    "deepseek_v3": "latent attention",
    "falcon": "AttentionInterface",
    "dory": "under another layer than its own",
    "blt": "can make no cache",
    "kosmos-2": "masks itself",
}


def has(name: str) -> None:
    if name not in family_names():
        pytest.skip(f"this transformers has no {name}")


@pytest.mark.parametrize("name", RIGHT + NOT_MOVED)
def test_right(name: str) -> None:
    """A batch, a left-padded one and a prompt in two passes, under the three kinds of policy, against the unpatched model."""
    has(name)
    verdicts = check_family(name)
    found = {kind: verdict.outcome for kind, verdict in verdicts.items()}
    moved = "refused" if name in NOT_MOVED else "right"
    if hf.__version__ != NEWEST_TESTED and set(found.values()) <= {"right", "refused", "not tried"}:
        pytest.skip(f"what an older transformers does with it is {found}")
    assert found == {"exact": "right", "evicting": "right", "re-indexing": moved}, verdicts


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """At `patch`, with the true reason, and the model is as it was."""
    has(name)
    if hf.__version__ != NEWEST_TESTED:
        with pytest.raises(UnsupportedModelError):  # perhaps for a reason of older versions
            kvpress.patch(tiny_family(name), Full())
        return
    with refused(REFUSED[name], error=UnsupportedModelError):
        kvpress.patch(tiny_family(name), Full())


def test_gptj() -> None:
    """Right where its attention goes through AttentionInterface, refused by older versions of transformers."""
    verdict = check_family("gptj")["exact"]
    assert verdict.outcome == ("right" if hf.GPTJModel._can_set_attn_implementation() else "refused"), verdict


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("KVPRESS_SWEEP"), reason="all families take a quarter of an hour: KVPRESS_SWEEP=1"
)
@pytest.mark.parametrize("name", family_names())
def test_every_family(name: str) -> None:
    """Right, or refused at `patch`, or no model that runs on text alone is made by the rule."""
    verdicts = check_family(name)
    assert all(verdict.outcome in ("right", "refused", "not tried") for verdict in verdicts.values()), verdicts


def test_no_family_is_forgotten() -> None:
    """The sweep has every causal LM that transformers maps, if its class can be imported."""
    missing = [name for name, kind in CAUSAL.items() if hasattr(hf, kind) and name not in family_names()]
    assert not missing


# ------------------------------------------------------------------ which way a model attends


def bidirectional_config() -> hf.PreTrainedModel:
    model = tiny_llama()
    model.config.is_causal = False
    return model


def bidirectional_module() -> hf.PreTrainedModel:
    model = tiny_llama()
    model.model.layers[1].self_attn.is_causal = False
    return model


def bidirectional_gemma() -> hf.PreTrainedModel:
    return hf.GemmaForCausalLM(hf.GemmaConfig(**HEADS, use_bidirectional_attention=True))


def encoder() -> hf.PreTrainedModel:
    return hf.BertLMHeadModel(hf.BertConfig(**COMMON))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (bidirectional_config, ("config.is_causal is False",)),
        (bidirectional_module, ("LlamaAttention.is_causal is False",)),
        (bidirectional_gemma, ("use_bidirectional_attention is True",)),
        (encoder, ("BertSelfAttention.is_causal is False", "is_decoder=True")),
    ],
)
@pytest.mark.parametrize("policy", [Full(), H2O(budget=10)], ids=["full", "h2o"])
def test_attention_in_both_directions(make, words, policy) -> None:  # type: ignore[no-untyped-def]
    with refused("both directions", *words, error=UnsupportedModelError):
        kvpress.patch(make(), policy)


def packed() -> Tensor:
    """Positions of two sequences in one row."""
    return torch.cat((torch.arange(5), torch.arange(7)))[None]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_packed_sequences(name: str) -> None:
    """Without a cache transformers takes them apart, and says nothing of masks; we name the positions."""
    model, ids = tiny_family(name), torch.arange(3, 15)[None]
    model.set_attn_implementation("eager")  # older versions' sdpa leaves soft-capping out
    with kvpress.patch(model, Full()), refused("position_ids", "packed into one row", "padding mask"):
        model(ids, position_ids=packed(), use_cache=False)
    with torch.no_grad(), kvpress.patch(model, Full()):
        plain = model(ids, position_ids=torch.arange(12)[None], use_cache=False).logits
    torch.testing.assert_close(plain, model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------ models around a decoder, which make the masks


def token_types(ids: Tensor, image: slice | None = None) -> Tensor:
    types = torch.zeros_like(ids)
    if image is not None:
        types[:, image] = 1
    return types


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("types", [True, False], ids=["token-types", "none"])
def test_text_alone_in_a_model_for_images(types: bool, implementation: str) -> None:
    """Gemma 3's processor brings token types for text too; the mask that the model makes of them is then causal."""
    model = tiny_family("gemma3")
    model.set_attn_implementation(implementation)
    inputs = batch()
    if types:
        inputs["token_type_ids"] = token_types(inputs["input_ids"])
    dense = generate(model, inputs)
    for policy in ROOMY:
        with kvpress.patch(model, policy) as handle:
            ours = generate(model, inputs)
            assert handle.report().to_dict()["seen"] == 67  # 49 of the prompts, 9 steps of each; padding is no token
        for got, expected in zip(ours.logits, dense.logits, strict=True):
            torch.testing.assert_close(got, expected, atol=5e-5, rtol=1e-3)


@torch.no_grad()
def test_images_whose_tokens_see_each_other() -> None:
    """Refused when the image comes, and the model works on."""
    model, ids = tiny_family("gemma3"), batch()["input_ids"]
    dense = model(ids).logits
    with kvpress.patch(model, Full()):
        with refused("not just causal", "image", "text alone"):
            model(ids, token_type_ids=token_types(ids, slice(3, 9)))
        torch.testing.assert_close(model(ids).logits, dense, atol=5e-5, rtol=1e-3)


# ------------------------------------------------------------------ attention that runs more or less than once


class TwiceAttention(hf.models.llama.modeling_llama.LlamaAttention):
    """Attends twice, where the source of `forward` does not show it."""

    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


class NeverAttention(hf.models.llama.modeling_llama.LlamaAttention):
    """Does not call the attention function."""

    def forward(self, hidden_states, *args, **kwargs):  # type: ignore[no-untyped-def]
        return hidden_states, None


@pytest.mark.parametrize(("kind", "words"), [(TwiceAttention, "more than once"), (NeverAttention, "layers [1]")])
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_attention_that_does_not_run_once(kind: type, words: str, use_cache: bool) -> None:
    """A pass tells, and the next model is not harmed."""
    model = tiny_llama()
    kept = model.model.layers[1].self_attn
    model.model.layers[1].self_attn = kind(model.config, 1)
    with kvpress.patch(model, Full()):
        with refused(words, error=UnsupportedModelError):
            model(batch()["input_ids"][:1], use_cache=use_cache)
        with refused(words, error=UnsupportedModelError):
            model(batch()["input_ids"][:1], use_cache=use_cache)
    model.model.layers[1].self_attn = kept
    with kvpress.patch(model, Full()):
        model(batch()["input_ids"][:1])


class Source:
    """Attention modules by what their source shows."""

    class Bias(torch.nn.Module):
        def forward(self, query, key, value, attention_mask, attention_interface=None, bias=None):  # type: ignore[no-untyped-def]
            return attention_interface(self, query, key, value, attention_mask, position_bias=bias)

    class Own(torch.nn.Module):
        def forward(self, query, key, value, attention_mask):  # type: ignore[no-untyped-def]
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, attention_mask)


@pytest.mark.parametrize(("kind", "words"), [(Source.Bias, "position_bias"), (Source.Own, "AttentionInterface")])
def test_attention_that_the_source_shows_to_be_unknown(kind: type, words: str) -> None:
    model = tiny_llama()
    attention = type("OtherAttention", (kind,), {})()
    attention.layer_idx = 1
    model.model.layers[1].self_attn = attention
    with refused(words, "OtherAttention", error=UnsupportedModelError):
        kvpress.patch(model, Full())
