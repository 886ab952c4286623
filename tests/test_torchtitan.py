"""torchtitan: the same losses however the model is shared among ranks; weights to and from transformers; refusals."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("torchtitan")
pytest.importorskip("transformers")

import torch.distributed.checkpoint as dcp
from torchtitan.config import JobConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.protocols.train_spec import get_train_spec

from softpick import NORMALIZERS
from softpick.integrations import torchtitan as adapter
from softpick.integrations.torchtitan import FLAVORS, SIZES, SoftpickModelArgs, SoftpickTransformer
from softpick.integrations.transformers import SoftpickLlamaForCausalLM
from softpick.training.recipes import paper_1_8b, paper_340m, tiny_cpu

HERE = Path(__file__).parent
STEPS, BATCH, LENGTH = 4, 4, 64
ALL = "tiny-softpick+output_gate+score_scale"
SINK = "tiny-learned_sink"


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """A tokenizer of words, and documents that are a sequence each, so that any number of ranks sees the same batches."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("assets")
    words = ["<s>", "</s>", *(f"w{i}" for i in range(500))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    with (folder / "data.jsonl").open("w") as file:
        for _ in range(2 * STEPS * BATCH):
            numbers = torch.randint(40, (LENGTH - 1,)).cumsum(0) % 500
            file.write(json.dumps({"text": " ".join(f"w{i}" for i in numbers.tolist())}) + "\n")
    return folder


def command_line(assets, folder, flavor, **options):
    options = {
        "experimental.custom_import": "softpick.integrations.torchtitan",
        "model.name": "softpick_llama",
        "model.flavor": flavor,
        "model.hf_assets_path": assets,
        "training.dataset": "files",
        "training.dataset_path": assets / "data.jsonl",
        "training.seq_len": LENGTH,
        "training.global_batch_size": BATCH,
        "training.local_batch_size": BATCH,
        "training.steps": STEPS,
        "training.mixed_precision_param": "float32",
        "optimizer.lr": 5e-3,
        "optimizer.implementation": "foreach",
        "lr_scheduler.warmup_steps": 2,
        "lr_scheduler.total_steps": STEPS,
        "metrics.log_freq": 1,
        "debug.seed": 0,
        "checkpoint.enable": True,
        "checkpoint.interval": 2,
        "checkpoint.no-last-save-model-only": True,
        "job.dump_folder": folder,
    } | {name.replace("__", "."): value for name, value in options.items()}
    line = []
    for name, value in options.items():
        line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line


@pytest.fixture(scope="module")
def runs(assets, tmp_path_factory):
    """Folder of every run; all of a flavor start from one seed checkpoint."""
    root = tmp_path_factory.mktemp("runs")
    plan, folders = [], {}

    def add(name, flavor, ranks=1, folder=None, **options):
        folder = root / (folder or name)
        folders[name] = folder
        seed = root / f"seed-{flavor}" / "checkpoint" / "step-0"
        if not name.startswith("seed"):
            options["checkpoint__initial_load_path"] = seed
        line = command_line(assets, folder, flavor, **options)
        plan.append({"name": name, "ranks": ranks, "arguments": line, "losses": f"{folder}.jsonl"})

    tensor, context = {"parallelism__tensor_parallel_degree": 2}, {"parallelism__context_parallel_degree": 2}
    shards = {"parallelism__data_parallel_shard_degree": 2}
    for flavor in (ALL, SINK):
        add(f"seed-{flavor}", flavor, checkpoint__create_seed_checkpoint=True)
        add(f"one-{flavor}", flavor, activation_checkpoint__mode="none")
    add("tensor", SINK, 2, activation_checkpoint__mode="full", **tensor)
    add("context", SINK, 2, activation_checkpoint__selective_ac_option="op", **context)
    compiled = {"compile__enable": True, "compile__components": "model", "compile__backend": "aot_eager"}
    add("context-compiled", ALL, 2, **context, **compiled)
    add("context-tensor", ALL, 4, **context, **tensor)
    half = {"training__local_batch_size": BATCH // 2}
    add("shards", ALL, 2, **shards, **half)
    add("killed", ALL, 2, training__steps=2, folder="resumed", **shards, **half)
    add("resumed", ALL, 2, **shards, **half)
    replicas = {"parallelism__data_parallel_replicate_degree": 2, "training__local_batch_size": BATCH // 4}
    add("replicas", SINK, 4, **shards, **replicas)

    path = root / "plan.json"
    path.write_text(json.dumps(plan))
    extra = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(root / "cache")}
    done = subprocess.run(
        [sys.executable, str(HERE / "titan_ranks.py"), str(path)],
        capture_output=True, text=True, env=os.environ | extra, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return folders


def losses(folder):
    """Loss and gradient norm by step."""
    lines = Path(f"{folder}.jsonl").read_text().splitlines()
    return {step: (loss, norm) for step, loss, norm in map(json.loads, lines)}


def weights(folder, flavor, step=STEPS):
    model = SoftpickTransformer(FLAVORS[flavor])
    state = model.state_dict()
    dcp.load(state, checkpoint_id=folder / "checkpoint" / f"step-{step}", no_dist=True)
    return state


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "flavor"),
    [
        ("tensor", SINK),
        ("context", SINK),
        ("context-compiled", ALL),
        ("context-tensor", ALL),
        ("shards", ALL),
        ("replicas", SINK),
    ],
)
def test_ranks_give_what_one_gives(runs, name, flavor):
    expected, found = losses(runs[f"one-{flavor}"]), losses(runs[name])
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    for step, (loss, norm) in expected.items():
        assert found[step][0] == pytest.approx(loss, abs=2e-5), step
        assert found[step][1] == pytest.approx(norm, rel=1e-3), step
    started = weights(runs[f"seed-{flavor}"], flavor, 0)
    whole, gathered = weights(runs[f"one-{flavor}"], flavor), weights(runs[name], flavor)
    for key, start in started.items():
        change = float((whole[key] - start).norm())
        assert change > 0, key  # every parameter had a gradient
        # a few entries have a gradient of almost nothing, which Adam makes a whole step in the direction of rounding
        assert float((gathered[key] - whole[key]).norm()) < 0.02 * change, key


@pytest.mark.long
def test_resumed(runs):
    assert losses(runs["resumed"]) == losses(runs["shards"])
    whole, resumed = weights(runs["shards"], ALL), weights(runs["resumed"], ALL)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.long
def test_command_line_converts_there_and_back(runs, assets, tmp_path):
    step = runs["context"] / "checkpoint" / f"step-{STEPS}"
    arguments = ["to-transformers", str(step), str(tmp_path / "model"), "--flavor", SINK, "--tokenizer", str(assets)]
    adapter.main(arguments)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("softpick_llama", ["SoftpickLlamaForCausalLM"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.eos_token_id == AutoTokenizer.from_pretrained(tmp_path / "model").eos_token_id == 1
    ours = SoftpickTransformer(FLAVORS[SINK])
    ours.load_state_dict(weights(runs["context"], SINK))
    tokens = torch.randint(500, (2, LENGTH))
    torch.testing.assert_close(ours(tokens), model(tokens).logits, atol=1e-5, rtol=1e-4)
    with pytest.raises(FileExistsError, match="output: expected a folder that does not exist yet"):
        adapter.main(arguments)

    adapter.main(["from-transformers", str(tmp_path / "model"), str(tmp_path / "back")])
    state = weights(runs["context"], SINK)
    back = {key: torch.empty_like(x) for key, x in state.items()}
    dcp.load(back, checkpoint_id=tmp_path / "back", no_dist=True)
    assert all(torch.equal(state[key], back[key]) for key in state)


# ---------------------------------------------------------------------------------------------------------------------
# In this process


def drawn(model_args):
    model = SoftpickTransformer(model_args)
    with torch.no_grad():
        model.init_weights()
        for name, parameter in model.named_parameters():
            if name.endswith(("sinks", "score_scale")):
                parameter.add_(torch.rand_like(parameter))
    return model


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 2, "multiple_of": 100, "ffn_dim_multiplier": 0.5}])
def test_logits_of_the_converted_model(normalizer, shape):
    extras = {"output_gate": True, "score_scale": True} if shape else {}
    model_args = SoftpickModelArgs(
        dim=64, n_layers=2, n_heads=4, vocab_size=96, max_seq_len=48, normalizer=normalizer, **extras, **shape
    )
    model = drawn(model_args).double()
    state = model.state_dict()
    converted = adapter.to_transformers(model_args, state)
    assert converted.config._attn_implementation == normalizer
    tokens = torch.randint(96, (2, 48))
    # rotary embeddings are applied in fp32 by both
    torch.testing.assert_close(model(tokens), converted(tokens).logits, atol=2e-5, rtol=1e-4)

    back_args, back = adapter.from_transformers(converted)
    again = SoftpickTransformer(back_args).double()
    again.load_state_dict(back)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize(("size", "recipe"), [("tiny", tiny_cpu()), ("340M", paper_340m()), ("1.8B", paper_1_8b())])
