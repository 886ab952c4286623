"""torchtitan 0.3.0: its configuration, what is kept of activations, positions, refusals. Ranks are in test_torchtitan.py."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("torchtitan", minversion="0.3", reason="torchtitan 0.3.0 has these")

from titan_lines import command_line, drawn, refused, write_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.components.loss import MSELoss
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import ConfigManager
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.llama3 import llama3_configs

from softpick.integrations import torchtitan as adapter
from softpick.integrations import torchtitan_03
from softpick.integrations.torchtitan import FLAVORS, SIZES, SoftpickModelArgs
from softpick.integrations.torchtitan_03 import SequenceDataLoader


def test_a_size_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "sizes_of_mine.py").write_text(
        "from softpick.integrations.torchtitan import SIZES, SoftpickModelArgs, softpick_llama\n"
        'SIZES["mine"] = SoftpickModelArgs(dim=24, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=32)\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(FLAVORS, "sizes", dict(SIZES))
    monkeypatch.setattr(adapter, "SIZES", FLAVORS.sizes)
    line = command_line(experimental__custom_import="sizes_of_mine", model__flavor="mine-softmax")
    model = ConfigManager().parse_args(line).model_spec.model.build()
    assert model.layers["0"].attention.qkv_linear.wk.weight.shape == (8, 24)


def test_initial_weights_are_those_of_torchtitans_llama():
    own = llama3_configs["debugmodel"](attn_backend="flex").build()
    ours = SoftpickModelArgs(dim=256, n_layers=6, n_heads=16, vocab_size=2048).build()
    for model in (own, ours):
        torch.manual_seed(0)
        with torch.no_grad():
            model.init_weights()
    expected, found = own.state_dict(), ours.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_may_have_longer_sequences_than_its_size():
    config = dataclasses.replace(adapter.softpick_llama(), flavor="tiny-softpick+score_scale")
    config.training.seq_len = 4 * SIZES["tiny"].max_seq_len
    config.model_spec.model.update_from_config(config=config)
    model = config.model_spec.model.build()
    model.init_weights()
    tokens = torch.randint(500, (1, config.training.seq_len))
    assert model(tokens).isfinite().all()
    logs = torch.arange(1, config.training.seq_len + 1).log()
    assert model.layers["1"].attention.score_scale[0].item() * logs.mean().item() == pytest.approx(1)
    assert SIZES["tiny"].max_seq_len == 64


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_selective_checkpointing_keeps_the_outputs_of_attention(kind, monkeypatch):
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += func == torch.ops.softpick.attention_forward.default
            return func(*args, **(kwargs or {}))

    # what torchtitan does first, without ranks
    monkeypatch.setattr(
        torchtitan_03, "parallelize_llama", lambda model, *, ac_config, **_: ac_config.build().apply(model)
    )
    chosen = SelectiveAC if kind == "selective" else FullAC
    model = drawn(FLAVORS["tiny-softpick"])
    adapter.parallelize(model, parallel_dims=SimpleNamespace(cp_enabled=False), ac_config=chosen.Config())
    with Count() as count:
        model(torch.randint(500, (1, 16))).sum().backward()
    assert count.calls == len(model.layers) * (1 if kind == "selective" else 2)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (
            "parallelism.spmd_backend",
            "full_dtensor",
            "parallelism.spmd_backend: expected 'spmd_types', .*'full_dtensor'",
        ),
        ("training.disable_cuda_graphs", False, "training.disable_cuda_graphs: expected True, .* got False"),
        ("compile.enable_async_tensor_parallel", True, "compile.enable_async_tensor_parallel: expected False, .* True"),
        ("override.imports", ["a.b"], "override.imports: expected none .* got .'a.b'"),
        ("loss.loss_fn.global_vocab_size", 7, "loss.global_vocab_size: expected 512, the model's, or None; got 7"),
    ],
)
def test_refusals_of_the_new_version(place, value, message):
    refused({place: value}, message)


def test_other_schedules_of_a_pipeline_are_refused():
    schedule = "Interleaved1F1B"
    changes = {"parallelism.pipeline_parallel_degree": 2, "parallelism.pipeline_parallel_schedule": schedule}
    refused(changes, f"parallelism.pipeline_parallel_schedule: expected '1F1B', .* got '{schedule}'")


def test_loaders_that_count_within_documents_are_refused():
    other = HuggingFaceTextDataLoader.Config()
    message = "dataloader: expected softpick's SequenceDataLoader.Config, .* got HuggingFaceTextDataLoader.Config"
    refused({"dataloader": other}, message)
    refused({"validator.enable": True, "validator.dataloader": other}, f"validator.{message}")
    refused({"loss": MSELoss.Config()}, "loss: expected a cross entropy, .* got MSELoss.Config")


def test_positions_count_through_the_sequence(tmp_path):
    """Documents of other lengths than a sequence; what a loader had left is the same after a checkpoint."""
    lengths = [5, 30, 1, 17, 40, 9, 22, 13, 8, 50]
    texts = [[f"w{7 * i + j}" for j in range(length)] for i, length in enumerate(lengths)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": " ".join(text)}) for text in texts))
    write_tokenizer(tmp_path)
    tokenizer = HuggingFaceTokenizer.Config().build(tokenizer_path=str(tmp_path))
    tokens = [[0, *(int(word[1:]) + 2 for word in text), 1] for text in texts]
    inputs = [token for document in tokens for token in document[:-1]]
    labels = [token for document in tokens for token in document[1:]]

    def loader():
        config = SequenceDataLoader.Config(dataset="files", dataset_path=str(tmp_path / "data.jsonl"), infinite=False)
        return config.build(dp_world_size=1, dp_rank=0, tokenizer=tokenizer, seq_len=16, local_batch_size=2)

    found = list(loader())
    assert len(found) == len(inputs) // 32
    for at, (given, expected) in enumerate(found):
        assert given["input"].flatten().tolist() == inputs[32 * at : 32 * at + 32]
        assert expected.flatten().tolist() == labels[32 * at : 32 * at + 32]
        assert given["positions"].tolist() == [list(range(16))] * 2
    first = loader()
    stream = iter(first)
    next(stream)
    again = loader()
    again.load_state_dict(first.state_dict())
    rest = list(again)
    assert len(rest) == len(found) - 1
    assert all(torch.equal(one[0]["input"], other[0]["input"]) for one, other in zip(rest, found[1:], strict=True))


def test_ranks_that_share_a_sequence_need_positions():
    model = drawn(FLAVORS["tiny"])
    model.layers["0"].attention.inner_attention.group = object()
    with pytest.raises(ValueError, match=r"positions: expected those of this rank's tokens .*, got None"):
        model(torch.zeros(1, 4, dtype=torch.int64))
