"""What importing the adapter teaches transformers: names, configurations that remember, refusals; nothing for others."""

from __future__ import annotations

import json

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.17")

from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedConfig  # noqa: E402
from transformers.generation.continuous_batching import initialization  # noqa: E402

import softpick.integrations.transformers as st  # noqa: E402
from softpick.integrations.transformers_layers import attention_mask  # noqa: E402
from softpick.normalizers import NORMALIZERS  # noqa: E402

TINY = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PART = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
T5 = {
    "vocab_size": 20,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 16,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}


def llama(name):
    return AutoModelForCausalLM.from_config(transformers.LlamaConfig(**TINY), attn_implementation=name).eval()


def clip(name="eager"):
    config = transformers.CLIPConfig(
        text_config={**PART, "vocab_size": 20, "max_position_embeddings": 8},
        vision_config={**PART, "image_size": 8, "patch_size": 4},
        projection_dim=4,
    )
    return transformers.CLIPModel._from_config(config, attn_implementation=name)


def of(model):
    """Implementation of each part of a model, by its class."""
    parts = [module for module in model.modules() if isinstance(module, transformers.PreTrainedModel)]
    return {type(part).__name__: part.config._attn_implementation for part in parts}


def what_is_replaced():
    return [
        PreTrainedConfig.to_dict,
        PreTrainedConfig.validate_output_attentions,
        PreTrainedConfig.output_attentions,
        transformers.PreTrainedModel.get_correct_attn_implementation,
        transformers.PreTrainedModel.set_attn_implementation,
        transformers.PreTrainedModel.post_init,
        transformers.masking_utils._preprocess_mask_arguments,
    ]


def test_registering_again_changes_nothing():
    before = what_is_replaced()
    st.register()
    assert what_is_replaced() == before


def test_each_name_has_its_function_and_mask():
    x = torch.randn(1, 2, 5, 8)
    layer = torch.nn.Linear(1, 1)
    for name, norm in NORMALIZERS.items():
        function = AttentionInterface()[name]
        sink = torch.zeros(2) if norm.needs_sink else None
        want = st.attention_forward(layer, x, x, x, None, normalizer=norm, s_aux=sink)[0]
        assert torch.equal(function(layer, x, x, x, None, s_aux=sink)[0], want)
        assert function.__name__ == f"{name}_attention_forward"
        assert AttentionMaskInterface()[name] is attention_mask


def test_the_model_type_is_known_to_the_auto_classes():
    config = transformers.AutoConfig.for_model("softpick_llama", **TINY, num_labels=3)
    assert type(config) is st.SoftpickLlamaConfig
    for auto, kind in (
        (transformers.AutoModel, st.SoftpickLlamaModel),
        (AutoModelForCausalLM, st.SoftpickLlamaForCausalLM),
        (transformers.AutoModelForSequenceClassification, st.SoftpickLlamaForSequenceClassification),
    ):
        assert type(auto.from_config(config)) is kind


def test_continuous_batching_knows_whose_function_needs_no_mask():
    config = transformers.LlamaConfig(**TINY)
    for name in ("eager", "sdpa", "flash_attention_2", *NORMALIZERS):
        config._attn_implementation = name
        assert initialization.is_flash_attention_requested(config) is (name not in ("eager", "sdpa"))


# ---------------------------------------------------------------------------------------------------------------------
# Configurations


def test_the_normalizer_of_a_model():
    bert = {**PART, "vocab_size": 20}
    pair = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**bert), transformers.BertConfig(**bert)
    )
    pair.encoder._attn_implementation, pair.decoder._attn_implementation = "rectified", "softpick"
    assert st.normalizer_of(pair) == "softpick"
    pair.encoder._attn_implementation, pair.decoder._attn_implementation = "softpick", "eager"
    assert st.normalizer_of(pair) == "softmax"
    assert st.normalizer_of(clip("relu_softpick")) == "relu_softpick"
    ours = st.SoftpickLlamaConfig(**TINY, normalizer="rectified")
    assert st.normalizer_of(ours) == "rectified"
    ours._attn_implementation = "relu_softpick"
    assert st.normalizer_of(ours) == "relu_softpick"
    for name in (None, "eager", "sdpa", "paged|eager", "flash_attention_3", "flex_attention"):
        for config, normalizer in (
            (transformers.GptOssConfig(), "learned_sink"),
            (transformers.LlamaConfig(), "softmax"),
        ):
            config._attn_implementation = name
            assert st.normalizer_of(config) == normalizer
    config._attn_implementation = "somebody's"
    with pytest.raises(
        ValueError, match='cannot tell the normalizer of attn_implementation="somebody\'s"; expected eager'
    ):
        st.normalizer_of(config)
    for wrong in ("softpick", None, torch.nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="config_or_model: expected a transformers model or configuration, got "):
            st.normalizer_of(wrong)