def test_sizes_are_those_of_the_recipes(size, recipe):
    model_args = SIZES[size]
    found = (model_args.dim, model_args.n_layers, model_args.n_heads, model_args.vocab_size, model_args.max_seq_len)
    assert found == (recipe.width, recipe.layers, recipe.heads, recipe.vocab_size, recipe.sequence_length)
    assert model_args.rope_theta == recipe.rope_theta
    with torch.device("meta"):
        model = SoftpickTransformer(model_args)
    assert sum(p.numel() for p in model.parameters()) == recipe.parameters
    assert model.layers["0"].feed_forward.w1.weight.shape[0] == recipe.intermediate


def test_flavors():
    assert FLAVORS["340M"] == FLAVORS["340M-softpick"]
    chosen = FLAVORS["1.8B-learned_sink+output_gate"]
    assert (chosen.dim, chosen.normalizer, chosen.output_gate, chosen.score_scale) == (
        2048,
        "learned_sink",
        True,
        False,
    )
    chosen.max_seq_len = 1
    assert SIZES["1.8B"].max_seq_len == FLAVORS["1.8B"].max_seq_len == 4096
    assert len(list(FLAVORS)) == len(FLAVORS) == len(SIZES) * len(NORMALIZERS)
    assert all(FLAVORS[flavor] for flavor in FLAVORS)
    for wrong in ("7B", "340M-soft", "340M-softpick+gate", "340M+output_gate"):
        with pytest.raises(ValueError, match=r"model.flavor: expected SIZE-NORMALIZER"):
            FLAVORS[wrong]


