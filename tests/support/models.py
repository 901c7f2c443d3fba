"""Tiny random models, each fresh, on the CPU, in eval mode; the global random state is left alone."""

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import kvpress

VOCAB = 97
# No token ends a sequence, so that `generate` makes exactly as many as it is asked for.
SPECIAL = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
WIDTHS = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 512}


def shipped_policies():
    """Name -> policy of the package; `kvpress.available()` also has those that other tests of this process define."""
    return {n: one for n, one in kvpress.available().items() if one.__module__.startswith("kvpress.policies.")}


def token_ids(batch, count, seed=0):
    """Random token ids [batch, count] without the padding id 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (batch, count), generator=generator)


def build(model_class, config, seed=0):
    """A model with weights so large that its attention is far from uniform, and norms that are not ones."""
    with torch.random.fork_rng():
        model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.25 * noise)
    return model


def tiny_llama(layers=2, heads=4, kv_heads=2, seed=0, head_dim=8, attention="sdpa", **fields):
    """A Llama: grouped-query attention, rotary halves. `fields` go to its config."""
    config = LlamaConfig(
        **(WIDTHS | fields),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        attn_implementation=attention,
        **SPECIAL,
    )
    return build(LlamaForCausalLM, config, seed)


def tiny_opt(layers=2, heads=4, seed=0):
    """An OPT: multi-head attention, learned positions, no rotary embedding."""
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=512,
        dropout=0.0,
        **SPECIAL,
    )
    return build(OPTForCausalLM, config, seed)


def tiny_falcon(layers=2, heads=4, seed=0):
    """A Falcon: its attention does not go through transformers' AttentionInterface."""
    config = FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=layers, num_attention_heads=heads, alibi=False, **SPECIAL
    )
    return build(FalconForCausalLM, config, seed)


def tiny_bloom(layers=2, heads=4, seed=0):
    """A Bloom: ALiBi biases instead of position embeddings."""
    config = BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=layers, n_head=heads, **SPECIAL)
    return build(BloomForCausalLM, config, seed)


def tiny_t5(layers=2, heads=4, seed=0):
    """A T5: encoder and decoder."""
    config = T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=layers,
        num_heads=heads,
        decoder_start_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return build(T5ForConditionalGeneration, config, seed)


def tiny_mistral_sliding(layers=2, heads=4, kv_heads=2, seed=0, sliding_window=8):
    """A Mistral whose layers all have sliding-window attention."""
    config = MistralConfig(
        **WIDTHS,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        sliding_window=sliding_window,
        **SPECIAL,
    )
    return build(MistralForCausalLM, config, seed)


def tiny_deepseek_v3(layers=2, heads=4, seed=0):
    """A DeepSeek-V3: multi-head latent attention, dense feed-forward layers only."""
    config = DeepseekV3Config(
        **WIDTHS,
        moe_intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=layers,
        **SPECIAL,
    )
    return build(DeepseekV3ForCausalLM, config, seed)
