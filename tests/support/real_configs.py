"""The sizes of the released checkpoints, for plans of their memory: no weights, no downloads."""

import json

_VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 980,
}
_COMMON = {
    "architectures": ["MiniCPMV"],
    "model_type": "minicpmv",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "drop_vision_last_layer": False,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
    "query_num": 64,
    "vision_config": _VISION,
}


def _llm(hidden, layers, heads, kv, ffn, vocab, **more):
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        **more,
    }


REAL_CONFIGS = {
    "v2": {
        **_COMMON,
        **_llm(2304, 40, 36, 36, 5760, 122753, rms_norm_eps=1e-5, rope_theta=1e4),
        "scale_emb": 12,
        "dim_model_base": 256,
        "scale_depth": 1.4,
        "vision_encoder": "vit_so400m_patch14_siglip_384.webli",
        **{"slice_mode": True, "max_slice_nums": 9, "scale_resolution": 448},
        "drop_vision_last_layer": True,
    },
    "v2_5": {
        **_COMMON,
        **_llm(4096, 32, 32, 8, 14336, 128256, rms_norm_eps=1e-5, rope_theta=5e5),
        "version": "2.5",
        "query_num": 96,
    },
    "v2_6": {**_COMMON, **_llm(3584, 28, 28, 4, 18944, 151666, rope_theta=1e6), "version": 2.6},
    "v4": {**_COMMON, **_llm(2560, 32, 32, 2, 10240, 73448, head_dim=128), "version": 4.0},
    "v4_5": {
        **_COMMON,
        **_llm(4096, 36, 32, 8, 12288, 151748, head_dim=128, rope_theta=1e6),
        "version": 4.5,
        "batch_3d_resampler": True,
    },
}


def write_config(generation, folder):
    """Write the config.json of a released checkpoint; give its folder."""
    (folder / "config.json").write_text(json.dumps(REAL_CONFIGS[generation]))
    return folder
