"""Models whose positions or causality are not what their configuration says, code that comes with a model, damaged folders."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    CamembertConfig,
    Gemma3TextConfig,
    GPT2Config,
    IBertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MPNetConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)

from softpick.analysis import audit as audit_module
from softpick.analysis.audit import AuditSettings, audit
from softpick.evaluation import evaluate as evaluate_module
from softpick.evaluation.evaluate import EvaluateSettings, evaluate
from softpick.evaluation.passkey import _generate
from softpick.experiment.models import (
    ModelError,
    load_config,
    load_subject,
    load_tokenizer,
    sees_the_future,
)
from softpick.experiment.positions import first_position, positions
from softpick.experiment.progress import Silent
from softpick.quantization import quantize as quantize_module
from softpick.quantization.apply import Job, check
from softpick.quantization.methods import METHODS
from softpick.quantization.quantize import QuantizeSettings, quantize
from softpick.quantization.verify import QuantizationError
from softpick.training.data import train_tokenizer
from softpick.training.pretrain import train
from softpick.training.recipes import RecipeError, get_recipe

TEXT = "the lighthouse keeper wrote one line in his book every night and nobody could read it in the morning " * 60
SMALL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}

OPT = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "init_std": 0.3, "ffn_dim": 32,
       "word_embed_proj_dim": 16, "max_position_embeddings": 40}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    (root / "text.txt").write_text(TEXT)
    tokenizer = train_tokenizer([TEXT], 300)
    torch.manual_seed(0)
    small = SMALL | {"vocab_size": len(tokenizer)}
    llama = LlamaConfig(**small, intermediate_size=32, max_position_embeddings=64, bos_token_id=0, eos_token_id=1)
    LlamaForCausalLM(llama).save_pretrained(root / "llama")
    gemma = Gemma3TextConfig(
        **small, intermediate_size=32, head_dim=8, num_key_value_heads=2, max_position_embeddings=64
    )
    for name, both_ways in (("gemma", False), ("both ways", True)):
        gemma.use_bidirectional_attention = both_ways
        AutoModelForCausalLM.from_config(gemma).save_pretrained(root / name)
    roberta = RobertaConfig(**small, intermediate_size=32, max_position_embeddings=42, is_decoder=True, bos_token_id=0)
    AutoModelForCausalLM.from_config(roberta).save_pretrained(root / "roberta")
    opt = OPTConfig(**OPT | {"vocab_size": len(tokenizer)}, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    AutoModelForCausalLM.from_config(opt).save_pretrained(root / "opt")
    for name in ("llama", "gemma", "both ways", "roberta", "opt"):
        tokenizer.save_pretrained(root / name)
    return root


def given(home, model, **more):
    return {"model": str(home / model), "data": str(home / "text.txt"), "samples": 3, "sequence_length": 24} | more


WRONG = {
    "missing": r"model: there is no directory or file \S+missing",
    "text.txt": r"model: \S+text.txt has no config.json",
    "missing.gguf": r"model: there is no file \S+missing.gguf",
    "bert": r"model: \S+bert is an encoder \(bert\)",
}


@pytest.mark.parametrize("wrong", [*WRONG, "device"])
@pytest.mark.parametrize("command", ["analyze", "evaluate", "quantize"])
def test_a_wrong_second_model_is_refused_before_the_first_is_loaded(home, command, wrong, tmp_path, monkeypatch):
    """Also a device that is not there."""
    BertConfig(**BERT).save_pretrained(home / "bert")
    modules = {"analyze": audit_module, "evaluate": evaluate_module, "quantize": quantize_module}
    monkeypatch.setattr(modules[command], "load_subject", lambda *a, **k: pytest.fail("a model was loaded"))
    other = str(home / (wrong if wrong != "device" else "gemma"))
    more = {"device": "cuda:99"} if wrong == "device" else {}
    message = WRONG.get(wrong, "device: cannot move .* 'cuda:99'")
    if command == "analyze" and wrong == "bert":
        pytest.skip("audits take encoders")
    run = {
        "analyze": lambda: audit(AuditSettings(**given(home, "llama", against=other, **more))),
        "evaluate": lambda: evaluate(EvaluateSettings(**given(home, "llama", against=(other,), tasks=(), **more))),
        "quantize": lambda: quantize(
            QuantizeSettings(**given(home, "llama", against=(other,), **more)), tmp_path / "out"
        ),
    }
    with pytest.raises(ModelError, match=message):
        run[command]()


# ---------------------------------------------------------------------------------------------------------------------
# Positions

BERT = SMALL | {"intermediate_size": 32, "max_position_embeddings": 40}
POSITIONS = {
    "bert": (BertConfig(**BERT), 40, 0),
    "roberta": (RobertaConfig(**BERT), 38, 2),
    "camembert": (CamembertConfig(**BERT), 38, 2),
    "xlm-roberta": (XLMRobertaConfig(**BERT), 38, 2),
    "padding at 5": (RobertaConfig(**BERT, pad_token_id=5), 34, 6),
    "mpnet": (MPNetConfig(**BERT), 38, 2),
    "ibert": (IBertConfig(**BERT), 38, 2),
    "gpt2": (GPT2Config(vocab_size=300, n_positions=40, n_embd=16, n_layer=1, n_head=2), 40, 0),
    "opt": (OPTConfig(**OPT), 40, 0),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_are_those_that_the_model_takes(name):
    config, longest, first = POSITIONS[name]
    model = AutoModel.from_config(config).eval()
    assert (positions(model), first_position(model)) == (longest, first)
    ids = torch.full((1, longest + 1), 7)
    model(input_ids=ids[:, 1:])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)


def test_positions_of_models_without_a_table():
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, intermediate_size=32, max_position_embeddings=48))
    assert positions(llama) == 48
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2))
    assert positions(bloom) is None


@pytest.mark.parametrize(("name", "first"), [("roberta", 2), ("opt", 0), ("llama", 0)])
def test_position_ids_in_the_knockout_are_those_of_the_model(home, name, first):
    """With all keys the perplexity is that of the model which is given no positions; without a key, none of them shifts."""
    run = audit(AuditSettings(**given(home, name, knockout=(0, 5), evict_after=4, texts=("a night",))))["runs"][0]
    subject = load_subject(str(home / name), reporter=Silent())
    rows = subject.sequences(corpus(home), 3, 24)
    with torch.no_grad():
        plain = subject.model(input_ids=rows, use_cache=False).logits
        for entry in run["knockout"]:
            key = entry["key"]
            see = torch.ones(24, 24).tril().bool().repeat(3, 1, 1, 1)
            see[:, :, key + 4 :, key] = False
            bias = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)
            at = torch.arange(first, first + 24).expand(3, -1)
            hidden = subject.model(input_ids=rows, attention_mask=bias, position_ids=at, use_cache=False).logits
            for logits, figure in ((plain, "all keys"), (hidden, "eviction")):
                picked = torch.log_softmax(logits[:, :-1], -1).gather(-1, rows[:, 1:, None])[:, key + 8 :]
                assert entry[figure] == pytest.approx(math.exp(-picked.mean()), rel=1e-4), (key, figure)


def test_decoding_counts_positions_as_the_model_does(home):
    subject = load_subject(str(home / "roberta"), reporter=Silent(), decoder=True)
    ids = torch.arange(7, 17)[None]
    found = _generate(subject.model, ids, torch.ones_like(ids), 4)
    for step in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, subject.model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(2)], 1)
        assert int(ids[0, -1]) == int(found[0, step])


def test_default_lengths_fit(home, tmp_path):
    changes = {"methods": (), "activations": (), "kv_cache": (8,), "sequence_length": None, "calibration_samples": 2}
    report = quantize(QuantizeSettings(**given(home, "roberta", **changes)), tmp_path)
    assert report["runs"][0]["sequence_length"] == 40


def corpus(home):
    from softpick.experiment.corpus import get_corpus

    return get_corpus(home / "text.txt", "text", 2_000_000)


# ---------------------------------------------------------------------------------------------------------------------
# Causality


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_sees_the_future(home, dtype):
    for name, future in (("llama", False), ("gemma", False), ("both ways", True), ("roberta", False)):
        model = AutoModelForCausalLM.from_pretrained(home / name, dtype=dtype).eval()
        assert sees_the_future(model, torch.arange(5, 21)) == future, name


def test_a_decoder_that_looks_both_ways_has_no_perplexity(home, tmp_path):
    run = audit(AuditSettings(**given(home, "both ways")))["runs"][0]
    assert not {"perplexity", "knockout", "validation_loss"} & set(run)
    assert "no knockout, because a model that sees the tokens after" in run["notes"][0]
    assert "perplexity" in audit(AuditSettings(**given(home, "gemma")))["runs"][0]
    for call in (
        lambda: evaluate(EvaluateSettings(**given(home, "both ways", tasks=(), passkey=()))),
        lambda: quantize(QuantizeSettings(**given(home, "both ways", methods=(), activations=())), tmp_path),
    ):
        with pytest.raises(ModelError, match="predicts a token from the tokens after it"):
            call()


# ---------------------------------------------------------------------------------------------------------------------
# Code that comes with a model


@pytest.fixture
def foreign(home, tmp_path):
    """Folders whose model, tokenizer or both are code; it leaves a file where it runs."""
    mark = tmp_path / "executed"
    evil = f"open({str(mark)!r}, 'w').write('x')\n"
    for name in ("model", "tokenizer"):
        shutil.copytree(home / "llama", tmp_path / name)
        (tmp_path / name / "evil.py").write_text(evil)
    config = json.loads((home / "llama" / "config.json").read_text())
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoModel": "evil.Model"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": auto}))
    file = tmp_path / "tokenizer" / "tokenizer_config.json"
    auto = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "Mine", "auto_map": auto}))
    return tmp_path, mark


def test_code_of_a_folder_does_not_run_and_nobody_is_asked(home, foreign, monkeypatch):
    folder, mark = foreign

    def ask(*args):
        raise AssertionError("asked on stdin")

    monkeypatch.setattr("builtins.input", ask)
    recipe = get_recipe("tiny_cpu").override([f"tokenizer={folder / 'tokenizer'}", f"data={home / 'text.txt'}"])
    calls = {
        "config": lambda: load_config(str(folder / "model")),
        "audit": lambda: audit(AuditSettings(**given(folder, "model", data=str(home / "text.txt")))),
        "evaluate": lambda: evaluate(EvaluateSettings(**given(folder, "model", data=str(home / "text.txt"), tasks=()))),
        "quantize": lambda: quantize(
            QuantizeSettings(**given(folder, "model", data=str(home / "text.txt"))), folder / "out"
        ),
    }
    for name, call in calls.items():
        with pytest.raises(ModelError, match=r"code of its own, which does not run unless --trust-remote-code"):
            call()
        assert not mark.exists(), name
    for name, call in {
        "tokenizer": lambda: load_tokenizer("t", str(folder / "tokenizer")),
        "subject": lambda: load_subject(str(folder / "tokenizer"), reporter=Silent()),
        "train": lambda: train(recipe, folder / "run"),
    }.items():
        with pytest.raises((ModelError, RecipeError), match="code of its own"):
            call()
        assert not mark.exists(), name


def test_code_runs_where_it_was_asked_for(foreign):
    folder, mark = foreign
    with pytest.raises(ModelError):  # it defines no model
        load_config(str(folder / "model"), trust_remote_code=True)
    assert mark.exists()


def test_attention_of_the_hub_is_code_too(home):
    with pytest.raises(ModelError, match="kernels-community/x is code of the hub"):
        load_subject(str(home / "llama"), reporter=Silent(), attn_implementation="kernels-community/x")


KERNEL = "kernels-community/flash-attn2"
NAMED = {
    "public": {"attn_implementation": KERNEL},
    "private": {"_attn_implementation": KERNEL},
    "both": {"attn_implementation": KERNEL, "_attn_implementation": KERNEL},
    "public is harmless": {"attn_implementation": "eager", "_attn_implementation": KERNEL},
    "internal": {"_attn_implementation_internal": KERNEL},
    "dictionary": {"attn_implementation": {"": "eager", "text_config": KERNEL}},
    "private dictionary": {"_attn_implementation": {"": KERNEL}},
    "deep": {"_attn_implementation": {"": "eager", "text_config": {"": KERNEL}}},
    "part": {"text_config": {"attn_implementation": KERNEL}},
    "private in a part": {"text_config": {"_attn_implementation": KERNEL}},
    "part of a part": {"thinker_config": {"parts": [{"text_config": {"_attn_implementation": KERNEL}}]}},
    "experts": {"experts_implementation": KERNEL},
    "another organization": {"_attn_implementation": "someone/kernel@v1:f"},
    "paged": {"_attn_implementation": f"paged|{KERNEL}"},
    "renamed": {"attribute_map": {"harmless": "_attn_implementation"}, "harmless": KERNEL},
}


@pytest.fixture
def no_kernels(monkeypatch):
    """Nothing is fetched from the hub; that it was tried is noted."""
    import transformers.modeling_utils

    tried = []

    def note(name, *args, **kwargs):
        tried.append(name)
        raise RuntimeError("nothing is fetched here")

    for name in ("load_and_register_attn_kernel", "lazy_import_flash_attention"):
        monkeypatch.setattr(transformers.modeling_utils, name, note, raising=False)
    monkeypatch.setattr(transformers.integrations.hub_kernels, "load_and_register_attn_kernel", note, raising=False)
    return tried


@pytest.mark.parametrize("chosen", [None, "eager", "softpick"])
@pytest.mark.parametrize("named", NAMED)
def test_a_configuration_that_names_a_kernel_of_the_hub_is_refused(home, tmp_path, no_kernels, named, chosen):
    shutil.copytree(home / "llama", tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | NAMED[named]))
    options = given(tmp_path, "m", data=str(home / "text.txt"), attn_implementation=chosen)
    calls = {
        "analyze": lambda: audit(AuditSettings(**options)),
        "evaluate": lambda: evaluate(EvaluateSettings(**options | {"tasks": ()})),
        "quantize": lambda: quantize(QuantizeSettings(**options), tmp_path / "out"),
        "subject": lambda: load_subject(
            str(tmp_path / "m"), reporter=Silent(), visible=True, attn_implementation=chosen
        ),
    }
    for name, call in calls.items():
        with pytest.raises(ModelError, match="is code of the hub, which does not run unless --trust-remote-code"):
            call()
        assert not no_kernels, name


def test_a_kernel_of_the_hub_may_be_asked_for(home, tmp_path, no_kernels):
    shutil.copytree(home / "llama", tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | NAMED["private"]))
    with pytest.raises(ModelError):
        load_subject(str(tmp_path / "m"), reporter=Silent(), trust_remote_code=True)
    assert no_kernels


@pytest.mark.slow
def test_yes_on_stdin_runs_nothing(foreign, tmp_path):
    folder, mark = foreign
    command = [sys.executable, "-m", "softpick", "analyze", str(folder / "model"), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, input="y\n" * 1000, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "--trust-remote-code" in done.stderr
    assert "Traceback" not in done.stderr
    assert not mark.exists()


def test_every_load_says_what_may_run():
    """``from_pretrained`` of an Auto class without ``trust_remote_code`` would ask on stdin."""
    import ast
    from pathlib import Path

    import softpick

    for path in Path(softpick.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = node.func.value
            automatic = isinstance(owner, ast.Name) and (owner.id.startswith("Auto") or owner.id == "loader")
            if automatic and node.func.attr in ("from_pretrained", "from_config"):
                assert "trust_remote_code" in {k.arg for k in node.keywords}, f"{path.name}:{node.lineno}"


# ---------------------------------------------------------------------------------------------------------------------
# Damaged folders

CONFIG = {
    "garbage": b"\xff\xfe garbage",
    "cut": b'{"model_type": "llam',
    "list": b"[1, 2]",
    "deep": b"[" * 100_000,
    "empty": b"",
    "no type": b"{}",
}
FIELDS = {
    "a string for a number": {"hidden_size": "abc"},
    "no heads": {"num_attention_heads": 0},
    "other shapes": {"hidden_size": 32},
    "negative": {"num_hidden_layers": -1, "vocab_size": -3},
    "more layers": {"num_hidden_layers": 3},
    "heads that do not divide": {"num_attention_heads": 3},
}
PLAIN = {
    "a string for a number": "hidden_size.*'abc'",
    "other shapes": "other shapes than config.json says",
    "heads that do not divide": "not a multiple",
    "pickle": "pickle of more than tensors, which could run code",
}
"""What is said where transformers' own first line says too little, or advises what is unsafe."""


