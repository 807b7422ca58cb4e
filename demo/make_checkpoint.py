"""Makes a small checkpoint of any generation, in the layout of the released one.

    python make_checkpoint.py FOLDER [--generation v2_6] [--size demo] [--seed 0]

The configuration keys, key names, tokenizer attributes and file names are the released ones; the sizes
are small and the weights random. ``layouts/<generation>/`` holds what is copied, the sizes are set here.
The *.py files of a released checkpoint are stood in for by files that raise when they are run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "finetune")]

import torch

import draw_pictures
import sing_vowels
from minicpm_tune.checkpoints.model_generations import GENERATIONS, Generation
from minicpm_tune.models.loading import model_class
from small_tokenizers import PLAIN_TOKENS, SPECIAL_TOKENS, byte_fallback, byte_level, sentencepiece_model

Json = dict[str, Any]

# What the chat templates write around a conversation.
_PROMPT_WORDS = [
    "system\nYou are a helpful assistant.",
    "system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "user\nWhat",
    "assistant\n",
] * 2


@dataclass(frozen=True)
class Size:
    """Sizes of a small model.

    Attributes:
        width: Of the LLM; a multiple of 128, because the resampler has one head for each 128.
        layers: Of the LLM.
        heads: Attention heads of the LLM.
        kv_heads: Key and value heads of the LLM.
        ffn: Inner width of the LLM's MLPs.
        vision_width: Of the vision tower (V-2's is fixed at 64).
        vision_layers: Of the vision tower.
        queries: Tokens per slice, a square number (4.6 and 4.7 have one per 16 patches).
        scale_resolution: Side of the square that a slice is resized towards, in pixels.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vision_width: int
    vision_layers: int
    queries: int
    scale_resolution: int


SIZES = {"tiny": Size(128, 2, 4, 2, 192, 64, 2, 16, 112), "demo": Size(256, 4, 4, 2, 704, 128, 3, 16, 112)}


def make_checkpoint(
    folder: Path,
    generation: str = "v2_6",
    *,
    size: str = "demo",
    seed: int = 0,
    max_shard_size: str = "5GB",
    local_queries: bool = False,
) -> Path:
    """Write a checkpoint with random weights.

    Args:
        folder: Where to; made when it is not there.
        generation: A name of ``generations.GENERATIONS``.
        size: ``demo`` (a few million parameters) or ``tiny`` (for tests).
        seed: The same seed makes the same weights.
        max_shard_size: Weights above it are spread over several files, as transformers writes it.
        local_queries: Whether the queries of a resampler start with a place each; V-2.5 and later. The other models
            have no queries, or give them places anyway.

    Returns:
        The folder.
    """
    row = GENERATIONS[generation]
    layout = HERE / "layouts" / generation
    folder.mkdir(parents=True, exist_ok=True)
    ids = _write_tokenizer(folder, layout, row)
    config = _config(_read(layout / "config.json"), SIZES[size], ids)
    _write(folder / "config.json", config)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (layout / name).is_file():
            _write(folder / name, _processor(_read(layout / name), SIZES[size]))
    _write_stand_ins(folder, config)
    _write_weights(
        folder, row, SIZES[size], seed=seed, max_shard_size=max_shard_size, local_queries=local_queries
    )
    stops = sorted(
        {ids[token] for token in (row.turn_end, "<|endoftext|>", "<|end_of_text|>") if token in ids}
    )
    _write(folder / "generation_config.json", {"eos_token_id": stops, "pad_token_id": ids["<pad>"]})
    return folder


def _write_tokenizer(folder: Path, layout: Path, row: Generation) -> dict[str, int]:
    """Train and write the tokenizer; give the ids of its tokens, ``<pad>`` being the one it pads with."""
    special = SPECIAL_TOKENS[row.name]
    text = [*draw_pictures.sentences(), *_PROMPT_WORDS]
    if row.hearing is not None:
        text += sing_vowels.sentences()
    settings = _read(layout / "tokenizer_config.json")
    if row.tokenizer == "sentencepiece":
        content = sentencepiece_model(text, special, dummy_prefix=row.prompt == "minicpm")
        (folder / "tokenizer.model").write_bytes(content)
        pieces = _pieces(content)
        ids = {piece: index for index, piece in enumerate(pieces)}
        special = ["<unk>", "<s>", "</s>", *special]
    else:
        tokenizer = _train(row, text, special)
        tokenizer.save(str(folder / "tokenizer.json"))
        ids = tokenizer.get_vocab()
    template = layout / "chat_template.jinja"
    if row.content_parts:
        shutil.copy(template, folder)
    else:
        if template.is_file():
            settings["chat_template"] = template.read_text(encoding="utf-8")
        if not row.special_tokens:  # else the released file lists none
            settings["added_tokens_decoder"] = {str(ids[token]): _added(token) for token in special}
        names = {
            key: value for key, value in settings.items() if key.endswith("_token") and isinstance(value, str)
        }
        _write(folder / "special_tokens_map.json", names)
    _write(folder / "tokenizer_config.json", settings)
    return ids | {"<pad>": ids[settings["pad_token"]]}


def _train(row: Generation, text: list[str], special: list[str]) -> Any:
    plain = [token for token in special if token in PLAIN_TOKENS]
    if row.name == "v4":
        return byte_fallback(text, special, plain=plain)
    if row.name == "v2_5":
        return byte_level(text, special, digits="{1,3}", bos="<|begin_of_text|>")
    return byte_level(text, special, first=row.content_parts, plain=[] if row.content_parts else plain)


def _pieces(model: bytes) -> list[str]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [processor.id_to_piece(index) for index in range(processor.vocab_size())]


def _added(token: str) -> Json:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, **flags, "special": token not in PLAIN_TOKENS}


