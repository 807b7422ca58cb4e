"""The generation is read from config.json, and a contradicting --llm_type is refused."""

import json
import shutil

import pytest

from minicpm_tune.checkpoints.model_folder import (
    UnknownCheckpointError,
    check_llm_type,
    detect_generation,
    read_generation,
)
from minicpm_tune.checkpoints.model_generations import GENERATIONS
from support.paths import LAYOUTS


def config_of(generation):
    return json.loads((LAYOUTS / generation / "config.json").read_text())


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_released_config_tells_the_generation(generation):
    thinks = generation == "v4_6_thinking"  # the chat template says so
    assert detect_generation(config_of(generation), thinks=thinks).name == generation


def test_the_chat_template_tells_a_model_that_thinks_by_itself(tmp_path):
    folder = shutil.copytree(LAYOUTS / "v4_6", tmp_path / "model")
    assert read_generation(folder).name == "v4_6"
    template = folder / "chat_template.jinja"
    template.write_text((LAYOUTS / "v4_6_thinking" / "chat_template.jinja").read_text())
    assert read_generation(folder).name == "v4_6_thinking"
    shutil.copy(LAYOUTS / "v4_7_moe" / "config.json", folder)
    found = read_generation(folder)
    assert (found.name, found.thinks) == ("v4_7_moe", True)
    template.write_text("{% if messages %}")  # broken, which is reported where it is used
    assert not read_generation(folder).thinks


@pytest.mark.parametrize("model_type", ["minicpmv4_6", "minicpmv4_7"])
def test_an_llm_that_is_not_known_is_no_silent_guess(model_type):
    config = {"model_type": model_type, "text_config": {"model_type": "qwen4_text"}}
    message = rf"is '{model_type}' and text_config.model_type is 'qwen4_text', expected qwen3_5_text"
    with pytest.raises(UnknownCheckpointError, match=message):
        detect_generation(config)


@pytest.mark.parametrize("generation", ["v2_5", "v2_6", "v4", "v4_5"])
def test_without_a_version_the_rest_of_the_config_tells_it(generation):
    config = config_of(generation)
    del config["version"]
    assert detect_generation(config).name == generation


def test_the_name_of_the_folder_tells_nothing():
    config = config_of("v2_6") | {"_name_or_path": "openbmb/MiniCPM-V-4_5"}
    assert detect_generation(config).name == "v2_6"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'minicpmv'"),
        ({}, "model_type is 'missing'"),
        ({"model_type": "minicpmv", "version": 9}, "version is 9, expected one of 2.5, 2.6"),
        ({"model_type": "minicpmv"}, "nothing else tells the generation"),
    ],
)
def test_another_checkpoint_is_refused(config, message):
    with pytest.raises(UnknownCheckpointError, match=message):
        detect_generation(config)


XC2 = {"auto_map": {"AutoModel": "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM"}}
# What config.json of the released InternLM-XComposer2 checkpoints says of itself.
RELEASED_XC2 = {
    "xc2_7b": {"architectures": ["InternLMXComposer2ForCausalLM"], "img_size": 224, "max_length": 4096},
    "xc2_vl_7b": {"architectures": ["InternLMXComposer2ForCausalLM"], "img_size": 490, "max_length": 4096},
    "xc2_4khd_7b": {"architectures": ["InternLM2ForCausalLM"], "max_length": 16384},
}


@pytest.mark.parametrize("model_type", ["internlmxcomposer2", "internlm"])
@pytest.mark.parametrize("generation", RELEASED_XC2)
def test_both_model_types_of_xcomposer2_are_accepted(generation, model_type):
    config = {"model_type": model_type, **XC2, **RELEASED_XC2[generation]}
    assert detect_generation(config).name == generation