@pytest.mark.parametrize("name", ["model.gguf", "two\nlines", "-n", "[red]", "~", "hub:x", "%s {0}", "a,b"])
def test_a_folder_may_be_called_anything(home, tmp_path, name, monkeypatch):
    """Also what is the name of a file elsewhere."""
    shutil.copytree(home / "llama", tmp_path / name)
    subject = load_subject(str(tmp_path / name), reporter=Silent(), decoder=True)
    assert len(subject.ids("the lighthouse")) > 1
    monkeypatch.setitem(METHODS, "toy", replace(METHODS["gptq"], packages=(), check=lambda job: None))
    job = Job(subject, 4, 16, torch.zeros(1, 4, dtype=torch.long), tmp_path / "made", Silent())
    check("toy", job)
    job = replace(job, subject=replace(subject, name=str(tmp_path / "file.gguf")))
    with pytest.raises(QuantizationError, match="a GGUF file is quantized already"):
        check("toy", job)


@pytest.mark.parametrize("name", [*CONFIG, *FIELDS, "cut weights", "header", "no weights", "pickle", "tokenizer",
                                  "cut tokenizer", "tokens without embeddings", "nan", "no tokenizer"])  # fmt: skip
def test_a_damaged_folder_is_one_sentence(home, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(home / "llama", folder)
    weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    if name in CONFIG:
        (folder / "config.json").write_bytes(CONFIG[name])
    elif name in FIELDS:
        (folder / "config.json").write_text(json.dumps(config | FIELDS[name]))
    elif name == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif name == "header":
        weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
    elif name == "no weights":
        weights.unlink()
    elif name == "pickle":
        weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + bytes(tmp_path / "ran") + b"'\ntR.")
    elif name == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif name == "cut tokenizer":
        (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:500])
    elif name == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif name == "nan":
        save_file({k: v * math.nan for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    else:
        words = "".join(chr(i) for i in range(33, 3000))
        PreTrainedTokenizerFast(
            tokenizer_object=train_tokenizer([words * 3], 3000).backend_tokenizer, bos_token="<bos>", eos_token="<eos>"
        ).save_pretrained(folder)
        (tmp_path / "text.txt").write_text(words * 10)
        shutil.copy(tmp_path / "text.txt", home / "words.txt")
    data = str(home / ("words.txt" if name == "tokens without embeddings" else "text.txt"))
    with pytest.raises(ModelError) as raised:
        audit(AuditSettings(**given(tmp_path, "model", data=data)))
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not str(raised.value).endswith(":")
    assert re.search(PLAIN.get(name, ""), str(raised.value))
    assert not (tmp_path / "ran").exists()
