"""softpick train: recipes, token files, streams, resuming, ranks."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


from softpick import NORMALIZERS
from softpick.experiment.progress import Silent
from softpick.experiment.reading import DataError
from softpick.training import engine
from softpick.training.data import train_tokenizer
from softpick.training.pretrain import train
from softpick.training.recipes import RECIPES, RecipeError, get_recipe
from softpick.training.token_files import StreamedSequences, TokenFile, collator, hub_documents, write_tokens

HERE = Path(__file__).parent
WORDS = [
    "the",
    "a",
    "of",
    "attention",
    "head",
    "key",
    "query",
    "value",
    "sum",
    "row",
    "weight",
    "token",
    "zero",
    "mass",
    "is",
]


def document(seed, words=120):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator).tolist())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(document(i))
    return folder


@pytest.fixture
def recipe(corpus):
    return replace(
        get_recipe("tiny_cpu"), data=str(corpus), width=32, intermediate=64, vocab_size=300, sequence_length=32, steps=12,
        warmup_steps=3, batch_size=8, micro_batch_size=8, log_every=2, save_every=4, evaluate_every=6, probe_every=6,
        probe_sequences=2, validation_sequences=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([document(i) for i in range(20)], 300)


def entries(folder, kind="train"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(folder):
    return {entry["step"]: entry["loss"] for entry in entries(folder)}


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads", "rate", "warmup", "steps"),
    [("paper_340m", 24, 1024, 16, 3e-4, 1000, 100_000), ("paper_1_8b", 32, 2048, 32, 2e-4, 2000, 200_000)],
)
def test_paper_recipes_are_table_4(name, layers, width, heads, rate, warmup, steps):
    recipe = get_recipe(name)
    assert (recipe.layers, recipe.width, recipe.heads) == (layers, width, heads)
    assert (recipe.learning_rate, recipe.warmup_steps, recipe.steps) == (rate, warmup, steps)
    assert (recipe.sequence_length, recipe.vocab_size, recipe.batch_size, recipe.max_grad_norm) == (4096, 32000, 128, 1)
    assert recipe.rope_theta == 10000
    assert not recipe.document_mask
    assert "fineweb-edu" in recipe.data


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_counts_its_parameters(name):
    recipe = get_recipe(name)
    with torch.device("meta"):
        from softpick.integrations.transformers import SoftpickLlamaConfig, SoftpickLlamaForCausalLM

        model = SoftpickLlamaForCausalLM(
            SoftpickLlamaConfig(
                vocab_size=recipe.vocab_size, hidden_size=recipe.width, intermediate_size=recipe.intermediate,
                num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, tie_word_embeddings=False,
            )
        )  # fmt: skip
    assert recipe.parameters == engine.parameter_count(model)
    target = {"paper_340m": 340e6, "paper_1_8b": 1.8e9}.get(name)
    assert target is None or abs(recipe.parameters / target - 1) < 0.12


def test_overrides():
    recipe = get_recipe("tiny_cpu").override(
        ["steps=50", "kv_heads=2", "data=none", "document_mask=yes", "normalizer=softmax"]
    )
    assert (recipe.steps, recipe.kv_heads, recipe.data, recipe.document_mask) == (50, 2, None, True)
    assert recipe == replace(get_recipe("tiny_cpu"), steps=50, kv_heads=2, document_mask=True, normalizer="softmax")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("step=5", "override: expected FIELD=VALUE with a field of layers"),
        ("steps", "override: expected FIELD=VALUE"),
        ("steps=many", "steps: expected int, got 'many'"),
        ("steps=0", "steps: expected at least 1, got 0"),
        ("compile=perhaps", "compile: expected bool, got 'perhaps'"),
        ("normalizer=sofmax", "normalizer: "),
        ("heads=3", "heads: expected width / heads even and whole, got 64 / 3"),
        ("kv_heads=3", "kv_heads: expected a divisor of 4 heads, got 3"),
        ("micro_batch_size=5", "micro_batch_size: expected a divisor of batch_size 16, got 5"),
        ("learning_rate=nan", "learning_rate: expected a number > 0"),
        ("max_grad_norm=0", "max_grad_norm: expected a number > 0, got 0.0"),
        ("save_every=7", "save_every: expected a multiple of log_every 10, got 7"),
        ("dtype=half", "dtype: expected one of bfloat16, float32; got 'half'"),
        ("parallel=pipeline", "parallel: expected one of none, ddp, fsdp; got 'pipeline'"),
        ("tensor_parallel=3", "tensor_parallel: expected a divisor of heads 4"),
        ("tensor_parallel=2 liger=yes", "liger: expected no beside tensor_parallel"),
        ("data_config=x", "data_config: is for hub data sets"),
    ],
)
def test_bad_overrides(assignment, message):
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        get_recipe("tiny_cpu").override(assignment.split())
    with pytest.raises(RecipeError, match="recipe: expected one of tiny_cpu"):
        get_recipe("tiny")


# ---------------------------------------------------------------------------------------------------------------------
# Data


def test_token_file_and_stream_hold_the_same_sequences(tmp_path, tokenizer):
    texts = [document(i, 30 + 7 * i) for i in range(9)]
    expected = []
    for text in texts:
        expected += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    expected = torch.tensor(expected)

    write_tokens(tmp_path / "x.tokens", tokenizer, texts, Silent(), "", len(texts))
    file = TokenFile(tmp_path / "x.tokens", 17, len(tokenizer), tokenizer.bos_token_id)
    assert len(file) == len(expected) // 16
    for i, row in enumerate(file[j] for j in range(len(file))):
        assert row[0] == tokenizer.bos_token_id
        assert torch.equal(row[1:], expected[16 * i : 16 * (i + 1)])
    assert not list(tmp_path.glob(".*"))

    rows = list(StreamedSequences(lambda: texts, tokenizer, 17))
    assert torch.equal(torch.stack(rows), torch.stack([file[i] for i in range(len(file))]))
    rest = list(StreamedSequences(lambda: texts, tokenizer, 17, skip=3, at_most=4))
    assert torch.equal(torch.stack(rest), torch.stack(rows[3:7]))


def test_token_file_is_wide_enough_for_its_vocabulary(tmp_path):
    class Wide:
        eos_token_id, all_special_ids, all_special_tokens = 70_001, (), ()

        def __call__(self, texts, **_):
            return {"input_ids": [[70_000, 3] for _ in texts]}

        def __len__(self):
            return 70_002

    write_tokens(tmp_path / "x.tokens", Wide(), ["a", "b"], Silent(), "", 2)
    assert TokenFile(tmp_path / "x.tokens", 7, 70_002, 5)[0].tolist() == [5, 70_000, 3, 70_001, 70_000, 3, 70_001]
    with pytest.raises(DataError, match=r"6 tokens .* too few for one sequence of 8"):
        TokenFile(tmp_path / "x.tokens", 8, 70_002, 5)


@pytest.mark.parametrize("scaled", [False, True])  # a mask, because visible keys are counted
@pytest.mark.parametrize("normalizer", ["softpick", "softmax", "learned_sink"])
def test_document_mask_is_documents_alone(normalizer, scaled):
    """The loss of a packed row is the loss of its documents, each run by itself from position 0."""
    eos = 1
    options = {"vocab_size": 32, "layers": 2, "heads": 2, "width": 16, "sequence_length": 24}
    model = engine.build_model(normalizer, **options, seed=0, eos=eos, score_scale=scaled, output_gate=True)
    generator = torch.Generator().manual_seed(1)
    row = torch.randint(2, 32, (24,), generator=generator)
    row[0], row[7], row[8], row[17] = 0, eos, eos, eos  # one document is nothing but its end
    other = row.roll(5)
    loss = model(**collator(True, eos)([row])).loss

    total, targets = 0.0, 0
    for start, stop in ((0, 8), (8, 9), (9, 18), (18, 24)):
        ids = row[None, start:stop]
        logits = model(input_ids=ids).logits[0, :-1]
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum") if ids.shape[1] > 1 else 0
        targets += ids.shape[1] - 1
    torch.testing.assert_close(loss, total / targets, atol=1e-6, rtol=1e-6)
    assert (model(**collator(False, eos)([row])).loss - loss).abs() > 1e-4

    rows = [collator(True, eos)([r]) for r in (row, other)]
    counts = torch.tensor([float((r["labels"][:, 1:] >= 0).sum()) for r in rows])
    apart = torch.stack([model(**r).loss for r in rows])
    torch.testing.assert_close(model(**collator(True, eos)([row, other])).loss, (apart * counts).sum() / counts.sum())


def test_hub_data_without_network(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        DataError, match=r"cannot read the hub data set 'nobody/nothing' .*data=none for the built-in corpus"
    ):
        hub_documents("nobody/nothing", None, "text")


def test_a_hub_data_set_is_streamed(tmp_path, corpus, recipe, monkeypatch):
    """datasets reads a local folder by the same call that reads the hub; a resumed run gets the rest of the same stream."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": document(i)}) + "\n" for i in range(60)))
    streamed = replace(recipe, data=f"hub:{folder}", probe_every=0)
    whole = train(streamed, tmp_path / "whole", device="cpu")
    assert "streamed" not in whole["data"]
    assert "Hugging Face data set" in whole["data"]
    stopped(streamed, tmp_path / "cut", after=4)
    train(streamed, tmp_path / "cut", device="cpu")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    with pytest.raises(DataError, match=r"expected more than validation_sequences = 9999 sequences .*, got [1-9]"):
        train(replace(streamed, validation_sequences=9999), tmp_path / "short", device="cpu")
    with pytest.raises(DataError, match=r"no text field 'body' .found text.; see text_field"):
        train(replace(streamed, text_field="body"), tmp_path / "other", device="cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Runs


class _Stopper(Silent):
    """Asks to stop after a step."""

    def __init__(self, after):
        super().__init__()
        self.after, self.stop = after, engine.StopRequest()

    def update(self, step, loss, note=""):
        if loss is not None and step >= self.after:
            self.stop.requested = True


def stopped(recipe, output, after, **options):
    """Run until a step, and stop there as Ctrl-C does."""
    reporter = _Stopper(after)
    reporter.progress = lambda *_: _Entered(reporter)
    with pytest.raises(engine.Interrupted):
        train(recipe, output, device="cpu", reporter=reporter, stop=reporter.stop, **options)


class _Entered:
    def __init__(self, value):
        self.value = value

    def __enter__(self):
        return self.value

    def __exit__(self, *_):
        return None


@pytest.mark.thinned(every=2)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_every_normalizer_trains_and_its_model_loads(tmp_path, recipe, normalizer):
    result = train(replace(recipe, normalizer=normalizer), tmp_path, device="cpu")
    assert result["validation_loss"] < math.log(300) - 0.5
    assert {entry["step"] for entry in entries(tmp_path, "probe")} == {6, 12}
    probe = entries(tmp_path, "probe")[-1]
    assert (
        probe["zero_rows"] == 0 if normalizer.startswith("softmax") or "sink" in normalizer else probe["zero_rows"] >= 0
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", "metrics.jsonl", "model", "results.json", "tokenizer", "train.tokens", "validation.tokens",
    ]  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text())["validation_loss"] == result["validation_loss"]
    assert json.loads((tmp_path / "model/config.json").read_text())["normalizer"] == normalizer
    card = (tmp_path / "model/README.md").read_text()
    assert f"| validation loss | {result['validation_loss']:.4f} |" in card
    assert "import softpick.integrations.transformers" in card