def test_4khd_is_known_by_its_class_or_its_tensors():
    config = {"model_type": "internlmxcomposer2", **XC2, **RELEASED_XC2["xc2_7b"]}
    four = {"AutoModel": "modeling_internlm_xcomposer2_4khd.InternLMXComposer2ForCausalLM"}
    assert detect_generation(config | {"auto_map": four}).name == "xc2_4khd_7b"
    tensors = {"model.norm.weight", "plora_glb_GN"}
    assert detect_generation(config, tensors=tensors).name == "xc2_4khd_7b"
    longer = config | {"max_length": 16384}  # a derivative of 7b with more room for text
    assert detect_generation(longer, tensors={"model.norm.weight"}).name == "xc2_7b"


def test_an_internlm_without_images_is_refused():
    with pytest.raises(
        UnknownCheckpointError, match=r"architectures is \['InternLMForCausalLM'\], expected InternLMX"
    ):
        detect_generation({"model_type": "internlm", "architectures": ["InternLMForCausalLM"]})


@pytest.mark.parametrize(
    ("config", "tensors", "name"),
    [
        ({"version": "4.5"}, (), "o4_5"),
        ({"version": 4.5, "head_dim": None}, (), "o4_5"),
        ({"version": 2.6, "head_dim": 128}, (), "o2_6"),
        ({"head_dim": 128}, (), "o4_5"),
        ({}, {"llm.model.layers.0.self_attn.q_norm.weight"}, "o4_5"),
        ({"head_dim": None}, {"llm.model.layers.0.self_attn.q_proj.bias"}, "o2_6"),
    ],
)
def test_the_two_models_of_type_minicpmo_are_told_apart(config, tensors, name):
    assert detect_generation({"model_type": "minicpmo", **config}, tensors=tensors).name == name


def test_an_unknown_version_of_minicpmo_is_refused():
    with pytest.raises(UnknownCheckpointError, match=r"version is '5.0', expected one of 2.6, 4.5"):
        detect_generation({"model_type": "minicpmo", "version": "5.0"})


@pytest.mark.parametrize(
    ("config", "tensors", "title"),
    [
        ({"model_type": "minicpmv", "scale_emb": 12, "query_num": 64}, (), "MiniCPM-V 1.0"),
        ({"model_type": "internlm2", **XC2}, (), "InternLM-XComposer 2.5"),
        (
            {"model_type": "internlmxcomposer2", "architectures": ["InternLMXComposer2d5ForCausalLM"]},
            (),
            "InternLM-XComposer 2.5",
        ),
    ],
)
def test_a_relative_of_a_generation_is_refused_by_name(config, tensors, title):
    with pytest.raises(
        UnknownCheckpointError, match=f"this is {title}, which can't be trained here; expected one"
    ):
        detect_generation(config, tensors=tensors)


def test_o_2_6_is_known_with_and_without_a_version():
    config = config_of("o2_6") | {"version": 2.6}
    assert detect_generation(config).name == "o2_6"
    del config["version"]
    tensors = {"llm.model.layers.0.self_attn.q_proj.bias"}
    assert detect_generation(config, tensors=tensors).name == "o2_6"


@pytest.mark.parametrize(
    ("generation", "llm_type"),
    [
        ("v2", "minicpm"),
        ("v2_5", "llama3"),
        ("v2_6", "qwen"),
        ("v2_6", "qwen2"),
        ("v4", "llama"),
        ("v4", "auto"),
    ],
)
def test_the_documented_llm_type_is_accepted(generation, llm_type):
    check_llm_type(GENERATIONS[generation], llm_type)


@pytest.mark.parametrize(
    ("generation", "llm_type", "right"), [("v2_6", "minicpm", "qwen"), ("v2", "llama3", "minicpm")]
)
def test_a_contradicting_llm_type_is_an_error_that_says_which_is_right(generation, llm_type, right):
    with pytest.raises(ValueError, match=f"expected --llm_type {right}"):
        check_llm_type(GENERATIONS[generation], llm_type)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_row_names_its_parts(generation):
    row = GENERATIONS[generation]
    hears = {"audio"} if row.hearing else set()
    assert set(row.modules) == {"vision", "resampler", "embeddings", "llm"} | hears