def test_configurations_remember_what_is_ours_and_nothing_else(tmp_path):
    keys = ("attn_implementation", "softpick_normalizer")
    for name in ("sdpa", "eager", None, "softpick", "softmax", "relu_softpick"):
        config = transformers.LlamaConfig(**TINY, softpick_normalizer="rectified")  # of an earlier choice
        config._attn_implementation = name
        saved = config.to_dict()
        ours = name in NORMALIZERS
        assert [saved.get(key, "absent") for key in keys] == [name if ours else "absent"] * 2
        again = transformers.LlamaConfig.from_dict(saved)
        assert again._attn_implementation == (name if ours else None)
        config.save_pretrained(tmp_path)
        kind = json.loads((tmp_path / "config.json").read_text())["model_type"]
        assert (kind == "llama") is (name in ("sdpa", "eager", None, "softmax"))
        assert transformers.AutoConfig.from_pretrained(tmp_path)._attn_implementation == again._attn_implementation


def test_configurations_of_several_parts_remember_each():
    config = clip().config
    for choice, saved in (
        ("softpick", "softpick"),
        ({"": "softpick", "text_config": "softpick", "vision_config": "softpick"}, "softpick"),
        ("sdpa", None),
        (
            {"": "sdpa", "text_config": "softpick", "vision_config": "sdpa"},
            {"": None, "text_config": "softpick", "vision_config": None},
        ),
        (
            {"": "softpick", "text_config": "softpick", "vision_config": "rectified"},
            {"": "softpick", "text_config": "softpick", "vision_config": "rectified"},
        ),
    ):
        config._attn_implementation = choice
        assert config.to_dict().get("attn_implementation") == saved
        again = transformers.CLIPConfig.from_dict(json.loads(config.to_json_string()))
        for part in ("text_config", "vision_config"):
            name = getattr(config, part)._attn_implementation
            assert getattr(again, part)._attn_implementation == (name if name in NORMALIZERS else None)


class LaterConfig(PreTrainedConfig):
    model_type = "later"


@pytest.mark.parametrize(
    "kind", [transformers.LlamaConfig, transformers.BertConfig, st.SoftpickLlamaConfig, PreTrainedConfig, LaterConfig]
)
def test_attentions_beside_an_implementation(kind):
    """Beside ours, as beside eager; beside others transformers' own error, when they are set and when all is checked."""
    for name in ("softpick", "softmax", "eager"):
        config = kind(attn_implementation=name)
        assert not config.output_attentions
        for value in (True, False, True):
            config.output_attentions = value
            assert config.output_attentions is value
            config.validate_output_attentions()
        getattr(config, "validate", bool)()
        again = kind.from_dict(config.to_dict())
        assert again.output_attentions is True
        assert kind(attn_implementation=name, output_attentions=True).output_attentions is True
    config._attn_implementation = "softpick"
    getattr(config, "validate", bool)()
    unchosen = kind()
    unchosen.output_attentions = True  # transformers chooses eager then
    assert unchosen._attn_implementation == "eager"
    other = kind(attn_implementation="sdpa")
    other.output_attentions = False
    with pytest.raises(ValueError, match="`output_attentions` attribute is not supported"):
        other.output_attentions = True
    other._output_attentions = True
    with pytest.raises(ValueError, match="`output_attentions` attribute is not supported"):
        other.validate_output_attentions()
    if hasattr(other, "validate"):
        with pytest.raises(Exception, match="`output_attentions` attribute is not supported"):
            other.validate()


def test_what_else_is_checked_of_a_configuration_still_is():
    for kind in (transformers.LlamaConfig, transformers.BertConfig, PreTrainedConfig):
        names = [method.__name__ for method in vars(kind).get("__class_validators__", [])]
        assert len(names) == len(set(names))
    with pytest.raises(Exception, match="hidden size"):
        transformers.LlamaConfig(hidden_size=33, num_attention_heads=4)


# ---------------------------------------------------------------------------------------------------------------------
# Models


def test_layers_are_looked_at_when_they_are_built():
    """A vision tower that pools with torch's own attention."""
    config = transformers.SiglipVisionConfig(**PART, image_size=8, patch_size=4)
    kind = transformers.SiglipVisionModel
    with pytest.raises(ValueError, match=r"MultiheadAttention\) of Siglip\w+ does not use transformers'"):
        kind._from_config(config, attn_implementation="softpick")
    for name in ("eager", "sdpa", "softmax"):  # which it computes
        assert of(kind._from_config(config, attn_implementation=name))["SiglipVisionModel"] == name
    model = kind._from_config(config, attn_implementation="eager")
    before = of(model)
    with pytest.raises(ValueError, match=r"MultiheadAttention\) of Siglip\w+ does not use transformers'"):
        model.set_attn_implementation("softpick")
    assert of(model) == before


@pytest.mark.parametrize("name", ["softpick", "eager"])
def test_models_are_finished_by_transformers(name):
    config = transformers.LlamaConfig(**TINY, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=name)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_names_that_nobody_registered_are_refused_as_before():
    with pytest.raises(ValueError, match="sofpick"):
        llama("sofpick")
    model = llama("softpick")
    with pytest.raises(ValueError, match="sofpick"):
        model.set_attn_implementation("sofpick")
    assert set(of(model).values()) == {"softpick"}