def _config(config: Json, size: Size, ids: dict[str, int]) -> Json:
    """The released configuration with small sizes, and the ids of this tokenizer."""
    text = config.get("text_config", config)
    layers = max(size.layers, 4) if "layer_types" in text else size.layers
    text |= {
        "hidden_size": size.width,
        "num_hidden_layers": layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": text["num_attention_heads"] if "scale_emb" in text else size.kv_heads,
        "vocab_size": max(ids.values()) + 1,
        # With the released 0.02, made for far wider layers, a narrow model starts to learn much later.
        "initializer_range": size.width**-0.5,
    }
    if "num_experts" in text:
        text |= {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": size.ffn // 4,
            "shared_expert_intermediate_size": size.ffn // 4,
        }
    else:
        text["intermediate_size"] = size.ffn
    if "layer_types" in text:
        text["layer_types"] = ["full_attention" if n % 4 == 3 else "linear_attention" for n in range(layers)]
    if "head_dim" in text:
        text["head_dim"] = size.width // size.heads
    if "scale_resolution" in config:
        config["scale_resolution"] = size.scale_resolution
    if "slice_config" in config:
        config["slice_config"]["scale_resolution"] = size.scale_resolution
    if "query_num" in config:
        config["query_num"] = size.queries
    if "vision_config" in config:
        vision = {"hidden_size": size.vision_width, "intermediate_size": 2 * size.vision_width}
        config["vision_config"] |= {
            **vision,
            "num_hidden_layers": size.vision_layers,
            "num_attention_heads": 4,
        }
    if "audio_config" in config:
        config["audio_config"] |= {
            "d_model": size.vision_width,
            "encoder_ffn_dim": 4 * size.vision_width,
            "encoder_layers": size.vision_layers,
        }
    return _with_ids(config, text, ids)


def _with_ids(config: Json, text: Json, ids: dict[str, int]) -> Json:
    named = {
        "bos_token_id": ("<|begin_of_text|>", "<s>", "<|im_start|>"),
        "eos_token_id": ("<|end_of_text|>", "<|im_end|>", "</s>"),
        "pad_token_id": ("<pad>",),
    }
    for key, tokens in named.items():
        if text.get(key) is not None:
            text[key] = next(ids[token] for token in tokens if token in ids)
    native = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "image_start_id": "<image>",
        "image_end_id": "</image>",
        "slice_start_id": "<slice>",
        "slice_end_id": "</slice>",
        "newline_id": "\u010a",  # how byte-level tokenizers write a line break
    }
    return config | {key: ids[token] for key, token in native.items() if key in config}


def _processor(settings: Json, size: Size) -> Json:
    for part in (settings, settings.get("image_processor", {}), settings.get("video_processor", {})):
        if "scale_resolution" in part:
            part["scale_resolution"] = size.scale_resolution
        if "image_feature_size" in part:
            part["image_feature_size"] = size.queries
    return settings


