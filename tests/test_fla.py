"""Import of flash-linear-attention's layout, against that layout's forward pass in fp64, written without our package."""

import json
import math

import oracle
import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from softpick.integrations.fla import LayoutError, import_checkpoint
from softpick.integrations.transformers import normalizer_of

FIELDS = {
    "model_type": "transformer",
    "architectures": ["TransformerForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "qkv_bias": False,
    "qk_norm": False,
    "window_size": None,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "elementwise_affine": True,
    "norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "fuse_norm": True,
    "fuse_swiglu": True,
    "fuse_cross_entropy": True,
    "vocab_size": 50,
}
CHANGES = [
    {},
    {"qkv_bias": True, "num_kv_heads": 4},
    {"tie_word_embeddings": True, "intermediate_size": 48, "rope_theta": 500.0},
    {"elementwise_affine": False, "norm_eps": 1e-3},
]
INNER = 256  # two thirds of 4 x 32, rounded up to a multiple of 256


def weights(fields):
    torch.manual_seed(0)
    d, kv = fields["hidden_size"], fields["hidden_size"] // fields["num_heads"] * fields["num_kv_heads"]
    shapes = {"model.embeddings.weight": (fields["vocab_size"], d), "model.norm.weight": (d,)}
    if not fields["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (fields["vocab_size"], d)
    for i in range(fields["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, n in (("q", d), ("k", kv), ("v", kv)):
            shapes[f"{layer}attn.{name}_proj.weight"] = (n, d)
            if fields["qkv_bias"]:
                shapes[f"{layer}attn.{name}_proj.bias"] = (n,)
        shapes[f"{layer}attn.o_proj.weight"] = (d, d)
        inner = fields["intermediate_size"] or INNER
        shapes[f"{layer}mlp.gate_proj.weight"] = shapes[f"{layer}mlp.up_proj.weight"] = (inner, d)
        shapes[f"{layer}mlp.down_proj.weight"] = (d, inner)
        shapes[f"{layer}attn_norm.weight"] = shapes[f"{layer}mlp_norm.weight"] = (d,)
    drawn = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    if not fields["elementwise_affine"]:
        drawn = {name: tensor for name, tensor in drawn.items() if "norm" not in name}
    return drawn


def rotated(x, theta):
    """Rotary positions of ``(H, T, D)``, halves of a head as pairs."""
    t, d = x.shape[-2:]
    angle = torch.arange(t).double()[:, None] * theta ** (-torch.arange(0, d, 2).double() / d)
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def logits(fields, tensors, ids, normalizer):
    w = {name: tensor.double() for name, tensor in tensors.items()}
    h, hkv, d = fields["num_heads"], fields["num_kv_heads"], fields["hidden_size"]

    def norm(x, name):
        x = x / (x.square().mean(-1, keepdim=True) + fields["norm_eps"]).sqrt()
        return x * w[name] if name in w else x

    x = w["model.embeddings.weight"][ids]
    for i in range(fields["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        y = norm(x, f"{layer}attn_norm.weight")
        q, k, v = (
            (y @ w[f"{layer}attn.{n}_proj.weight"].T + w.get(f"{layer}attn.{n}_proj.bias", 0.0))
            .view(len(ids), heads, d // h)
            .transpose(0, 1)
            for n, heads in (("q", h), ("k", hkv), ("v", hkv))
        )
        q, k = (rotated(part, fields["rope_theta"]) for part in (q, k))
        o = oracle.attention(q[None], k[None], v[None], normalizer, causal="top_left")[0][0]
        x = x + o.transpose(0, 1).reshape(len(ids), d) @ w[f"{layer}attn.o_proj.weight"].T
        y = norm(x, f"{layer}mlp_norm.weight")
        gate = y @ w[f"{layer}mlp.gate_proj.weight"].T
        y = gate * torch.sigmoid(gate) * (y @ w[f"{layer}mlp.up_proj.weight"].T)
        x = x + y @ w[f"{layer}mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w.get("lm_head.weight", w["model.embeddings.weight"]).T


def write(folder, fields, tensors, pickle=False):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "tokenizer_config.json").write_text("{}")
    if pickle:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("attention", "normalizer"),
    [("parallel_softpick_attn", "softpick"), ("naive_rectified_attn", "rectified"), ("flash_attn", "softmax")],
)
@pytest.mark.parametrize("change", CHANGES, ids=["plain", "bias", "tied", "norms-without-weight"])
def test_imported_models_have_the_same_logits(attention, normalizer, change, tmp_path):
    fields = {**FIELDS, **change, "attn_impl": attention}
    tensors = weights(fields)
    write(tmp_path / "theirs", fields, tensors, pickle="bias" in str(change))
    said = import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert normalizer_of(model) == said["normalizer"] == normalizer
    assert (tmp_path / "ours" / "tokenizer_config.json").exists()
    ids = torch.tensor([1, 7, 3, 3, 40, 11, 2, 9, 30])
    with torch.no_grad():
        got = model(ids[None]).logits[0]
    expected = logits(fields, tensors, ids, normalizer)
    assert math.isclose(float((got - expected).abs().max()), 0, abs_tol=2e-4 * float(expected.abs().max()))


@pytest.fixture
def library(monkeypatch):
    """The classes of flash-linear-attention itself; its layers want flash-attn to be there, though they do not call it here."""
    pytest.importorskip("fla.models.transformer", reason="needs flash-linear-attention", exc_type=ImportError)
    import fla.layers.attn
    from fla.models.transformer import TransformerConfig, TransformerForCausalLM

    monkeypatch.setattr(fla.layers.attn, "flash_attn_func", object())
    return TransformerConfig, TransformerForCausalLM


@pytest.mark.parametrize(
    "change", [*CHANGES, {"num_kv_heads": None, "hidden_ratio": None, "intermediate_size": None}], ids=str
)
def test_what_the_library_saves_is_imported(change, library, tmp_path):
    """Configuration, names and shapes of weights are those of the published classes, and not those written out above."""
    make, build = library
    fields = {name: value for name, value in (FIELDS | change).items() if name not in ("model_type", "architectures")}
    model = build(make(attn_impl="parallel_softpick_attn", **fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "theirs")
    saved = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert (saved["model_type"], saved["architectures"]) == ("transformer", ["TransformerForCausalLM"])
    assert set(FIELDS) <= set(saved)  # what is written out above has no field that the library lacks
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert normalizer_of(ours) == "softpick"
    tensors = model.state_dict()
    names = set(weights({**fields, "num_kv_heads": fields["num_kv_heads"] or fields["num_heads"]}))
    assert names <= set(tensors)
    ids = torch.tensor([1, 7, 3, 3, 40, 11, 2, 9, 30])
    with torch.no_grad():
        got = ours(ids[None]).logits[0]
    expected = logits(
        {**fields, "num_kv_heads": fields["num_kv_heads"] or fields["num_heads"]}, tensors, ids, "softpick"
    )
    assert math.isclose(float((got - expected).abs().max()), 0, abs_tol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("change", [{"attnres_block_size": 2}, {"qk_norm": True}, {"window_size": 8}], ids=str)
def test_what_the_library_saves_and_we_do_not_compute_is_refused(change, library, tmp_path):
    make, build = library
    fields = {name: value for name, value in (FIELDS | change).items() if name not in ("model_type", "architectures")}
    build(make(attn_impl="parallel_softpick_attn", **fields)).save_pretrained(tmp_path / "theirs")
    with pytest.raises(LayoutError, match=f"{next(iter(change))}=.* is not supported"):
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_impl": "parallel_scaled_softpick_attn"}, r"got 'parallel_scaled_softpick_attn' \(the authors' scale"),
        ({"attn_impl": "stochastic"}, "expected attn_impl to be one of flash_attn"),
        ({"model_type": "gla"}, "expected model_type 'transformer'"),
        ({"qk_norm": True}, "qk_norm=True is not supported"),
        ({"window_size": 128}, "window_size=128 is not supported"),
        ({"attnres_block_size": 4}, "attnres_block_size=4 is not supported"),
        ({"num_hidden_layers": 3}, "missing: model.layers.2"),
        ({"num_hidden_layers": 1}, "unknown: model.layers.1"),
        ({"hidden_ratio": 16}, "mlp.gate_proj.weight: expected"),
        ({"num_heads": 0}, "config.json: not the sizes of a model"),
        ({"vocab_size": "many"}, "config.json: not the sizes of a model"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(change, message, tmp_path):
    write(tmp_path / "theirs", {**FIELDS, "attn_impl": "parallel_softpick_attn", **change}, weights(FIELDS))
    with pytest.raises(LayoutError, match=message):
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("pickle", [False, True])
def test_a_tied_weight_that_is_there_twice(pickle, tmp_path):
    """PyTorch's files have it under both names."""
    fields = {**FIELDS, "attn_impl": "naive_softpick_attn", "tie_word_embeddings": True, "qk_norm": None}
    tensors = weights(fields)
    twice = {**tensors, "lm_head.weight": tensors["model.embeddings.weight"].clone()}
    write(tmp_path / "once", fields, tensors)
    write(tmp_path / "twice", fields, twice, pickle)
    models = []
    for name in ("once", "twice"):
        import_checkpoint(tmp_path / name, tmp_path / f"{name}-ours")
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-ours").state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    write(tmp_path / "other", fields, {**tensors, "lm_head.weight": torch.zeros(50, 32)}, pickle)
    with pytest.raises(LayoutError, match=r"lm_head\.weight: expected the embeddings"):
        import_checkpoint(tmp_path / "other", tmp_path / "other-ours")


@pytest.mark.parametrize("given", [None, ["softpick_attn"], 3])
def test_an_attention_that_is_no_name(given, tmp_path):
    write(tmp_path / "theirs", {**FIELDS, "attn_impl": given}, weights(FIELDS))
    with pytest.raises(LayoutError, match="expected attn_impl to be one of"):
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours")


def test_a_folder_in_use_stays_as_it_is(tmp_path):
    write(tmp_path / "theirs", {**FIELDS, "attn_impl": "naive_softpick_attn"}, weights(FIELDS))
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").write_text("mine")
    with pytest.raises(LayoutError, match="expected a new or empty folder"):
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert [file.name for file in (tmp_path / "ours").iterdir()] == ["mine.txt"]


def test_the_command(tmp_path, capsys):
    pytest.importorskip("typer")
    from softpick.cli import main

    write(tmp_path / "theirs", {**FIELDS, "attn_impl": "naive_softpick_attn"}, weights(FIELDS))
    with pytest.raises(SystemExit) as ended:
        main(["import", str(tmp_path / "theirs")])
    assert ended.value.code == 0
    folder = tmp_path / "theirs-softpick_llama"
    assert f"model: {folder}" in capsys.readouterr().out
    assert normalizer_of(AutoModelForCausalLM.from_pretrained(folder)) == "softpick"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"[1]", "config.json: expected an object, got list"),
        ("config.json", b"{", "config.json: expected the configuration of a checkpoint"),
        ("model.safetensors", b"not tensors", "model.safetensors: cannot be read"),
        ("pytorch_model.bin", b"not tensors", "pytorch_model.bin: cannot be read"),
    ],
)
def test_the_command_ends_with_a_sentence(name, content, message, tmp_path, capsys):
    pytest.importorskip("typer")
    from softpick.cli import main

    write(tmp_path / "theirs", {**FIELDS, "attn_impl": "naive_softpick_attn"}, weights(FIELDS))
    if name.endswith(".bin"):
        (tmp_path / "theirs" / "model.safetensors").unlink()
    (tmp_path / "theirs" / name).write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        main(["import", str(tmp_path / "theirs"), "--output", str(tmp_path / "ours")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "ours").exists()
