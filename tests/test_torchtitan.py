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
from titan_lines import OLD, command_line, drawn, refused, write_tokenizer
from torchtitan.hf_datasets.text_datasets import DATASETS

from softpick import NORMALIZERS
from softpick.integrations import torchtitan as adapter
from softpick.integrations.torchtitan import FLAVORS, SIZES, SoftpickModelArgs, SoftpickTransformer
from softpick.integrations.transformers import SoftpickLlamaForCausalLM
from softpick.training.recipes import paper_1_8b, paper_340m, tiny_cpu

old = pytest.mark.skipif(not OLD, reason="torchtitan 0.2.2")
new = pytest.mark.skipif(OLD, reason="torchtitan 0.3.0")
HERE = Path(__file__).parent
STEPS, BATCH, LENGTH = 4, 4, 64
ALL = "tiny-softpick+output_gate+score_scale"
SINK = "tiny-learned_sink"


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """A tokenizer of words, and documents that are a sequence each, so that any number of ranks sees the same batches."""
    folder = tmp_path_factory.mktemp("assets")
    write_tokenizer(folder)
    with (folder / "data.jsonl").open("w") as file:
        for _ in range(2 * STEPS * BATCH):
            numbers = torch.randint(40, (LENGTH - 1,)).cumsum(0) % 500
            file.write(json.dumps({"text": " ".join(f"w{i}" for i in numbers.tolist())}) + "\n")
    return folder


