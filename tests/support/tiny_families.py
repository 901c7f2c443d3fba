"""Tiny random models of every family that the installed transformers has, made by one rule.

The rule: take the default configuration of a family; of its layers keep a few that differ in every list that says
something per layer; replace widths, heads, experts and vocabularies by small numbers, by the field's name; leave towers
for images and sounds as wide as they are but one layer deep (text alone never runs them). Then fill the weights so that
attention is far from uniform. What the rule cannot know stands in `EXCEPTIONS`.
"""

from typing import Any

import torch
import transformers as hf
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCAB = 128
MOST_LAYERS = 4

SMALL: dict[str, Any] = {
    **dict.fromkeys(
        (
            "hidden_size",
            "d_model",
            "n_embd",
            "embed_dim",
            "word_embed_proj_dim",
            "embedding_size",
            "lru_width",
            "out_hidden_size",
            "text_hidden_size",
        ),
        64,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "attention_heads",
            "swa_num_attention_heads",
            "num_sliding_attention_heads",
        ),
        4,
    ),
    **dict.fromkeys(("head_dim", "swa_head_dim", "kv_channels", "attention_head_dim", "attention_head_size"), 16),
    **dict.fromkeys(("global_head_dim",), 32),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "n_inner",
            "d_ff",
            "ffn_hidden_size",
            "shared_intermediate_size",
            "shared_expert_intermediate_size",
            "dense_intermediate_size",
            "share_expert_dim",
            "intermediate_size_mlp",
            "expert_ffn_hidden_size",
            "moe_shared_expert_intermediate_size",
            "moe_intermediate_size",
        ),
        96,
    ),
    **dict.fromkeys(
        (
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
            "routed_experts",
        ),
        4,
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "moe_top_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "topk_group_limit"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "encoder_hash_byte_group_vocab"), VOCAB
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"), 512),
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size", "attention_window_size", "window_size", "attention_chunk_size"), 8
    ),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    "qk_head_dim": 32,
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 16),
    **dict.fromkeys(("hidden_size_per_layer_input",), 16),
    "query_pre_attn_scalar": 16,
    "rotary_dim": 8,
    "original_max_position_embeddings": 64,
    "index_head_dim": 16,
    "index_n_heads": 4,
    "index_topk": 8,
}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth")
KV_HEADS = ("num_key_value_heads", "swa_num_key_value_heads", "multi_query_group_num", "num_kv_heads")
# Fields without a default that the models cannot do without.
NEEDED = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 16,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
NO_TOKENS = {"eos_token_id": None, "bos_token_id": 1, "pad_token_id": 0}

MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}

# What the rule cannot know, by the config's `model_type`: fields of the tiny configuration.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "cosmos3_edge_text": {"rope_parameters": MROPE | {"mrope_section": [3, 3, 2]}},
    "glm4v_moe_text": {"rope_parameters": MROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}},
    "hy_v4_vl_text": {"mrope_section": [3, 3, 2]},
    **{
        name: {"rope_parameters": MROPE}
        for name in (
            "glm4v_text",
            "glm_ocr_text",
            "paddleocr_vl_text",
            "qwen2_5_omni_text",
            "qwen2_5_vl_text",
            "qwen2_vl_text",
            "hunyuan_vl_text",
        )
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 100},
    "xmod": {"default_language": "en_XX"},
    "whisper": {"pad_token_id": 0, "decoder_start_token_id": 1},
    "reformer": {"axial_pos_embds": False, "is_decoder": True},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "depths": [1] * 7},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "glm5_next_text": {"index_kpool": 4},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
            "full_attention": None,
        },
    },
    "marian": {"pad_token_id": 0},
    "dots1": {
        "moe_intermediate_size": 96,
        "n_shared_experts": 1,
        "topk_group": 1,
        "n_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
}
# Fields of the default configuration that the rule starts from.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
}


