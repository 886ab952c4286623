"""softpick convert: a model trained with softmax gets softpick, is killed, goes on, and is saved for what it is."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

import softpick
from softpick.conversion import generation, models, stages
from softpick.conversion.convert import convert
from softpick.conversion.recipes import RECIPES, ConvertError, ConvertSettings
from softpick.experiment.perplexity import standard_error
from softpick.integrations.transformers import normalizer_of
from softpick.training import engine
from softpick.training.data import SequenceDataset, make_sequences, train_tokenizer

TEXT = [f"def function_{i}(a, b):\n    return a * {i} + b - {i * i}\n" * 6 for i in range(60)]
LENGTH = 48


def llama(implementation, **more):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=270, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, **more,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A trained softmax model with its text, and the loss of a softpick model that was trained from the same weights."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = train_tokenizer(TEXT, 270)
    for name, texts in (("text", TEXT[:54]), ("held", TEXT[54:])):
        (home / name).mkdir()
        for i, text in enumerate(texts):
            (home / name / f"{i:03}.txt").write_text(text)
    train, held = (SequenceDataset(make_sequences(tokenizer, t, LENGTH)) for t in (TEXT[:54], TEXT[54:]))
    losses = {}
    for implementation in ("sdpa", "softpick"):
        model = llama(implementation)
        arguments = engine.training_arguments(
            home / "checkpoints", steps=150, batch_size=8, learning_rate=5e-3, weight_decay=0.1, seed=0, warmup_steps=10
        )
        losses[implementation] = engine.train(model, arguments, train, held).validation_loss
        if implementation == "sdpa":
            model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, bos_token_id=0, eos_token_id=1)
            model.save_pretrained(home / "teacher")
            tokenizer.save_pretrained(home / "teacher")
    return home, losses


def settings(home, **given):
    values = {
        "data": str(home / "text"), "validation_data": str(home / "held"), "align_steps": 20, "distil_steps": 20,
        "align_sequence_length": LENGTH, "distil_sequence_length": LENGTH, "align_batch_size": 8, "distil_batch_size": 8,
        "micro_batch_size": 8, "align_learning_rate": 1e-3, "distil_learning_rate": 1e-3, "attention_rate": 1.0,
        "warmup_steps": 2, "extraction": 0,
        "save_every": 10, "samples": 0, "prompts": 2, "prompt_tokens": 16, "continuation_tokens": 8, "device": "cpu",
    }  # fmt: skip
    return ConvertSettings.of_recipe(str(home / "teacher"), **(values | given))


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "finished"
    return output, convert(settings(home[0]), output)


def held_out(folder):
    """The held-out sequences."""
    return make_sequences(AutoTokenizer.from_pretrained(folder), TEXT[54:], LENGTH)[
        : RECIPES["quick_cpu"]()["validation_sequences"]
    ]


def held_out_loss(folder):
    """Of a checkpoint, as it is read back."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = held_out(folder)
    with torch.no_grad():
        logits = model(rows).logits[:, :-1]
    return pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())), rel=1e-4)


def pair(home, normalizer="softpick", **given):
    """Teacher, student, names of attention layers, settings."""
    teacher = AutoModelForCausalLM.from_pretrained(home / "teacher").requires_grad_(False)
    layers = models.attention_layers(teacher)
    return teacher, models.make_student(teacher, layers, normalizer), layers, settings(home, **given)


