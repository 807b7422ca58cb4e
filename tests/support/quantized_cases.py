"""Small quantized models, shared by the tests of quantization."""

import json

import torch
from transformers import BitsAndBytesConfig

from minicpm_tune.checkpoints.model_generations import GENERATIONS
from minicpm_tune.lora.build import add_adapter
from minicpm_tune.models.loading import load_model
from minicpm_tune.models.minicpmv.configuration import MiniCPMVConfig
from minicpm_tune.models.minicpmv.modeling import MiniCPMV
from minicpm_tune.settings.argument_groups import LoraArguments
from support.golden_models import full_batch, golden_model
from support.paths import GOLDENS

V2_6 = GENERATIONS["v2_6"]
# Modules that the released int4 checkpoints keep exact, by their config.json: vision is quantized there.
RELEASED_SKIP = ["out_proj", "kv_proj", "lm_head"]
# How far quantized weights move the loss of the random golden models; worst measured 0.1 of 6.5 and 0.01.
LOSS_TOLERANCE = {4: 0.2, 8: 0.03}
# q, k, v, o in two layers, A and B; resampler; token embeddings.
TRAINED_TENSORS = 2 * 8 + 13 + 1


def save_golden(generation, folder):
    """A small checkpoint in full precision, with a tokenizer."""
    model, _ = golden_model(generation, attention="sdpa")
    model.config.name_or_path = str(GOLDENS / generation / "tokenizer")
    model.save_pretrained(folder)
    return folder


def save_released_int4(checkpoint, folder):
    """As the released int4 files are: vision quantized too, with the settings of the official script."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
        llm_int8_skip_modules=RELEASED_SKIP,
    )
    config = MiniCPMVConfig.from_pretrained(checkpoint)
    model = MiniCPMV.from_pretrained(
        checkpoint, config=config, dtype=torch.float16, quantization_config=settings
    )
    model.save_pretrained(folder)
    return folder


def load(folder, generation="v2_6", **kwargs):
    return load_model(folder, dtype=torch.float32, **kwargs).train()


def golden_loss(model, generation="v2_6", case="single"):
    about = json.loads((GOLDENS / generation / "forward.json").read_text())
    batch, info = full_batch(generation, case, about)
    return model(**batch).loss, info["loss"]


def with_adapter(model, *, vision=False, **options):
    lora = LoraArguments(lora_r=4, lora_alpha=4, lora_dropout=0.0, **options)
    model = add_adapter(model, V2_6, lora, vision=vision, resampler=True)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # B is zero at first, which would hide A's gradients
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def gradients(model):
    model.zero_grad()
    golden_loss(model)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