def family_names() -> dict[str, str]:
    """model type -> class, of all that are made with `AutoModelForCausalLM` or take text alone beside images and sounds."""
    several = getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})
    found = {**several, **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    found.update(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return {name: kind for name, kind in sorted(found.items()) if isinstance(kind, str) and hasattr(hf, kind)}


def _config_of(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a configuration that a class is made from."""
    parts = [config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))]
    return next((part for part in parts if isinstance(part, kind.config_class)), config)


def tiny_config(config: PreTrainedConfig, one_layer: int | None = None) -> PreTrainedConfig:
    """The tiny configuration that stands for a default one.

    Args:
        one_layer: keep only this layer of those that the rule would keep.
    """
    text = config.get_text_config(decoder=True)
    return _shrunk(config, text, one_layer)


def _shrunk(config: PreTrainedConfig, text: PreTrainedConfig, one_layer: int | None) -> PreTrainedConfig:
    fields = {
        name: _shrunk(value, text, one_layer)
        for name, value in vars(config).items()
        if isinstance(value, PreTrainedConfig)
    }
    fields.update(_text_fields(config, one_layer) if config is text else _other_fields(config))
    fields.update(EXCEPTIONS.get(config.model_type, {}))
    return type(config)(**fields)


def _other_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a tower for images or sounds, or of a configuration around all parts: one or two layers."""
    fields: dict[str, Any] = {}
    for place, (name, value) in enumerate(vars(config).items()):
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if name in LAYERS:
            fields[name] = min(2, value)
        elif name.endswith(("_token_id", "_token_index")) and name not in NO_TOKENS and value >= VOCAB:
            fields[name] = 100 + place % 28  # beyond the ids that are fed
        elif name in SMALL and name not in ("max_position_embeddings", "window_size", "embed_dim"):
            fields[name] = min(SMALL[name], value)
    return fields


def _text_fields(config: PreTrainedConfig, one_layer: int | None) -> dict[str, Any]:
    fields: dict[str, Any] = dict(NO_TOKENS)
    values = {name.removeprefix("_"): value for name, value in vars(config).items()}
    heads = values.get("num_attention_heads", values.get("n_head", values.get("num_heads")))
    for name, value in values.items():
        if isinstance(value, bool):
            continue
        if name in KV_HEADS and isinstance(value, int):
            fields[name] = 1 if one_layer is not None else 4 if value == heads else min(2, value)
        elif name in SMALL and isinstance(value, int):
            fields[name] = min(SMALL[name], value)
        elif name in NEEDED and value is None:
            fields[name] = NEEDED[name]
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        fields["rope_parameters"] = {**rope, "mrope_section": [2, 3, 3]}
    if values.get("is_decoder") is False:
        fields["is_decoder"] = True
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int):
        kept = _kept_layers(values, layers)
        kept = kept if one_layer is None else [kept[one_layer]]
        for name in LAYERS:
            if name in values:
                fields[name] = len(kept)
        for name, value in values.items():
            if isinstance(value, (list, tuple)) and len(value) == layers > 1:
                most = SMALL.get(name)
                fields[name] = [value[index] if most is None else min(most, value[index]) for index in kept]
    return fields


def _kept_layers(values: dict[str, Any], layers: int) -> list[int]:
    """Indices of a few layers, so that each way in which the lists say layers differ occurs."""
    lists = [value for value in values.values() if isinstance(value, (list, tuple)) and len(value) == layers]
    first: dict[str, int] = {}
    for index in range(layers):
        first.setdefault(str([each[index] for each in lists]), index)
    kept = sorted(first.values())[:MOST_LAYERS]
    spare = [index for index in range(layers) if index not in kept]
    return sorted(kept + spare[: max(0, 2 - len(kept))])


def tiny_family(name: str, one_layer: int | None = None, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of the family `name`, on the CPU, in eval mode; the global random state is left alone."""
    kind = getattr(hf, family_names()[name])
    config = tiny_config(_config_of(kind, CONFIG_MAPPING[name](**DEFAULTS.get(name, {}))), one_layer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 and "bias" not in key else 0.25 * noise)
    return model