@pytest.fixture
def ids():
    return torch.randint(2, 270, (3, 20), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------------------------------
# The whole command


def test_reaches_a_model_that_was_trained_with_softpick(home, finished):
    losses = finished[1]["losses"]
    assert losses["distil"] < 1.03 * home[1]["softpick"]
    teacher, student, layers, given = pair(home[0])
    module = stages.Distiller(teacher, student, stages.Penalties(given, student, layers, False))
    with torch.no_grad():
        swapped = float(module(held_out(home[0] / "teacher"))["loss"])
    assert finished[1]["stages"]["distil"]["validation_loss"] < 0.6 * swapped  # KL divergence from the teacher


def test_the_checkpoint_is_taken_for_nothing_else(home, finished):
    teacher, output = home[0] / "teacher", finished[0] / "model"
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "llama_with_softpick"
    assert config["architectures"] == ["LlamaForCausalLM_with_softpick"]
    model = AutoModelForCausalLM.from_pretrained(output)
    assert normalizer_of(model) == "softpick"
    assert finished[1]["losses"]["distil"] == held_out_loss(output)
    assert model.generation_config.to_diff_dict() == GenerationConfig.from_pretrained(teacher).to_diff_dict()
    assert (output / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(output)("def f").input_ids[0] == 0
    before = AutoModelForCausalLM.from_pretrained(teacher)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        changed, old = (m.model.layers[1].get_submodule(name).weight for m in (model, before))
        assert not torch.equal(changed, old)


def test_the_folder_has_what_was_made_and_nothing_else(finished, home):
    output, result = finished
    assert sorted(p.name for p in output.iterdir()) == ["config.json", "model", "report.html", "results.json"]
    assert result["stages"]["align"]["tokens"] == 20 * 8 * LENGTH
    written = result["generation"]
    assert written["teacher"]["teacher_log_probability"] < 0
    assert len(written["student"]["examples"]) == 2
    assert written["difference"]["teacher_log_probability"] == pytest.approx(
        written["student"]["teacher_log_probability"] - written["teacher"]["teacher_log_probability"]
    )
    assert all(written[name]["standard_error"] > 0 for name in ("teacher", "student"))
    again = convert(settings(home[0]), output)
    assert again["losses"] == result["losses"]
    with pytest.raises(ConvertError, match=r"other settings \(distil_steps: 20 there, 31 now\)"):
        convert(settings(home[0], distil_steps=31), output)


def test_killed_and_continued_gives_the_same_weights(home, finished, tmp_path, monkeypatch):
    output = tmp_path / "killed"
    for kind, call in (("Aligner", 14), ("Distiller", 17)):
        step = getattr(stages, kind).forward
        calls = []

        def forward(self, input_ids, labels=None, step=step, calls=calls, call=call):
            calls.append(None)
            if len(calls) == call:
                raise SystemExit("killed")
            return step(self, input_ids, labels)

        with monkeypatch.context() as patch:
            patch.setattr(f"softpick.conversion.stages.{kind}.forward", forward)
            with pytest.raises(SystemExit):
                convert(settings(home[0]), output)
    result = convert(settings(home[0]), output)
    assert result["losses"] == finished[1]["losses"]
    assert (output / "model/model.safetensors").read_bytes() == (finished[0] / "model/model.safetensors").read_bytes()


def test_trained_embeddings_are_untied_and_the_third_stage_needs_no_teacher(home, tmp_path):
    made = settings(
        home[0], embeddings="trained", align_steps=0, distil_steps=2, lengthen_steps=2, lengthen_sequence_length=64,
        lengthen_batch_size=4, distil_batch_size=4, micro_batch_size=2, gradient_checkpointing=True, dtype="bfloat16",
    )  # fmt: skip
    result = convert(made, tmp_path / "out")
    assert set(result["losses"]) == {"teacher", "swapped", "distil", "lengthen"}
    assert result["losses"]["lengthen"] == held_out_loss(tmp_path / "out/model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert AutoConfig.from_pretrained(tmp_path / "out/model").tie_word_embeddings is False
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


# ---------------------------------------------------------------------------------------------------------------------
# What is minimized


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_stage_1_is_the_distance_of_what_attention_layers_return(kind, ids):
    small = {
        "vocab_size": 270,
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    more = {
        "llama": {},
        "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4},
        "gemma2": {"num_key_value_heads": 2, "head_dim": 8},
    }[kind]
    config = AutoConfig.for_model(kind, **(small | more))
    teacher = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    layers = models.attention_layers(teacher)
    assert len(layers) == 2
    student = models.make_student(teacher, layers, "softpick")
    given = ConvertSettings.of_recipe("-", device="cpu")
    aligner = stages.Aligner(teacher, student, layers, stages.Penalties(given, student, layers, False))
    seen = {}
    for name in layers:

        def keep(module, args, kwargs, output, name=name):
            seen[name] = (args, kwargs, output)

        teacher.get_submodule(name).register_forward_hook(keep, with_kwargs=True)
    loss = aligner(ids)["loss"]
    expected = []
    for name, (args, kwargs, output) in seen.items():
        ours, theirs = student.get_submodule(name)(*args, **kwargs)[0], output[0]
        distance = sum(
            math.dist(a, b) for a, b in zip(ours.flatten(0, 1).tolist(), theirs.flatten(0, 1).tolist(), strict=True)
        )
        norm = math.sqrt(float((theirs.double() ** 2).sum()) / theirs[..., 0].numel())
        expected.append(distance / theirs[..., 0].numel() / norm)
    assert float(loss.detach()) == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for name in layers for p in student.get_submodule(name).parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_stage_1_alone_lowers_the_distance(home, finished):
    teacher, student, layers, given = pair(home[0])
    aligner = stages.Aligner(teacher, student, layers, stages.Penalties(given, student, layers, False))
    held = held_out(home[0] / "teacher")
    with torch.no_grad():
        before = float(aligner(held)["loss"])
    after = finished[1]["stages"]["align"]
    assert after["validation_loss"] < 0.8 * before
    assert set(after["layers"]) == set(layers)


@pytest.mark.parametrize("chunk", [1 << 24, 30])
def test_divergence_and_its_gradient(chunk, monkeypatch):
    monkeypatch.setattr(stages, "_CHUNK", chunk)
    student, teacher = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 7)
    other = student.detach().clone().requires_grad_()
    expected = F.kl_div(other.log_softmax(-1).flatten(0, 1), teacher.softmax(-1).flatten(0, 1), reduction="batchmean")
    found = stages.divergence(student, teacher.clone())
    torch.testing.assert_close(found, expected)
    (3 * found).backward()
    (3 * expected).backward()
    torch.testing.assert_close(student.grad, other.grad)


def test_penalties_are_what_they_say(home, ids):
    _, student, layers, given = pair(home[0], sink_mass=2.0, sink_value=0.5, activation=0.25, activation_limit=3.0)
    penalties = stages.Penalties(given, student, layers, True)
    shares, norms, excess = [], [], []
    with torch.no_grad():
        with penalties.watching():
            student(input_ids=ids, use_cache=False)
        student.set_attn_implementation("softpick")
        out = student(input_ids=ids, use_cache=False, output_attentions=True, output_hidden_states=True)
        for weights in out.attentions:
            first = weights[:, :, 1:, 0] / (weights[:, :, 1:].sum(-1) + 0.1)
            shares.append(float(first.mean()))
        for layer, states in zip(student.model.layers, out.hidden_states[:-1], strict=True):
            value = layer.self_attn.v_proj(layer.input_layernorm(states)).unflatten(-1, (2, 8)).norm(dim=-1)
            norms.append(float((value[:, 0] / value.mean(1)).mean()))
    hidden = []
    for layer in student.model.layers:
        layer.register_forward_hook(lambda module, args, output: hidden.append(output))
    with torch.no_grad():
        student(input_ids=ids, use_cache=False)
    for states in hidden:
        typical = sorted(float((token**2).mean().sqrt()) for row in states for token in row)[(ids.numel() - 1) // 2]
        total = sum(max(0.0, math.log(abs(x) / (3 * typical))) for x in states.flatten().tolist())
        excess.append(total / len(ids))
    assert sum(excess) > 0
    expected = 2.0 * sum(shares) / 2 + 0.5 * sum(norms) / 2 + 0.25 * sum(excess) / 2
    assert float(penalties.total()) == pytest.approx(expected, rel=1e-4)


def test_a_penalty_on_the_sink_takes_its_mass(home, ids):
    mass = {}
    for weight in (0.0, 5.0):
        teacher, student, layers, given = pair(home[0], sink_mass=weight)
        penalties = stages.Penalties(given, student, layers, False)
        aligner = stages.Aligner(teacher, student, layers, penalties)
        optimizer = torch.optim.Adam(aligner.parameters(), 3e-3)
        for _ in range(15):
            optimizer.zero_grad()
            aligner(ids)["loss"].backward()
            optimizer.step()
        looking = stages.Penalties(replace(given, sink_mass=1.0), student, layers, False)
        with torch.no_grad(), looking.watching():
            student(input_ids=ids, use_cache=False)
        mass[weight] = float(looking.total())
    assert mass[5.0] < 0.5 * mass[0.0]


def test_attention_layers_have_a_learning_rate_of_their_own(home):
    teacher, student, layers, given = pair(
        home[0], distil_learning_rate=1e-3, attention_rate=5.0, align_learning_rate=1e-2
    )
    penalties = stages.Penalties(given, student, layers, False)
    aligner = stages.Aligner(teacher, student, layers, penalties)
    (group,) = stages.parameter_groups(given, "align", layers)(aligner)
    assert group["lr"] == 1e-2
    assert len(group["params"]) == 2 * 4
    models.own_weights(teacher, student, given)
    module = stages.Distiller(teacher, student, penalties)
    first, second = stages.parameter_groups(given, "distil", layers)(module)
    assert {id(p) for p in first["params"]} == {id(p) for n in layers for p in student.get_submodule(n).parameters()}
    assert (first["lr"], second["lr"]) == (5e-3, 1e-3)
    names = {name for name, p in module.named_parameters() if p.requires_grad}
    assert len(first["params"]) + len(second["params"]) == len(names)
    assert names == set(module.state_dict()) == {n for n, _ in module.named_parameters() if "embed" not in n}
    assert {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in student.parameters()} == {
        teacher.lm_head.weight.data_ptr()
    }


def test_generation_figures():
    texts = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8]])
    assert generation.repetition(texts) == pytest.approx(10.0)  # 1 of 10
    assert generation.agreement(texts, torch.tensor([[1, 2, 9, 4, 1, 2, 3, 4]] * 2)) == pytest.approx(25.0)
    model = llama("sdpa").eval()
    prompts = torch.randint(2, 270, (3, 6))
    model.generation_config = GenerationConfig(do_sample=True, temperature=3.0, eos_token_id=5)
    made = generation.continuations(model, prompts, 5)
    ids, total = prompts, 0.0
    with torch.no_grad():
        for _ in range(5):
            logits = model(ids).logits[:, -1].log_softmax(-1)
            total += float(logits.max(-1).values.sum())
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(made, ids[:, 6:])
    found = generation.likelihood(model, prompts, made)
    assert found.shape == (3,)
    assert float(found.mean()) == pytest.approx(total / 15, rel=1e-4)
    assert standard_error(torch.tensor([1.0, 2.0, 4.0, 5.0])) == pytest.approx((10 / 3) ** 0.5 / 2)
    assert standard_error(torch.ones(1)) is None


@pytest.mark.parametrize(
    ("count", "length", "starts"),
    [
        (2, 4, [(0, 0), (1, 0)]),
        (3, 4, [(0, 0), (1, 0), (2, 0)]),
        (5, 4, [(0, 0), (1, 0), (2, 0), (0, 5), (1, 5)]),
        (50, 4, [(row, at) for at in (0, 5) for row in range(3)]),
        (7, 3, [(row, at) for at in (0, 3, 6) for row in range(3)][:7]),
        (4, 10, [(0, 0), (1, 0), (2, 0)]),  # as long as a sequence: one token less
        (0, 4, []),
    ],
)
@pytest.mark.parametrize("bos", [True, False])
def test_prompts_are_cut_from_the_whole_text(count, length, starts, bos):
    sequences = torch.arange(30).view(3, 10)
    if bos:
        sequences[:, 0] = 99
    prompts = generation.cut_prompts(sequences, count, length)
    length = min(length, 9)
    want = [[99 * bos or 10 * row + at, *range(10 * row + at + 1, 10 * row + at + length)] for row, at in starts]
    assert prompts.tolist() == want
    assert generation.cut_prompts(sequences[:0], count, length).shape[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("batches", [(1, 4), (6, 4), (4, 2), (32, 8), (3, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("recipe", ["quick_cpu", "radlads_small", "radlads_8b"])
def test_a_micro_batch_that_was_not_given_fits(recipe, batches):
    """``--align-batch-size 1`` was refused for a micro batch of 4 that nobody had asked for."""
    align, distil = batches
    made = ConvertSettings.of_recipe(
        "model", recipe, align_batch_size=align, distil_batch_size=distil, lengthen_steps=0
    )
    usual = ConvertSettings.of_recipe("model", recipe).micro_batch_size
    fitting = [n for n in range(1, usual + 1) if usual % n == align % n == distil % n == 0]
    assert made.micro_batch_size == max(fitting)
    unused = ConvertSettings.of_recipe("model", recipe, align_steps=0, align_batch_size=1)
    assert unused.micro_batch_size == usual  # of stages that are left out nothing is asked
    with pytest.raises(ConvertError, match="micro_batch_size: expected a divisor of align_batch_size 5, got 4"):
        ConvertSettings.of_recipe("model", recipe, align_batch_size=5, micro_batch_size=4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipe": "slow"}, "recipe: expected one of quick_cpu"),
        ({"normalizer": "softmix"}, "softmix"),
        ({"micro_batch_size": 3}, "micro_batch_size: expected a divisor of align_batch_size 8, got 3"),
        ({"align_steps": 0, "distil_steps": 0}, "at least one above 0"),
        ({"embeddings": "both"}, "embeddings: expected one of frozen, trained; got 'both'"),
        ({"sink_mass": 1.0, "gradient_checkpointing": True}, "gradient_checkpointing: expected no"),
        ({"speed": 1}, "speed: is no setting"),
        ({"align_learning_rate": 0.0}, "align_learning_rate: expected a number > 0"),
    ],
)
def test_settings_that_cannot_work(home, given, message):
    with pytest.raises(ConvertError, match=message):
        settings(home[0], **given)


def test_models_and_folders_that_do_not_fit(home, finished, tmp_path):
    with pytest.raises(
        ConvertError, match="learned_sink needs one sink logit a head, which LlamaForCausalLM does not have"
    ):
        convert(settings(home[0], normalizer="learned_sink"), tmp_path / "a")
    with pytest.raises(ConvertError, match="has softmax already"):
        convert(settings(home[0], normalizer="softmax"), tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c/letter.txt").write_text("mine")
    with pytest.raises(ConvertError, match="holds no run of softpick convert"):
        convert(settings(home[0]), tmp_path / "c")
    assert (tmp_path / "c/letter.txt").read_text() == "mine"


def test_every_recipe_gives_every_setting():
    for name in RECIPES:
        made = ConvertSettings.of_recipe("-", name, device="cpu", optimizer="adamw_torch")
        assert made.recipe == name
        assert made.stages == ("align", "distil")
    assert softpick.NORMALIZERS[made.normalizer]
