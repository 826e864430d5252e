"""Language models without images."""

from __future__ import annotations

from typing import Any

import transformers

from .. import zoo
from .registry import TEXT, register


def decoder(prefix: str, without: tuple[str, ...] = (), **changes: Any) -> zoo.Case:
    """A decoder of transformers, by the name that its classes begin with."""
    settings = zoo.text_config(**changes)
    settings = {name: value for name, value in settings.items() if name not in without}
    config = getattr(transformers, f"{prefix}Config")(**settings)
    return zoo.Case(zoo.make(f"{prefix}ForCausalLM", config), zoo.prompt(0, TEXT, 1, False))


HALF_SLIDING: dict[str, Any] = dict(
    sliding_window=16, layer_types=["sliding_attention", "full_attention"]
)
EXPERTS: dict[str, Any] = dict(
    num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
)
LATENT: dict[str, Any] = dict(
    num_key_value_heads=4, moe_intermediate_size=32, n_shared_experts=1, n_routed_experts=4,
    kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=16, qk_nope_head_dim=8,
    n_group=1, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=2,
)  # fmt: skip
GPT2: dict[str, Any] = dict(
    vocab_size=zoo.VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256, n_inner=96,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
OPT: dict[str, Any] = dict(
    vocab_size=zoo.VOCAB, hidden_size=64, num_hidden_layers=2, ffn_dim=96, num_attention_heads=4,
    word_embed_proj_dim=64, max_position_embeddings=256, dropout=0.0, pad_token_id=0,
    bos_token_id=1, eos_token_id=None,
)  # fmt: skip

GPT_J: dict[str, Any] = dict(
    vocab_size=zoo.VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256, rotary_dim=8,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
GPT_NEO: dict[str, Any] = dict(
    vocab_size=zoo.VOCAB, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=96,
    attention_types=[[["global"], 2]], max_position_embeddings=256, embed_dropout=0.0,
    attention_dropout=0.0, resid_dropout=0.0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip

GROUPS = ("num_key_value_heads",)

DECODERS: dict[str, dict[str, Any]] = {
    "llama": dict(prefix="Llama"),
    "mistral": dict(prefix="Mistral", sliding_window=None),
    "mistral_sliding": dict(prefix="Mistral", sliding_window=16),
    "mixtral": dict(prefix="Mixtral", num_local_experts=4),
    "qwen2": dict(prefix="Qwen2"),
    "qwen3": dict(prefix="Qwen3", head_dim=16),
    "qwen3_moe": dict(prefix="Qwen3Moe", head_dim=16, **EXPERTS),
    "gemma": dict(prefix="Gemma", head_dim=16),
    "gemma2": dict(prefix="Gemma2", head_dim=16, query_pre_attn_scalar=16, **HALF_SLIDING),
    "phi3": dict(prefix="Phi3"),
    "olmo2": dict(prefix="Olmo2"),
    "granite": dict(prefix="Granite", attention_multiplier=0.25),
    "smollm3": dict(prefix="SmolLM3", no_rope_layers=[1, 0]),
    "cohere2": dict(prefix="Cohere2", **HALF_SLIDING),
    "glm4": dict(prefix="Glm4", head_dim=16),
    "stablelm": dict(prefix="StableLm"),
    "starcoder2": dict(prefix="Starcoder2", residual_dropout=0.0, embedding_dropout=0.0),
    "gpt_neox": dict(prefix="GPTNeoX", without=GROUPS),
    "gpt_oss": dict(prefix="GptOss", head_dim=16, layer_types=["full_attention"] * 2, **EXPERTS),
    "falcon": dict(prefix="Falcon", without=GROUPS),
    "falcon_alibi": dict(prefix="Falcon", without=GROUPS, alibi=True, attn_implementation="eager"),
    "bloom": dict(prefix="Bloom", without=GROUPS, n_layer=2, n_head=4),
    "mpt": dict(prefix="Mpt", d_model=64, n_layers=2, n_heads=4, max_seq_len=256, use_cache=True),
    "lfm2": dict(prefix="Lfm2", layer_types=["conv", "full_attention"]),
    "deepseek_v3": dict(prefix="DeepseekV3", **LATENT),
}

for _name, _settings in DECODERS.items():
    register(_name, lambda settings=_settings: decoder(**settings))


def gpt2() -> zoo.Case:
    model = zoo.make("GPT2LMHeadModel", transformers.GPT2Config(**GPT2))
    return zoo.Case(model, zoo.prompt(0, TEXT, 1, False))


def opt() -> zoo.Case:
    model = zoo.make("OPTForCausalLM", transformers.OPTConfig(**OPT))
    return zoo.Case(model, zoo.prompt(0, TEXT, 1, False))


def older(prefix: str, settings: dict[str, Any]) -> zoo.Case:
    """A decoder with settings of its own."""
    config = getattr(transformers, f"{prefix}Config")(**settings)
    return zoo.Case(zoo.make(f"{prefix}ForCausalLM", config), zoo.prompt(0, TEXT, 1, False))


register("gptj", lambda: older("GPTJ", GPT_J))
register("codegen", lambda: older("CodeGen", GPT_J))
register("gpt_neo", lambda: older("GPTNeo", GPT_NEO))
register("gpt_bigcode", lambda: older("GPTBigCode", dict(GPT2, bos_token_id=1, eos_token_id=None)))
register("gpt2", gpt2)
register("opt", opt)