def test_the_exported_model_is_the_trained_one(tmp_path, recipe):
    """In another process, after the import that the card names, it has the loss that was reported."""
    result = train(replace(recipe, output_gate=True, score_scale=True), tmp_path, device="cpu")
    script = f"""
import softpick.integrations.transformers, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from softpick.training.token_files import TokenFile
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r})
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "model")!r})
path = Path({str(tmp_path / "validation.tokens")!r})
rows = TokenFile(path, 32, len(tokenizer), tokenizer.bos_token_id, 8)
ids = torch.stack([rows[i] for i in range(len(rows))])
print(model(input_ids=ids, labels=ids).loss.item(), model.config.normalizer, type(model).__name__)
"""
    out = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    ).stdout.split()
    assert float(out[0]) == pytest.approx(result["validation_loss"], abs=1e-5)
    assert out[1:] == ["softpick", "SoftpickLlamaForCausalLM"]


def test_the_same_batches_by_accumulation(tmp_path, recipe):
    train(recipe, tmp_path / "one", device="cpu")
    train(replace(recipe, micro_batch_size=2), tmp_path / "four", device="cpu")
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert one.keys() == four.keys()
    assert all(abs(one[step] - four[step]) < 2e-3 for step in one)
    assert abs(one[2] - four[2]) < 1e-5