def test_a_saved_normalizer_comes_before_the_default():
    config = transformers.LlamaConfig(**TINY, softpick_normalizer="rectified")
    model = AutoModelForCausalLM.from_config(config)
    assert model.get_correct_attn_implementation(None) == "rectified"
    assert model.get_correct_attn_implementation("eager") == "eager"
    assert model.get_correct_attn_implementation("softpick") == "softpick"
    assert llama("sdpa").get_correct_attn_implementation(None) == "sdpa"


def only_itself(self, name):
    """``set_attn_implementation`` of transformers before 5.20, which leaves out parts with copies of the configuration."""
    self.config._attn_implementation_internal = self.get_correct_attn_implementation(name)


def test_parts_with_a_copy_of_the_configuration_follow():
    """To one of ours and back, not between two of transformers' own: those are its business."""
    model = transformers.T5ForConditionalGeneration._from_config(
        transformers.T5Config(**T5), attn_implementation="eager"
    )
    assert len({id(part.config) for part in (model, model.encoder, model.decoder)}) == 3
    setter = st._in_every_part(only_itself)
    for name in ("softpick", "relu_softpick", "sdpa"):
        setter(model, name)
        assert set(of(model).values()) == {name}
        assert {part.config._attn_implementation for part in (model.encoder, model.decoder)} == {name}
    setter(model, "eager")
    assert model.config._attn_implementation == "eager"
    assert {part.config._attn_implementation for part in (model.encoder, model.decoder)} == {"sdpa"}


def test_parts_of_other_kinds_keep_what_was_chosen_for_them():
    model = clip()
    for choice in (
        {"": "eager", "text_config": "softpick", "vision_config": "sdpa"},
        {"": "softpick", "text_config": "relu_softpick", "vision_config": "eager"},
        {"": "softpick", "text_config": "eager", "vision_config": "rectified"},
    ):
        model.set_attn_implementation(choice)
        config = model.config
        found = {"": config._attn_implementation}
        found |= {part: getattr(config, part)._attn_implementation for part in ("text_config", "vision_config")}
        assert found == choice
    st._in_every_part(only_itself)(model, "linear_softpick")
    assert model.config._attn_implementation == "linear_softpick"
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "rectified"


@pytest.mark.parametrize("error", [ValueError, KeyError])
def test_a_change_that_fails_in_the_middle_leaves_every_part_as_it_was(error):
    def fails(self, name, *args, **kwargs):
        assert (args, kwargs) == ((1,), {"more": 2})
        self.config._attn_implementation_internal = name
        self.config.text_config._attn_implementation_internal = name
        raise error("in the middle")

    model = clip("rectified")
    before = of(model)
    with pytest.raises(error, match="in the middle"):
        st._in_every_part(fails)(model, "softpick", 1, more=2)
    assert of(model) == before


@pytest.mark.parametrize("name", ["softpick", "eager", "sdpa"])
def test_calls_of_one_model_are_intercepted(name):
    """With what it asked for at hand; another model computes as before, also while the first is watched."""
    mine, other = llama(name), llama(name)
    ids = torch.randint(3, 20, (1, 5))
    with torch.no_grad():
        before = mine(ids).logits, other(ids).logits
    asked, called = [], []

    def around(implementation, function, default):
        asked.append((implementation, function, default))

        def instead(module, *args, **kwargs):
            called.append(module)
            out, weights = function(module, *args, **kwargs)
            return 2 * out, weights

        return instead

    eager = transformers.models.llama.modeling_llama.eager_attention_forward
    function = eager if name == "eager" else AttentionInterface()[name]
    found = AttentionInterface.get_interface
    with torch.no_grad(), st.intercept_attention(mine, around):
        changed = mine(ids).logits
        assert called == [mine.model.layers[0].self_attn]
        assert torch.equal(other(ids).logits, before[1])
        assert called == [mine.model.layers[0].self_attn]
    assert (changed - before[0]).abs().max() > 1e-6
    assert asked == [(name, function, eager)] * 2
    assert AttentionInterface.get_interface is found
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, before[0])


def test_layers_that_name_no_implementation_ask_for_eager():
    asked = []
    layer = torch.nn.Linear(1, 1)
    with st.intercept_attention(layer, lambda *given: asked.append(given) or (lambda *args, **kwargs: (args, kwargs))):
        found = AttentionInterface().get_interface(None, min)
        assert found(layer, 3, more=2) == ((layer, 3), {"more": 2})
        assert found(2, 1) == 1  # of no module of that model: what was asked for
    assert asked == [("eager", min, min)]


def test_an_error_ends_the_interception():
    found = AttentionInterface.get_interface

    def run():
        with st.intercept_attention(torch.nn.Linear(1, 1), lambda *given: given[1]):
            assert AttentionInterface.get_interface is not found
            AttentionInterface().get_interface("nobody's", min)

    with pytest.raises(KeyError):
        run()
    assert AttentionInterface.get_interface is found
