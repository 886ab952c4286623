"""What rounding costs: every figure a second time by explicit loops, and the lists of layers in other libraries' hands."""

import importlib.util
import json
import math
import re

import pytest
import torch

pytest.importorskip("transformers")

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from softpick.analysis import sensitivity
from softpick.analysis.keep_files import keep_file_names, keep_files
from softpick.analysis.sensitivity import REMEDIES, SCHEMES, cost, group_of, ignore_lists, rounded
from softpick.experiment.models import Subject
from softpick.experiment.progress import Silent
from softpick.experiment.rounding import inner_layers

BY_NAME = {scheme.name: scheme for scheme in SCHEMES}


def llama(**more):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "initializer_range": 0.4, "bos_token_id": 1,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**(shape | more))).eval()
    model.model.layers[0].input_layernorm.weight.data[3] = 60.0  # an outlier channel
    return model


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=2)).eval()


def tokens(n=3, t=12):
    return torch.randint(3, 50, (n, t), generator=torch.Generator().manual_seed(1))


def by_hand(x, largest_number, largest, integer=True):
    """One number at a time would be slow; one scale at a time."""
    scale = largest / largest_number
    return torch.round(x / scale).clamp(-largest_number, largest_number) * scale


@pytest.mark.parametrize("make", [llama, gpt2])
def test_rounded_layers_by_hand(make):
    """int8 with one scale per tensor and per token, int4 in groups: the layer's output from loops over rows and groups."""
    model, ids = make(), tokens()
    layers = inner_layers(model)
    seen = sensitivity._watch_inputs(model, layers, [{"input_ids": ids}])
    name = next(n for n in layers if "mlp" in n)
    module = layers[name]
    x = torch.randn(2, 5, sensitivity._matrix(module).shape[1])
    weight, bias = sensitivity._matrix(module).clone(), getattr(module, "bias", None)
    width = x.shape[-1]
    group = max(g for g in range(1, 65) if width % g == 0)
    for scheme in ("int8-tensor", "int8-token", "int4-group", "int4-weights"):
        grouped = scheme.startswith("int4")
        top = 7 if grouped else 127
        w = torch.empty_like(weight)
        for o in range(len(weight)):
            for g in range(0, width, group if grouped else width):
                part = slice(g, g + (group if grouped else width))
                w[o, part] = by_hand(weight[o, part], top, weight[o, part].abs().max())
        inputs = torch.empty_like(x)
        for b in range(2):
            for i in range(5):
                if scheme == "int8-tensor":
                    inputs[b, i] = by_hand(x[b, i], 127, seen[name].largest)
                elif scheme == "int8-token":
                    inputs[b, i] = by_hand(x[b, i], 127, x[b, i].abs().max())
                elif scheme == "int4-group":
                    for g in range(0, width, group):
                        inputs[b, i, g : g + group] = by_hand(
                            x[b, i, g : g + group], 7, x[b, i, g : g + group].abs().max()
                        )
                else:
                    inputs[b, i] = x[b, i]
        want = inputs @ w.T + (0 if bias is None else bias)
        before = module.weight.data.clone()
        with torch.no_grad(), rounded({name: module}, BY_NAME[scheme], seen):
            torch.testing.assert_close(module(x), want, rtol=1e-5, atol=1e-5)
        assert torch.equal(module.weight.data, before)
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("remedy", REMEDIES)
def test_a_remedy_changes_nothing_without_rounding(remedy, monkeypatch):
    """Smoothing and rotation are exact but for the rounding, and do not change the function."""
    monkeypatch.setattr(sensitivity, "round_to", lambda x, fmt, largest: x)
    model, ids = llama(), tokens()
    layers = inner_layers(model)
    seen = sensitivity._watch_inputs(model, layers, [{"input_ids": ids}])
    with torch.no_grad():
        want = model(ids).logits
        with rounded(layers, BY_NAME["int8-tensor"], seen, remedy):
            torch.testing.assert_close(model(ids).logits, want, rtol=1e-3, atol=1e-3)