def options_of(assets, folder, flavor, **options):
    return {
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


TENSOR, CONTEXT = {"parallelism__tensor_parallel_degree": 2}, {"parallelism__context_parallel_degree": 2}
SHARDS, HALF = {"parallelism__data_parallel_shard_degree": 2}, {"training__local_batch_size": BATCH // 2}
REPLICAS, QUARTER = {"parallelism__data_parallel_replicate_degree": 2}, {"training__local_batch_size": BATCH // 4}
COMPILED = {"compile__enable": True, "compile__components": "model", "compile__backend": "aot_eager"}
PIPELINE = {"parallelism__pipeline_parallel_degree": 2} | {
    f"parallelism__pipeline_parallel_{end}_stage_less_layers": 0 for end in ("first", "last")
}
CHECKED = {"debug__spmd_typechecking": True}  # of the types of what ranks hold
# name: flavor, ranks, options
RUNS = {
    "tensor": (SINK, 2, TENSOR | {"activation_checkpoint__mode": "full"}),
    "context": (SINK, 2, CONTEXT | {"activation_checkpoint__selective_ac_option": "op"}),
    "context-compiled": (ALL, 2, CONTEXT | COMPILED),
    "context-tensor": (ALL, 4, CONTEXT | TENSOR),
    "shards": (ALL, 2, SHARDS | HALF),
    "replicas": (SINK, 4, SHARDS | REPLICAS | QUARTER),
}
if not OLD:
    RUNS |= {
        "tensor-compiled": (ALL, 2, TENSOR | COMPILED),
        "shards-tensor-compiled": (ALL, 4, SHARDS | HALF | TENSOR | COMPILED),
        "tensor-checked": (ALL, 2, TENSOR | CHECKED),
        "context-tensor-checked": (SINK, 4, CONTEXT | TENSOR | CHECKED),
        "tensor-alone": (SINK, 2, TENSOR | {"parallelism__no-enable-sequence-parallel": True}),
        "pipeline": (ALL, 2, PIPELINE | {"activation_checkpoint__mode": "full"}),
        "pipeline-context": (ALL, 4, PIPELINE | CONTEXT),
        "pipeline-tensor": (SINK, 4, PIPELINE | TENSOR | COMPILED),
        "only-replicas": (SINK, 2, REPLICAS | HALF | {"parallelism__data_parallel_shard_degree": 1}),
    }


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
            options.setdefault("checkpoint__initial_load_path", seed)
        line = command_line(**options_of(assets, folder, flavor, **options))
        plan.append({"name": name, "ranks": ranks, "arguments": line, "losses": f"{folder}.jsonl"})

    for flavor in (ALL, SINK):
        add(f"seed-{flavor}", flavor, checkpoint__create_seed_checkpoint=True)
        add(f"one-{flavor}", flavor, activation_checkpoint__mode="none")
    for name, (flavor, ranks, options) in RUNS.items():
        add(name, flavor, ranks, **options)
    add("killed", ALL, 2, training__steps=2, folder="resumed", **SHARDS, **HALF)
    add("resumed", ALL, 2, **SHARDS, **HALF)
    if not OLD:
        valid = {"enable": True, "freq": 2, "steps": 2, "dataloader__dataset": "files"}
        valid["dataloader__dataset_path"] = assets / "data.jsonl"
        add("validated", SINK, 2, **CONTEXT, **{f"validator__{name}": value for name, value in valid.items()})
        start = root / "transformers"
        adapter.to_transformers(FLAVORS[ALL], drawn(FLAVORS[ALL]).state_dict()).save_pretrained(start)
        options = {"initial_load_path": start, "initial_load_in_hf": True, "last_save_model_only": True}
        options |= {"last_save_in_hf": True, "no-last-save-model-only": None}
        add("transformers", ALL, 2, **TENSOR, **{f"checkpoint__{name}": value for name, value in options.items()})
        folders["start"] = start

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
    model = FLAVORS[flavor].build()
    state = model.state_dict()
    dcp.load(state, checkpoint_id=folder / "checkpoint" / f"step-{step}", no_dist=True)
    return state


def batch_of(assets, step):
    """The inputs and labels of a step, counted from 1: every document is a sequence and its last label."""
    with (assets / "data.jsonl").open() as file:
        texts = [json.loads(line)["text"] for line in file][(step - 1) * BATCH : step * BATCH]
    tokens = torch.tensor([[0, *(int(word[1:]) + 2 for word in text.split()), 1] for text in texts])
    return tokens[:, :-1], tokens[:, 1:]


def loss_and_norm(model, assets, step):
    """Of a transformers model; labels are not shifted, they are the next tokens already."""
    inputs, labels = batch_of(assets, step)
    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten())
    loss.backward()
    return float(loss.detach()), float(torch.stack([p.grad.norm() for p in model.parameters()]).norm())


@pytest.mark.long
@pytest.mark.parametrize("flavor", [ALL, SINK])
def test_losses_and_gradients_are_those_of_transformers(runs, assets, flavor):
    found = losses(runs[f"one-{flavor}"])
    for step, folder in ((1, runs[f"seed-{flavor}"]), (3, runs[f"one-{flavor}"])):
        model = adapter.to_transformers(FLAVORS[flavor], weights(folder, flavor, step - 1))
        loss, norm = loss_and_norm(model, assets, step)
        assert found[step][0] == pytest.approx(loss, abs=2e-5)
        assert found[step][1] == pytest.approx(norm, rel=1e-3)
    assert found[1][0] != pytest.approx(found[3][0], abs=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_ranks_give_what_one_gives(runs, name):
    flavor = RUNS[name][0]
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


@new
@pytest.mark.long
def test_validated(runs, assets):
    """The second batch of two that were taken from the beginning, by the weights of that step."""
    found = [json.loads(line) for line in Path(f"{runs['validated']}.jsonl.validation").read_text().splitlines()]
    assert [step for step, _ in found] == [1, 2, 4]
    assert losses(runs["validated"]) == losses(runs["context"])
    model = adapter.to_transformers(FLAVORS[SINK], weights(runs["validated"], SINK))
    expected = sum(loss_and_norm(model, assets, step)[0] for step in (1, 2)) / 2
    assert found[-1][1] == pytest.approx(expected, abs=2e-5)


@new
@pytest.mark.long
def test_torchtitan_reads_and_writes_what_transformers_reads(runs, assets):
    """The bytes of a folder of transformers, not converted: ``initial_load_in_hf`` and ``last_save_in_hf``."""
    start = SoftpickLlamaForCausalLM.from_pretrained(runs["start"])
    loss, norm = loss_and_norm(start, assets, 1)
    assert losses(runs["transformers"])[1] == (pytest.approx(loss, abs=2e-5), pytest.approx(norm, rel=1e-3))
    last = runs["transformers"] / "checkpoint" / f"step-{STEPS}"
    (last / "config.json").write_text((runs["start"] / "config.json").read_text())  # torchtitan writes none
    end, loading = SoftpickLlamaForCausalLM.from_pretrained(last, output_loading_info=True)
    assert not any(loading.values())
    assert loss_and_norm(end, assets, 1)[0] < loss  # it has learned
    before = weights(runs["transformers"], ALL, STEPS // 2)
    middle = adapter.to_transformers(FLAVORS[ALL], before)
    assert losses(runs["transformers"])[3][0] == pytest.approx(loss_and_norm(middle, assets, 3)[0], abs=2e-5)


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
    ours = drawn(FLAVORS[SINK])
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
    again = back_args.build().double()
    again.load_state_dict(back)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("flavor", [ALL, SINK])
def test_extras_start_as_in_transformers(flavor):
    model = FLAVORS[flavor].build()
    with torch.no_grad():
        model.init_weights()
    converted = adapter.to_transformers(FLAVORS[flavor], model.state_dict())
    fresh = SoftpickLlamaForCausalLM(converted.config).state_dict()
    named = {name: x for name, x in converted.state_dict().items() if name.endswith(("sinks", "score_scale"))}
    assert len(named) == len(model.layers)
    assert all(torch.equal(x, fresh[name]) for name, x in named.items())


@pytest.mark.parametrize(("size", "recipe"), [("tiny", tiny_cpu()), ("340M", paper_340m()), ("1.8B", paper_1_8b())])
def test_sizes_are_those_of_the_recipes(size, recipe):
    model_args = SIZES[size]
    found = (model_args.dim, model_args.n_layers, model_args.n_heads, model_args.vocab_size, model_args.max_seq_len)
    assert found == (recipe.width, recipe.layers, recipe.heads, recipe.vocab_size, recipe.sequence_length)
    assert model_args.rope_theta == recipe.rope_theta
    with torch.device("meta"):
        model = model_args.build()
    assert isinstance(model, SoftpickTransformer)
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
    option = "model.flavor" if OLD else "flavor"
    for wrong in ("7B", "340M-soft", "340M-softpick+gate", "340M+output_gate"):
        with pytest.raises(ValueError, match=f"^{option}: expected SIZE-NORMALIZER"):
            FLAVORS[wrong]


def test_registered():
    assert {"files", "fineweb_edu"} <= DATASETS.keys()
    if OLD:
        from torchtitan.protocols.train_spec import get_train_spec

        spec = get_train_spec("softpick_llama")
        assert spec.model_cls is SoftpickTransformer
        assert spec.pipelining_fn is None
    else:
        from torchtitan.config import ConfigManager

        line = command_line(model__flavor="tiny-rectified+output_gate", training__seq_len=16)
        config = ConfigManager().parse_args(line)
        spec = config.model_spec
        assert (spec.name, spec.flavor, config.training.seq_len) == ("softpick_llama", config.flavor, 16)
        attention = spec.model.build().layers["1"].attention
        assert attention.inner_attention.normalizer == "rectified"
        assert attention.output_gate is not None
        assert attention.score_scale is attention.sinks is None


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("parallelism.expert_parallel_degree", 2, "parallelism.expert_parallel_degree: expected 1"),
        (
            "parallelism.tensor_parallel_degree",
            8,
            "parallelism.tensor_parallel_degree: expected a divisor of the 4 heads .* got 8",
        ),
        (
            "parallelism.context_parallel_load_balancer",
            None,
            "parallelism.context_parallel_load_balancer: expected 'headtail'",
        ),
        ("training.seq_len", 62, "training.seq_len: expected a multiple of 8 .* got 62"),
    ],
)
def test_refusals(place, value, message):
    refused({place: value}, message)


@old
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (
            "parallelism.pipeline_parallel_degree",
            2,
            "parallelism.pipeline_parallel_degree: expected 1, because .* unscaled; got 2. Use FSDP",
        ),
        ("parallelism.context_parallel_rotate_method", "alltoall", ".*context_parallel_rotate_method: expected"),
        ("compile.enable", True, "compile.enable, .* expected False with tensor parallelism"),
        (
            "parallelism.enable_async_tensor_parallel",
            True,
            ".*enable_async_tensor_parallel: expected False with tensor",
        ),
        ("model.converters", ["float8"], "model.converters: expected none"),
    ],
)
def test_refusals_of_the_old_version(place, value, message):
    refused({place: value}, message)


@old
def test_replicas_are_refused():
    from torchtitan.config import JobConfig

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
        pytest.param(
            {"attn_type": "flex"},
            ValueError,
            "attn_type, attn_mask_type: expected 'sdpa' and 'causal'",
            marks=old,
        ),
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
    ("found", "torch_version", "message"),
    [
        ("0.4.0", "2.14.0", "is for torchtitan 0.2.2 and 0.3.0, .* found 0.4.0"),
        ("0.2.1", "2.13.0", "is for torchtitan 0.2.2 and 0.3.0, .* found 0.2.1"),
        ("0.3.0", "2.13.0+cpu", r"torchtitan 0.3.0 needs torch 2.14 or newer, found 2.13.0\+cpu"),
        (None, "2.14.0", r"needs torchtitan 0.2.2 or 0.3.0: pip install 'softpick\[torchtitan\]'"),
    ],
)
def test_other_versions_are_refused(monkeypatch, found, torch_version, message):
    def version(name):
        assert name == "torchtitan"
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch, "__version__", torch_version)
    spec = importlib.util.spec_from_file_location("adapter_again", adapter.__file__)
    with pytest.raises(ImportError, match=message):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