def test_a_stopped_run_continues_bit_equal(tmp_path, recipe):
    pytest.importorskip("tensorboard")
    whole = train(recipe, tmp_path / "whole", device="cpu")
    stopped(recipe, tmp_path / "cut", after=6, tensorboard=True)
    assert not (tmp_path / "cut/model").exists()
    again = train(recipe, tmp_path / "cut", device="cpu", tensorboard=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert [e["grad_norm"] for e in entries(tmp_path / "cut")] == [e["grad_norm"] for e in entries(tmp_path / "whole")]
    assert again["validation_loss"] == whole["validation_loss"]
    assert again["probes"] == whole["probes"]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "cut/tensorboard"))
    events.Reload()
    found = {e.step: e.value for e in events.Scalars("train/loss")}
    assert found == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
    assert [e.step for e in events.Scalars("probe/sink_first_0.3")] == [6, 12]

    seen = train(recipe, tmp_path / "cut", device="cpu")  # done: nothing is trained again
    assert seen == json.loads((tmp_path / "cut/results.json").read_text())


@pytest.mark.long
def test_killed_at_any_moment(tmp_path, recipe):
    """SIGKILL, wherever it strikes: the same command goes on, and the losses are those of a run that was never killed."""
    recipe = replace(recipe, steps=40, save_every=2, probe_every=0, evaluate_every=0)
    train(recipe, tmp_path / "whole", device="cpu")
    fields = [f"{key}={value}" for key, value in recipe.to_json().items() if key != "name" and value is not None]
    command = [sys.executable, "-m", "softpick", "train", "tiny_cpu", *fields, "--output", str(tmp_path / "cut")]
    delays = iter((0.05, 0.37, 0.11))
    for _ in range(3):
        process = subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = engine.last_checkpoint(tmp_path / "cut/checkpoints")
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if engine.last_checkpoint(tmp_path / "cut/checkpoints") != before:
                time.sleep(next(delays))  # into the steps and checkpoints that follow
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "cut/results.json").exists():
            break
        checkpoint = engine.last_checkpoint(tmp_path / "cut/checkpoints")
        assert checkpoint is not None
        last = max(losses(tmp_path / "cut"), default=0)
        assert int(checkpoint.name.rpartition("-")[2]) >= last - 2  # at most the steps since the last checkpoint
    train(recipe, tmp_path / "cut", device="cpu")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_checkpoint_cut_short_is_none(tmp_path, recipe):
    stopped(recipe, tmp_path, after=6)
    checkpoints = tmp_path / "checkpoints"
    newest = engine.last_checkpoint(checkpoints)
    assert newest.name == "checkpoint-8"
    (newest / "complete.json").unlink()  # what a kill during the writing leaves
    (newest / "optimizer.pt").write_bytes(b"")
    assert engine.last_checkpoint(checkpoints).name == "checkpoint-4"
    result = train(recipe, tmp_path, device="cpu")
    assert result["validation_loss"] < math.log(300)