def _write_stand_ins(folder: Path, config: Json) -> None:
    """Files for the names in ``auto_map``, which a released checkpoint has and this project never runs."""
    named = [*config.get("auto_map", {}).values(), *_auto_map_of(folder)]
    for module in sorted({name.partition(".")[0] for name in named}):
        text = (
            '"""Stands in for the released code."""\n\nraise ImportError("a small checkpoint has no code")\n'
        )
        (folder / f"{module}.py").write_text(text, encoding="utf-8")


def _auto_map_of(folder: Path) -> list[str]:
    names: list[str] = []
    for path in folder.glob("*_config.json"):
        for value in _read(path).get("auto_map", {}).values():
            names += [name for name in (value if isinstance(value, list) else [value]) if name]
    return names


def _write_weights(
    folder: Path, row: Generation, size: Size, *, seed: int, max_shard_size: str, local_queries: bool
) -> None:
    torch.manual_seed(seed)
    kind = model_class(row)
    model = kind(kind.config_class.from_pretrained(folder))
    model.config.name_or_path = ""
    if row.vision == "siglip":
        _smooth_positions(model.vpm.embeddings.position_embedding.weight)
    elif row.vision == "clip":
        _smooth_positions(model.vit.tower.embeddings.position_embedding.weight[1:])
    if local_queries and row.vision == "siglip":
        _look_at_places(model.resampler, patches=size.scale_resolution // 14)
    tensors = model.state_dict()
    if row.hearing is not None:  # speech output, which is carried along
        tensors["tts.emb_text.weight"] = torch.randn(4, 8)
    model.save_pretrained(folder, state_dict=tensors, max_shard_size=max_shard_size)


@torch.no_grad()
def _smooth_positions(table: torch.Tensor) -> None:
    """Fill a [side * side, width] position table with low-frequency waves, so that neighbors are alike.

    Trained tables are smooth; with independent random rows a small model takes far longer to tell places
    (one run each, 1600 pictures: 26 % of nine places right, against 10 %).
    """
    waves = torch.arange(1, table.shape[1] // 4 + 1)
    count = round(table.shape[0] ** 0.5)
    angles = (torch.arange(count)[:, None] + 0.5) / count * torch.pi * waves
    side = torch.cos(angles) / (0.5 + waves / 2)
    rows, columns = side[:, None].expand(count, count, -1), side[None].expand(count, count, -1)
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    mixed = grid @ torch.randn(grid.shape[1], table.shape[1])
    table.copy_(0.7 * mixed / mixed.std())


@torch.no_grad()
def _look_at_places(resampler: torch.nn.Module, *, patches: int) -> None:
    """Have every query of a resampler attend to the patches around a place of its own, as trained queries do.

    With random weights every query sees all patches alike, and a small model takes very long to tell where something
    is (one run each, 1280 pictures: the loss of boxes is still that of guessing; with this it is far below).
    Query and key keep the dimensions of the position table that change fast enough to tell neighbors, shared out
    over the heads; values weigh little beside positions in the keys.

    Args:
        resampler: One without positions of its own queries.
        patches: Patches on a side of a slice.
    """
    count, width = resampler.query.shape
    side = round(count**0.5)
    waves = width // 4
    rates = 10000 ** -(torch.arange(waves) / waves)
    centers = (torch.arange(side) + 0.5) * patches / side - 0.5
    angles = centers[:, None] * rates
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    resampler.query.copy_(torch.cat([table.repeat(side, 1), table.repeat_interleave(side, dim=0)], dim=1))
    gain = torch.zeros(width, width)
    heads = resampler.attn.heads
    for wave, part in product(range(waves // 3), range(4)):
        # All four parts of a wave in one head: only together do they tell a distance.
        row = (wave % heads) * (width // heads) + 4 * (wave // heads) + part
        gain[row, part * waves + wave] = 2.0
    for part in resampler.attn.in_proj_weight.chunk(3)[:2]:
        part.mul_(0.1).add_(gain)
    resampler.ln_kv.weight.mul_(0.25)


def _read(path: Path) -> Json:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Make a checkpoint, as the command line says."""
    parser = argparse.ArgumentParser(description="Make a small checkpoint with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--generation", default="v2_6", choices=list(GENERATIONS))
    parser.add_argument("--size", default="demo", choices=list(SIZES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_shard_size", default="5GB", help="spread larger weights over several files")
    parser.add_argument(
        "--local_queries",
        action="store_true",
        help="resamplers: start with queries that look at a place each",
    )
    make_checkpoint(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
