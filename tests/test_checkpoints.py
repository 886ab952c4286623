"""Saved models that run one of our normalizers: refused by whoever does not know us, and unchanged for whoever does."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig  # noqa: E402

from softpick.integrations import checkpoints  # noqa: E402
from softpick.integrations.transformers import SoftpickLlamaConfig, normalizer_of  # noqa: E402

SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {"intermediate_size": 48, **SMALL}),
    "gpt2": (transformers.GPT2Config, {"vocab_size": 60, "n_embd": 32, "n_layer": 1, "n_head": 4}),
    "qwen3": (transformers.Qwen3Config, {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, **SMALL}),
    "bert": (transformers.BertConfig, {"intermediate_size": 48, **SMALL}),
}
IDS = torch.arange(1, 9)[None]


def build(family, implementation):
    kind, fields = FAMILIES[family]
    auto = AutoModel if family == "bert" else AutoModelForCausalLM
    torch.manual_seed(0)
    return auto.from_config(kind(**fields), attn_implementation=implementation).eval(), auto


def saved(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("normalizer", ["softpick", "relu_softpick", "softmax_plus_one"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_under_names_that_nobody_else_knows(family, normalizer, tmp_path):
    model, auto = build(family, normalizer)
    model.save_pretrained(tmp_path)
    config = saved(tmp_path)
    assert config["model_type"] == family + checkpoints.MARK
    assert config["architectures"] == [type(model).__name__ + checkpoints.MARK]
    assert config["attn_implementation"] == normalizer

    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert type(loaded).from_pretrained(tmp_path).config.model_type == family
    assert normalizer_of(loaded) == normalizer
    with torch.no_grad():
        assert torch.equal(loaded(IDS)[0], model(IDS)[0])
    # an engine that imports us reads the configuration this way, and chooses its own code by this entry
    assert AutoConfig.from_pretrained(tmp_path).architectures == config["architectures"]
    loaded.save_pretrained(tmp_path / "again")
    assert saved(tmp_path / "again") == config


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_switched_back_to_softmax_is_saved_as_what_it_is(family, tmp_path):
    build(family, "sdpa")[0].save_pretrained(tmp_path / "plain")
    model, auto = build(family, "softpick")
    model.save_pretrained(tmp_path / "ours")
    for implementation in ("sdpa", "softmax"):
        loaded = auto.from_pretrained(tmp_path / "ours")
        loaded.set_attn_implementation(implementation)
        loaded.save_pretrained(tmp_path / implementation)
        loaded.config.save_pretrained(
            tmp_path / f"{implementation}-config"
        )  # without the model, which sets architectures
        for folder in (implementation, f"{implementation}-config"):
            config, plain = saved(tmp_path / folder), saved(tmp_path / "plain")
            assert (config["model_type"], config["architectures"]) == (plain["model_type"], plain["architectures"])


def test_checkpoints_of_earlier_versions_load(tmp_path):
    model, auto = build("llama", "softpick")
    model.save_pretrained(tmp_path)
    old = checkpoints.unmarked(saved(tmp_path), architectures=True)  # what 0.1.0 wrote
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert normalizer_of(auto.from_pretrained(tmp_path)) == "softpick"


def test_what_needs_no_mark_has_none(tmp_path):
    SoftpickLlamaConfig(normalizer="softpick").save_pretrained(tmp_path)  # a model type of our own
    assert saved(tmp_path)["model_type"] == "softpick_llama"
    plain = transformers.LlamaConfig(architectures=["LlamaForCausalLM"])
    plain.save_pretrained(tmp_path)
    assert saved(tmp_path)["model_type"] == "llama"
    # gpt-oss computes learned_sink in every engine that has it
    entries = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "attn_implementation": "learned_sink"}
    assert checkpoints.marked(entries) == entries
    assert checkpoints.marked({**entries, "model_type": "llama"})["model_type"] == "llama" + checkpoints.MARK


def test_a_part_of_a_composite_model_marks_the_whole():
    entries = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    parts = {"": None, "text_config": "softpick", "vision_config": None}
    entries["text_config"] = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    result = checkpoints.marked({**entries, "attn_implementation": parts})
    assert result["model_type"] == "gemma3" + checkpoints.MARK
    # llama.cpp's converter reads this one
    assert result["text_config"]["architectures"] == ["Gemma3ForCausalLM" + checkpoints.MARK]
    assert checkpoints.marked(result) == result
    assert checkpoints.unmarked(result, architectures=True) == {**entries, "attn_implementation": parts}
    assert (
        checkpoints.marked({**entries, "attn_implementation": {"": "softmax", "text_config": None}})["model_type"]
        == "gemma3"
    )


@pytest.mark.thinned(every=3)
@pytest.mark.parametrize("argument", ["", ", attn_implementation=None", ", attn_implementation='sdpa'"])
def test_transformers_without_softpick_refuses(argument, tmp_path):
    build("llama", "softpick")[0].save_pretrained(tmp_path)
    code = f"import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}{argument})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "llama_with_softpick" in result.stderr.splitlines()[-1] or "llama_with_softpick" in result.stderr


OURS_ALONE = [{"normalizer": name} for name in ("softpick", "learned_sink", "softmax")]
OURS_ALONE += [{"output_gate": True}, {"score_scale": True}]


@pytest.mark.parametrize("argument", [{}, {"attn_implementation": None}])
@pytest.mark.parametrize("fields", OURS_ALONE, ids=str)
def test_the_llama_of_others_does_not_take_ours(fields, argument, tmp_path):
    """Its class would find all weights but those of gate, scale and sinks, and run softmax."""
    torch.manual_seed(0)
    config = SoftpickLlamaConfig(intermediate_size=48, **SMALL, **fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="softpick_llama"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, **argument)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **argument)
    assert (type(loaded), loaded.config._attn_implementation) == (type(model), config.normalizer)
    with torch.no_grad():
        assert torch.equal(loaded(IDS)[0], model(IDS)[0])
    old = saved(tmp_path)  # without these entries, as 0.1.0 wrote it
    for entry in ("attn_implementation", "softpick_normalizer"):
        assert old.pop(entry) == "softpick_llama"
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.to_dict() == loaded.config.to_dict()


@pytest.mark.parametrize("ours", ["llama", "softpick_llama"])
def test_the_llama_of_transformers_without_softpick_refuses_ours(ours, tmp_path):
    if ours == "llama":
        build("llama", "softpick")[0].save_pretrained(tmp_path)
    else:
        config = SoftpickLlamaConfig(intermediate_size=48, **SMALL)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    code = f"import transformers; transformers.LlamaForCausalLM.from_pretrained({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "attn_implementation" in result.stderr


def test_the_choice_of_a_part_of_a_part_marks_the_whole(tmp_path):
    config = AutoConfig.for_model("qwen2_5_omni")
    config.thinker_config.text_config._attn_implementation = "softpick"
    config.save_pretrained(tmp_path)
    assert saved(tmp_path)["model_type"] == "qwen2_5_omni" + checkpoints.MARK
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.thinker_config.text_config._attn_implementation == "softpick"
    assert loaded.thinker_config.vision_config._attn_implementation is None


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("names", [("sdpa", "softpick"), ("softpick", "sdpa"), ("softpick", "rectified")])
def test_a_part_whose_choice_would_be_lost_is_not_saved(part, names, tmp_path):
    """Encoder and decoder of T5 have copies of the configuration, of which none is saved."""
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    model.set_attn_implementation(names[0])
    model.save_pretrained(tmp_path / "before")
    getattr(model, part).set_attn_implementation(names[1])
    with pytest.raises(ValueError, match=f"{part}: runs attn_implementation='{names[1]}', but .* '{names[0]}'"):
        model.save_pretrained(tmp_path / "after")
    assert not (tmp_path / "after").exists()
    model.set_attn_implementation(names[1])
    model.save_pretrained(tmp_path / "after")
    loaded = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "after")
    assert getattr(loaded, part).config._attn_implementation == names[1]


def test_the_trainer_saves_marked_checkpoints(tmp_path):
    pytest.importorskip("accelerate")
    model, auto = build("llama", "softpick")
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    transformers.Trainer(model, arguments, train_dataset=data).train()
    assert saved(tmp_path / "checkpoint-1")["model_type"] == "llama" + checkpoints.MARK
    assert normalizer_of(auto.from_pretrained(tmp_path / "checkpoint-1")) == "softpick"


@pytest.mark.long
def test_the_hub_gets_marked_checkpoints(monkeypatch):
    """``push_to_hub`` of a model saves it into a folder and uploads that."""
    hub, seen = transformers.utils.hub, []
    made = SimpleNamespace(repo_id="somebody/model")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: made)
    if hasattr(hub, "create_repo"):
        monkeypatch.setattr(hub, "create_repo", lambda *_, **__: made)
    monkeypatch.setattr(
        hub.PushToHubMixin, "_upload_modified_files", lambda self, folder, *_, **__: seen.append(saved(Path(folder)))
    )
    build("llama", "softpick")[0].push_to_hub("somebody/model")
    assert [config["model_type"] for config in seen] == ["llama" + checkpoints.MARK]
    assert seen[0]["architectures"] == ["LlamaForCausalLM" + checkpoints.MARK]


def test_a_merged_adapter_is_saved_marked(tmp_path):
    peft = pytest.importorskip("peft")
    model, auto = build("llama", "softpick")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    merged = peft.get_peft_model(model, lora).merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert saved(tmp_path)["model_type"] == "llama" + checkpoints.MARK
    loaded = auto.from_pretrained(tmp_path)
    assert normalizer_of(loaded) == "softpick"
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS)[0], merged(IDS)[0])


ADAPTERS = {
    "LoraConfig": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "IA3Config": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "PromptTuningConfig": {"num_virtual_tokens": 3},
    "PrefixTuningConfig": {"num_virtual_tokens": 3},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_leave_the_normalizer(tmp_path, adapter):
    """No softmax is computed, saving and loading give the same, and the cache is that of a model without one."""
    peft = pytest.importorskip("peft")
    config = getattr(peft, adapter)(task_type="CAUSAL_LM", **ADAPTERS[adapter])
    model, auto = build("llama", "softpick")
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, config).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        want = adapted(input_ids=IDS).logits
    assert not any("softmax" in name or "scaled_dot" in name for name in seen)
    assert normalizer_of(adapted) == "softpick"
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, want)
        tokens = loaded.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
        grown = IDS
        for _ in range(3):
            logits = loaded(input_ids=grown, use_cache=False).logits
            grown = torch.cat([grown, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(tokens, grown)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    build("llama", "softpick")[0].config.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    monkeypatch.setattr(checkpoints, "marked", lambda config: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build("llama", "relu_softpick")[0].config.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_bytes() == before


def test_the_patched_functions_are_those_that_read_and_write():
    """If transformers moves the reading or writing of configurations, the marks have to move, too."""
    import inspect

    write, read = PreTrainedConfig.to_json_file, PreTrainedConfig._dict_from_json_file.__func__
    assert "to_json_string" in inspect.getsource(inspect.unwrap(write))
    assert "json.loads" in inspect.getsource(inspect.unwrap(read))
    assert "to_json_file" in inspect.getsource(PreTrainedConfig.save_pretrained)
    assert "_dict_from_json_file" in inspect.getsource(PreTrainedConfig._get_config_dict)
    assert "_dict_from_json_file" in inspect.getsource(PreTrainedConfig.from_json_file)
    assert "from_dict" in inspect.getsource(PreTrainedConfig.from_pretrained)


@pytest.mark.parametrize("normalizer", ["softpick", "relu_softpick"])
@pytest.mark.parametrize("how", ["from_dict", "from_dict with more", "for_model"])
def test_entries_that_somebody_else_has_read(how, normalizer, tmp_path):
    model, _ = build("llama", normalizer)
    model.save_pretrained(tmp_path)
    entries = saved(tmp_path)
    before = json.loads(json.dumps(entries))
    if how == "for_model":
        config = transformers.AutoConfig.for_model(**entries)
    elif how == "from_dict":
        config = transformers.LlamaConfig.from_dict(entries)
    else:
        config, rest = transformers.LlamaConfig.from_dict(entries, return_unused_kwargs=True, nothing=1)
        assert rest == {"nothing": 1}
    assert config.model_type == "llama"
    assert normalizer_of(config) == normalizer
    assert entries == before
    with pytest.raises(ValueError, match="Unrecognized model identifier: nothing"):
        transformers.AutoConfig.for_model("nothing")