def test_a_checkpoint_cut_short_never_costs_a_complete_one(tmp_path, recipe, monkeypatch):
    stopped(recipe, tmp_path, after=4)
    checkpoints = tmp_path / "checkpoints"
    assert {p.name for p in checkpoints.iterdir()} == {"checkpoint-4", "checkpoint-6"}
    (checkpoints / "checkpoint-6/complete.json").unlink()  # killed while it wrote this one
    with monkeypatch.context() as patch:
        patch.setattr(engine._Watch, "on_save", interrupt)  # and again, before the next was marked
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path, device="cpu")
    assert engine.last_checkpoint(checkpoints).name == "checkpoint-4"
    train(recipe, tmp_path, device="cpu")


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["config.json", "results.json"])
def test_killed_while_a_file_is_written(tmp_path, recipe, monkeypatch, name):
    """Before the folder is known as a run, and between the model and the results."""
    write = engine.write_json

    def interrupted(path, value):
        if path.name == name:
            path.with_name(f".{name}.tmp").write_text("{")
            raise KeyboardInterrupt
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_json", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path, device="cpu")
    result = train(recipe, tmp_path, device="cpu")
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(result))
    assert (tmp_path / "model/model.safetensors").exists()


def test_a_folder_holds_one_run(tmp_path, recipe):
    stopped(recipe, tmp_path / "run", after=4)
    with pytest.raises(RecipeError, match=r"holds a run of another recipe .*seed: 0 there, 1 now"):
        train(replace(recipe, seed=1), tmp_path / "run", device="cpu")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(RecipeError, match="is not empty and holds no run"):
        train(recipe, tmp_path / "mine", device="cpu")
    assert (tmp_path / "mine/thesis.txt").read_text() == "x"
    with pytest.raises(RecipeError, match="is a file"):
        train(recipe, tmp_path / "mine/thesis.txt", device="cpu")
    with pytest.raises(RecipeError, match="parallel: ddp needs torchrun"):
        train(replace(recipe, parallel="ddp"), tmp_path / "new", device="cpu")
    with pytest.raises(RecipeError, match="tensor_parallel: expected as many ranks, 2, got 1"):
        train(replace(recipe, tensor_parallel=2), tmp_path / "new", device="cpu")
    with pytest.raises(RecipeError, match="expected auto, cpu, cuda or mps"):
        train(recipe, tmp_path / "new", device="gpu")
    with pytest.raises(RecipeError, match="fewer than a batch of 8192"):
        train(replace(recipe, batch_size=8192, micro_batch_size=8), tmp_path / "new", device="cpu")