def test_registered():
    spec = get_train_spec("softpick_llama")
    assert spec.model_cls is SoftpickTransformer
    assert spec.pipelining_fn is None
    assert "files" in DATASETS


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("parallelism", "pipeline_parallel_degree", 2, "pipeline_parallel_degree: expected 1, .* unscaled; got 2"),
        ("parallelism", "expert_parallel_degree", 2, "expert_parallel_degree: expected 1"),
        (
            "parallelism",
            "tensor_parallel_degree",
            8,
            "tensor_parallel_degree: expected a divisor of the 4 heads .* got 8",
        ),
        ("parallelism", "context_parallel_load_balancer", None, "context_parallel_load_balancer: expected 'headtail'"),
        ("parallelism", "context_parallel_rotate_method", "alltoall", "context_parallel_rotate_method: expected"),
        ("training", "seq_len", 62, "training.seq_len: expected a multiple of 8 .* got 62"),
        ("compile", "enable", True, "compile.enable, .* expected False with tensor parallelism"),
        ("parallelism", "enable_async_tensor_parallel", True, "enable_async_tensor_parallel: expected False"),
        ("model", "converters", ["float8"], "model.converters: expected none"),
    ],
)
def test_refusals(section, name, value, message):
    config = JobConfig()
    config.parallelism.context_parallel_degree = config.parallelism.tensor_parallel_degree = 2
    setattr(getattr(config, section), name, value)
    with pytest.raises(ValueError, match=message):
        FLAVORS["tiny"].update_from_config(config)


def test_replicas_are_refused():
    dims = SimpleNamespace(dp_replicate_enabled=True, fsdp_enabled=False, dp_replicate=2)
    with pytest.raises(
        ValueError, match=r"data_parallel_replicate_degree: expected 1 where nothing is sharded, .* got 2"
    ):
        adapter.parallelize(None, dims, JobConfig())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"normalizer": "soft"}, ValueError, "normalizer: expected one of"),
        ({"n_heads": 3}, ValueError, "n_heads: expected a divisor of dim 64"),
        ({"n_kv_heads": 3}, ValueError, "n_heads: expected .* a multiple of n_kv_heads 3"),
        ({"attn_type": "flex"}, ValueError, "attn_type, attn_mask_type: expected 'sdpa' and 'causal'"),
    ],
)
def test_arguments_are_checked(change, error, message):
    with pytest.raises(error, match=message):
        SoftpickModelArgs(**({"dim": 64, "n_heads": 4} | change))


def test_models_that_cannot_be_converted():
    with pytest.raises(TypeError, match="model: expected a SoftpickLlamaForCausalLM, got Linear"):
        adapter.from_transformers(torch.nn.Linear(2, 2))
    model = drawn(FLAVORS["tiny"])
    converted = adapter.to_transformers(FLAVORS["tiny"], model.state_dict())
    assert isinstance(converted, SoftpickLlamaForCausalLM)
    converted.config.tie_word_embeddings = True
    with pytest.raises(ValueError, match="model: expected tie_word_embeddings False"):
        adapter.from_transformers(converted)


def test_masks_are_refused():
    with pytest.raises(ValueError, match="attention_masks: expected None"):
        drawn(FLAVORS["tiny"])(torch.zeros(1, 4, dtype=torch.int64), attention_masks=object())


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("0.3.0", "is for torchtitan 0.2.2, .* found 0.3.0"),
        (None, r"needs torchtitan 0.2.2: pip install 'softpick\[torchtitan\]'"),
    ],
)
def test_other_versions_are_refused(monkeypatch, found, message):
    def version(name):
        assert name == "torchtitan"
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    spec = importlib.util.spec_from_file_location("adapter_again", adapter.__file__)
    with pytest.raises(ImportError, match=message):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