def test_hadamard_is_its_own_inverse_and_spreads():
    x = torch.zeros(2, 24)
    x[:, 3] = 8.0
    y = sensitivity._hadamard(x)
    assert float(y.abs().max()) == pytest.approx(8 / math.sqrt(8))  # 24 = 3 blocks of 8
    torch.testing.assert_close(sensitivity._hadamard(y), x)
    h = sensitivity._hadamard(torch.eye(16))
    torch.testing.assert_close(h @ h.T, torch.eye(16))


def test_prefix_leaves_the_first_token():
    model, ids = llama(), tokens()
    layers = inner_layers(model)
    seen = sensitivity._watch_inputs(model, layers, [{"input_ids": ids}])
    name = "model.layers.0.mlp.down_proj"
    _, change = sensitivity._rounder(layers[name], BY_NAME["int4-tensor"], seen[name], "prefix")
    x = torch.randn(2, 6, 40)
    x[:, 0] *= 100
    y = change(x)
    assert torch.equal(y[:, 0], x[:, 0])
    torch.testing.assert_close(y[:, 1:], by_hand(x[:, 1:], 7, seen[name].rest))


def loss_of(model, ids):
    with torch.no_grad():
        logits = model(ids).logits[:, 1:-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten())


def test_cost_of_a_model():
    model, ids = llama(), tokens()
    subject = Subject("a/model", model, None, causal=True)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = cost(subject, [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}], Silent())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    base = loss_of(model, ids)
    assert found["perplexity"] == pytest.approx(float(base.exp()), rel=1e-4)
    assert [s["name"] for s in found["schemes"]] == [s.name for s in SCHEMES]
    layers = inner_layers(model)
    seen = sensitivity._watch_inputs(model, layers, [{"input_ids": ids}])

    def change(scheme, names):
        with rounded({n: layers[n] for n in names}, BY_NAME[scheme], seen):
            return 100 * math.expm1(float(loss_of(model, ids) - base))

    def errors(scheme):
        """The standard error of the change, token by token."""

        def each():
            with torch.no_grad():
                steps = model(input_ids=ids).logits.log_softmax(-1)
            return [-float(steps[b, t - 1, ids[b, t]]) for b in range(len(ids)) for t in range(2, ids.shape[1])]

        before = each()
        with rounded(layers, BY_NAME[scheme], seen):
            differences = [a - b for a, b in zip(each(), before, strict=True)]
        n = len(differences)
        mean = sum(differences) / n
        return 100 * math.exp(mean) * math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)

    for scheme in found["schemes"][:3]:
        assert scheme["error_percent"] == pytest.approx(errors(scheme["name"]), rel=2e-2)
    for scheme in found["schemes"]:
        assert scheme["change_percent"] == pytest.approx(change(scheme["name"], layers), rel=2e-3, abs=2e-3)
    assert {k["scheme"] for k in found["keep"]} == {
        s["name"]
        for s in found["schemes"]
        if max(sensitivity.WORTH, 2 * s["error_percent"]) < s["change_percent"] < sensitivity.HOPELESS
    }
    for keep in found["keep"]:
        ranked = sorted(found["layers"], key=lambda layer: -layer["schemes"][keep["scheme"]]["estimate_percent"])
        for step in keep["steps"]:
            rest = {x["name"] for x in found["layers"]} - {x["name"] for x in ranked[: step["kept"]]}
            assert step["change_percent"] == pytest.approx(change(keep["scheme"], rest), rel=2e-3, abs=2e-3)
        assert keep["names"] == [x["name"] for x in ranked[: keep["kept"]]]
    top = max(found["layers"], key=lambda layer: layer["schemes"]["int4-token"]["estimate_percent"])
    if "measured_percent" in top["schemes"]["int4-token"]:
        assert top["schemes"]["int4-token"]["measured_percent"] == pytest.approx(
            change("int4-token", [top["name"]]), rel=2e-3, abs=2e-3
        )