def spoil(monkeypatch, bad_steps):
    """A gradient of these optimizer steps is not a number."""
    clip, steps = engine._Trainer._clip_grad_norm, itertools.count(1)

    def spoiled(self, model):
        if next(steps) in bad_steps:
            model.get_parameter("model.layers.0.mlp.up_proj.weight").grad[0] = float("nan")
        return clip(self, model)

    monkeypatch.setattr(engine._Trainer, "_clip_grad_norm", spoiled)


def test_steps_without_a_finite_gradient_are_skipped(tmp_path, recipe, monkeypatch):
    spoil(monkeypatch, {3, 4, 9})
    result = train(recipe, tmp_path, device="cpu")
    assert math.isfinite(result["validation_loss"])
    assert [e["skipped_steps"] for e in entries(tmp_path)] == [0, 2, 2, 2, 3, 3]
    assert all(math.isfinite(e["loss"]) and math.isfinite(e["grad_norm_max"]) for e in entries(tmp_path))


def test_skipped_steps_are_counted_on_after_a_stop(tmp_path, recipe, monkeypatch):
    spoil(monkeypatch, {3, 9})  # calls: the continued run makes the steps after the checkpoint only
    stopped(recipe, tmp_path, after=4)
    train(recipe, tmp_path, device="cpu")
    assert [e["skipped_steps"] for e in entries(tmp_path)] == [0, 1, 1, 1, 2, 2]


def test_training_ends_when_no_gradient_is_finite(tmp_path, recipe, monkeypatch):
    spoil(monkeypatch, set(range(5, 100)))
    said = r"3 steps in a row had no finite gradient, up to step 7; the last loss logged was \d.*: model.layers.0.mlp.up_proj"
    with pytest.raises(engine.NonFinite, match=said):
        train(replace(recipe, max_skipped=3), tmp_path, device="cpu")
    assert not (tmp_path / "model").exists()