def test_sqnr_and_estimate_by_hand():
    """SQNR from the layer's own outputs; the estimate from gradients of the summed loss, token by token."""
    model, ids = llama(), tokens(2, 9)
    subject = Subject("a/model", model, None, causal=True)
    found = {layer["name"]: layer for layer in cost(subject, [{"input_ids": ids}], Silent())["layers"]}
    layers = inner_layers(model)
    seen = sensitivity._watch_inputs(model, layers, [{"input_ids": ids}])
    name = "model.layers.1.self_attn.v_proj"
    kept = {}

    def hook(module, inputs, output):
        output.retain_grad()
        kept["x"], kept["y"] = inputs[0].detach(), output

    handle = layers[name].register_forward_hook(hook)
    logits = model(ids).logits[:, 1:-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten(), reduction="sum").backward()
    handle.remove()
    for scheme in ("int4-tensor", "fp8-group"):
        with torch.no_grad(), rounded({name: layers[name]}, BY_NAME[scheme], seen):
            error = layers[name](kept["x"]) - kept["y"]
        noise = float(error.square().sum())
        figures = found[name]["schemes"][scheme]
        assert figures["sqnr_db"] == pytest.approx(
            10 * math.log10(float(kept["y"].detach().square().sum()) / noise), abs=1e-2
        )
        each = [float(kept["y"].grad[b, t] @ error[b, t].detach()) ** 2 for b in range(2) for t in range(9)]
        assert figures["estimate_percent"] == pytest.approx(100 * math.expm1(0.5 * sum(each) / 14), rel=1e-2)


def test_groups_fit_the_width():
    assert [group_of(n) for n in (64, 576, 176, 24, 97)] == [64, 64, 44, 24, 1]
    found = cost(Subject("m", llama(), None, causal=True), [{"input_ids": tokens(1, 8)}], Silent())
    assert "Groups have 24, 40 channels, to fit the widths." in found["approximations"]


NAMES = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"]


def test_lists_for_other_libraries():
    lists = ignore_lists(NAMES, "lm_head")
    assert lists["llm-compressor"] == [*NAMES, "lm_head"]
    patterns = [key.removeprefix("-:") for key in lists["gptqmodel"]]
    every = [*inner_layers(llama()), "model.layers.0.mlp.down_proj2", "model.layers.10.mlp.down_proj"]
    assert [n for n in every if any(re.match(p, n) for p in patterns)] == NAMES


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_torchao_leaves_the_layers(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    llama().save_pretrained(tmp_path)
    lists = ignore_lists(NAMES, "lm_head")
    config = TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=lists["torchao"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    plain = {
        n
        for n, m in inner_layers(model).items()
        if type(m.weight.data) is torch.Tensor or type(m.weight) is torch.nn.Parameter
    }
    assert plain == set(NAMES)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_leaves_the_layers(tmp_path, bits):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    llama(hidden_size=32, intermediate_size=64).save_pretrained(tmp_path)
    lists = ignore_lists(NAMES, "lm_head")
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=lists["bitsandbytes"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    plain = {n for n, m in inner_layers(model).items() if type(m) is torch.nn.Linear}
    assert plain == set(NAMES)


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="needs gptqmodel")
def test_gptqmodel_leaves_the_layers():
    from gptqmodel import QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=8, dynamic=ignore_lists(NAMES)["gptqmodel"])
    skipped = [n for n in inner_layers(llama()) if config.dynamic_get(layer_name=n) is False]
    assert skipped == NAMES


def audited(scheme):
    lists = ignore_lists(NAMES, "lm_head")
    layers = [{"name": name, "group": 64} for name in (*NAMES, "another")]
    keep = [{"scheme": scheme, "kept": 2, "names": NAMES, "ignore": lists}]
    return [{"cost": {"keep": keep, "layers": layers}}, {"part": "no cost"}]


def test_the_recipe_has_the_groups_of_each_width():
    """A width that 64 does not divide has smaller groups in the simulation, so in the recipe too."""
    runs = audited("int4-weights")
    runs[0]["cost"]["layers"].append({"name": "narrow", "group": 32})
    recipe = json.loads(keep_files(runs)["keep-int4-weights.llm-compressor.yaml"])
    groups = recipe["default_stage"]["default_modifiers"]["QuantizationModifier"]["config_groups"].values()
    assert {tuple(g["targets"]): g["weights"]["group_size"] for g in groups} == {("narrow",): 32, ("another",): 64}


@pytest.mark.parametrize("scheme", BY_NAME)
def test_files_of_kept_layers(scheme, tmp_path):
    """One file a library that computes with the scheme; nothing where no layer is kept."""
    files = keep_files(audited(scheme))
    assert set(files) <= set(keep_file_names())
    assert {name.partition(".")[0] for name in files} <= {f"keep-{scheme}"}
    assert bool(files) is not scheme.endswith("-group")
    for text in files.values():
        plain = json.dumps(json.loads(text)).replace("\\\\", "")  # GPTQModel's are patterns
        assert all(name in plain for name in NAMES)
    nothing = [{"cost": {"keep": [{"scheme": scheme, "kept": 0, "names": []}], "layers": []}}]
    assert keep_files(nothing) == {}
    twice = keep_files([*audited(scheme), *audited(scheme)])
    assert set(twice) <= set(keep_file_names(2))
    assert len(twice) == 2 * len(files)


def test_files_are_arguments_of_the_libraries(tmp_path):
    """What a file holds is taken by the class that it is for, and leaves the same layers as the list."""
    int8, int4 = ({n.partition(".")[2]: json.loads(t) for n, t in keep_files(audited(s)).items()}
                  for s in ("int8-token", "int4-weights"))  # fmt: skip
    assert set(int4) == {"llm-compressor.yaml", "torchao.json", "gptqmodel.json", "bitsandbytes.json"}
    from transformers import BitsAndBytesConfig, TorchAoConfig

    assert BitsAndBytesConfig(load_in_8bit=True, **int8["bitsandbytes.json"]).llm_int8_skip_modules == [
        *NAMES,
        "lm_head",
    ]
    if importlib.util.find_spec("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig(version=2), **int8["torchao.json"])
        assert config.modules_to_not_convert == [*NAMES, "lm_head"]
    if importlib.util.find_spec("gptqmodel"):
        from gptqmodel import QuantizeConfig

        config = QuantizeConfig(bits=4, group_size=8, **int4["gptqmodel.json"])
        assert [n for n in inner_layers(llama()) if config.dynamic_get(layer_name=n) is False] == NAMES


@pytest.mark.parametrize("scheme", [s.name for s in SCHEMES if s.scales != "group"])
def test_recipe_of_llm_compressor(scheme):
    """compressed-tensors takes the recipe's group, and its rounding of a weight is the scheme's."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    recipe = json.loads(keep_files(audited(scheme))[f"keep-{scheme}.llm-compressor.yaml"])
    modifier = recipe["default_stage"]["default_modifiers"]["QuantizationModifier"]
    found = quantization.QuantizationScheme.model_validate(modifier["config_groups"]["group_0"])
    assert modifier["ignore"] == [*NAMES, "lm_head"]
    wanted = BY_NAME[scheme]
    assert found.weights.num_bits == (4 if wanted.fmt == "int4" else 8)
    assert getattr(found.weights.strategy, "value", found.weights.strategy) == (
        "group" if wanted.scales == "none" else "channel"
    )
    assert (found.input_activations is None) is (wanted.scales == "none")
    if wanted.scales != "none":
        strategy = found.input_activations.strategy
        assert getattr(strategy, "value", strategy) == wanted.scales
        assert bool(found.input_activations.dynamic) is (wanted.scales == "token")
