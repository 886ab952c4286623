"""The passkey with a model that can find it by construction, and perplexities against transformers' own loss."""

import math

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")

from evaluation_home import POSITIONS, finders, home, load  # noqa: F401 (fixtures)
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from softpick.analysis import attention_maps
from softpick.analysis.capture import watch_last_query
from softpick.evaluation import passkey as passkey_module
from softpick.evaluation.passkey import make_prompts, passkey, retrieving_heads, shortest_prompt
from softpick.evaluation.tasks import EvaluationError, starts_with_bos
from softpick.experiment import perplexity as perplexities
from softpick.experiment.perplexity import learned_positions, perplexity, perplexity_by_position, position_edges

# ---------------------------------------------------------------------------------------------------------------------
# Passkey


def test_the_prompt(finders):
    tokenizer, _ = finders
    prompts = make_prompts(tokenizer, 150, 40, seed=3, bos=1)
    for prompt in prompts:
        assert 150 - 2 <= len(prompt.ids) <= 150
        assert prompt.ids[0] == 1
        assert [tokenizer.decode([prompt.ids[i]]) for i in prompt.key_tokens] == [prompt.key, prompt.key]
        begin, before, line, after, question = prompt.text.split("\n")
        assert begin.startswith("There is an important info hidden inside a lot of irrelevant text.")
        assert line == f"The pass key is {prompt.key}. Remember it. {prompt.key} is the pass key."
        assert question == "What is the pass key? The pass key is"
        assert abs(len(before) - prompt.depth * (len(before) + len(after))) < 1
        assert (passkey_module._FILLER * 9).startswith(before)
        assert (passkey_module._FILLER * 9).startswith(after)
    assert len({prompt.key for prompt in prompts}) > 35
    depths = [prompt.depth for prompt in prompts]
    assert min(depths) < 0.2
    assert max(depths) > 0.8
    assert prompts == make_prompts(tokenizer, 150, 40, seed=3, bos=1)
    assert prompts[0].key != make_prompts(tokenizer, 150, 1, seed=4, bos=1)[0].key


def test_keys_do_not_depend_on_the_tokenizer(home, finders):
    subject = load(home, "softpick")
    ours = make_prompts(subject.tokenizer, 500, 6, seed=0)
    theirs = make_prompts(finders[0], 500, 6, seed=0)
    assert [(p.key, p.depth) for p in ours] == [(p.key, p.depth) for p in theirs]
    for prompt in ours:  # a key of several tokens, twice
        digits = "".join(subject.tokenizer.decode([prompt.ids[i]]) for i in prompt.key_tokens)
        assert digits.replace(" ", "") == prompt.key * 2


@pytest.mark.parametrize("name", ["softmax", "softpick"])
def test_a_model_that_finds_the_key_and_the_head_that_does(finders, name):
    tokenizer, made = finders
    found = passkey(made[name], tokenizer, 200, count=12, batch_size=5, seed=1)
    assert found["accuracy"] == 100
    assert found["correct"] == 12
    assert (
        sum(part["correct"] for part in found["by_depth"]) == sum(part["prompts"] for part in found["by_depth"]) == 12
    )
    best, other = retrieving_heads(found)
    assert (best["layer"], best["head"]) == (0, 0)
    # the key is named twice: half of the weight each; head 1 sees no differences, softpick gives it nothing
    assert best["key_weight"] == pytest.approx(1, abs=0.01)
    assert best["largest"] == pytest.approx(0.5, abs=0.01)
    assert other["mass"] == pytest.approx(1.0 if name == "softmax" else 0.0, abs=1e-6)
    assert other["key_share"] == pytest.approx(2 / 200 if name == "softmax" else 0.0, abs=2e-3)
    # the answer is one token, so both kinds of queries are the same
    assert found["heads"]["first"] == found["heads"]["answer"]


def test_a_model_that_cannot(finders):
    tokenizer, made = finders
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    ).eval()
    assert passkey(model, tokenizer, 120, count=6)["accuracy"] == 0
    blind = made["softpick"]
    key = blind.model.layers[0].self_attn.k_proj.weight
    kept = key.data.clone()
    key.data.neg_()  # the same model, whose keys point away
    try:
        assert passkey(blind, tokenizer, 120, count=6)["accuracy"] == 0
    finally:
        key.data.copy_(kept)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 123", True),
        ("123.", True),
        (" 1234", False),
        (" 12", False),
        (" is 123", False),
        ("", False),
        ("123 123", True),
    ],
)
def test_what_counts_as_an_answer(text, right):
    assert passkey_module._is_key(text, "123") is right


@pytest.mark.parametrize("name", ["softmax", "softpick", "gpt2", "linear_softpick"])
def test_heads_are_those_of_the_full_maps(home, name):
    """Mass, largest weight and weight on the key, from whole maps of prompt and answer, one prompt at a time."""
    subject = load(home, "softpick" if name == "linear_softpick" else name)
    model, tokenizer = subject.model, subject.tokenizer
    if name == "linear_softpick":  # some weights are negative
        model.set_attn_implementation(name)
    bos = starts_with_bos(model, tokenizer)
    shortest = shortest_prompt(tokenizer, bos)
    length = next(  # with prompts of different lengths, so that some are padded
        n
        for n in range(shortest, shortest + 60)
        if len({len(prompt.ids) for prompt in make_prompts(tokenizer, n, 3, seed=2, bos=bos)}) > 1
    )
    assert length < 390  # GPT-2 has 400 positions
    prompts = make_prompts(tokenizer, length, 3, seed=2, bos=bos)
    found = passkey(model, tokenizer, length, count=3, batch_size=3, seed=2)
    assert found == passkey(model, tokenizer, length, count=3, batch_size=3, seed=2)
    want = {"first": [], "answer": []}
    for prompt, answer in zip(prompts, found["answers"], strict=True):
        plain = tokenizer("The pass key is", add_special_tokens=False)["input_ids"]
        size = len(tokenizer(f"The pass key is {prompt.key}", add_special_tokens=False)["input_ids"]) - len(plain)
        ids = list(prompt.ids)
        with torch.no_grad():
            for _ in range(size):  # without a cache, without padding
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer["answer"].startswith(tokenizer.decode(ids[len(prompt.ids) :]).split("<eos>")[0].rstrip("\ufffd"))
        maps = attention_maps(model, torch.tensor(ids))
        rows = maps[:, :, len(prompt.ids) - 1 : len(prompt.ids) - 1 + size]
        on_key = rows[..., list(prompt.key_tokens)]
        mass, moved = rows.abs().sum(3), on_key.abs().sum(3)
        assert bool((rows < 0).any()) is (name == "linear_softpick")
        figures = torch.stack([on_key.sum(3), torch.where(mass > 0, moved / mass, 0.0), rows.sum(3), rows.amax(3)])
        want["first"].append(figures[..., :1])
        want["answer"].append(figures)
    for kind, parts in want.items():
        expected = torch.cat(parts, dim=3).mean(3)
        for index, figure in enumerate(("key_weight", "key_share", "mass", "largest")):
            got = torch.tensor(found["heads"][kind][figure])
            torch.testing.assert_close(got, expected[index], rtol=1e-4, atol=1e-6)


def test_one_prompt_at_a_time_or_all_together(home):
    subject = load(home, "softpick")
    runs = [passkey(subject.model, subject.tokenizer, 320, count=5, batch_size=n) for n in (1, 5)]
    assert [a["answer"] for a in runs[0]["answers"]] == [a["answer"] for a in runs[1]["answers"]]
    for figure, rows in runs[0]["heads"]["answer"].items():
        torch.testing.assert_close(
            torch.tensor(rows), torch.tensor(runs[1]["heads"]["answer"][figure]), rtol=1e-4, atol=1e-6
        )


def test_passkeys_that_cannot_be_made(home, finders, tmp_path):
    tokenizer, made = finders
    with pytest.raises(EvaluationError, match=r"lengths: expected at least \d+ tokens for this prompt, got 20"):
        passkey(made["softpick"], tokenizer, 20)
    with pytest.raises(EvaluationError, match="count: expected at least 1, got 0"):
        passkey(made["softpick"], tokenizer, 200, count=0)
    with pytest.raises(EvaluationError, match="needs a fast tokenizer"):
        make_prompts(object(), 200, 1)
    mamba = load(home, "mamba")
    with pytest.raises(ValueError, match="no attention layers were seen"), watch_last_query(mamba.model, print):
        mamba.model(torch.tensor([[1, 2]]), use_cache=False)


# ---------------------------------------------------------------------------------------------------------------------
# Perplexity


@pytest.mark.parametrize("at_once", [None, 7])
def test_perplexity_is_that_of_transformers_loss(home, at_once, monkeypatch):
    """Also where the fp32 logits of one sequence are made for 7 tokens at a time."""
    subject = load(home, "softpick")
    if at_once:
        monkeypatch.setattr(perplexities, "_LOGIT_ENTRIES", at_once * subject.model.config.vocab_size)
    tokens = torch.randint(2, 300, (5, 30), generator=torch.Generator().manual_seed(0))
    seen = []
    got = perplexity(subject.model, tokens, batch_size=2, progress=seen.append)
    with torch.no_grad():
        assert got == pytest.approx(math.exp(float(subject.model(tokens, labels=tokens).loss)), rel=1e-5)
    assert seen == ([1, 2, 3, 4, 5] if at_once else [2, 4, 5])
    with pytest.raises(ValueError, match=r"sequences: expected \(N, T\) with T at least 2, got \(3, 1\)"):
        perplexity(subject.model, tokens[:3, :1])


def test_perplexity_by_position_also_beyond_the_trained_length(home):
    subject = load(home, "softmax")
    length = 2 * POSITIONS
    tokens = torch.randint(2, 300, (6, length), generator=torch.Generator().manual_seed(0))
    edges = position_edges(length, 6, POSITIONS)
    assert POSITIONS in edges
    found = perplexity_by_position(subject.model, tokens, edges, batch_size=4)
    with torch.no_grad():
        log_p = subject.model(tokens).logits.log_softmax(2)
    for part in found:
        at = range(part["from"], part["to"] + 1)
        losses = torch.stack([-log_p[:, i - 1].gather(1, tokens[:, i, None])[:, 0] for i in at], 1)
        assert part["tokens"] == losses.numel()
        assert part["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
        assert part["loss_stderr"] == pytest.approx(float(losses.mean(1).std() / math.sqrt(6)), rel=1e-3)
        assert part["perplexity"] == pytest.approx(math.exp(part["loss"]), rel=1e-9)
    assert found[0]["from"] == 1
    assert found[-1]["to"] == length - 1
    with pytest.raises(ValueError, match="edges: expected two or more ascending positions"):
        perplexity_by_position(subject.model, tokens, [0, 5])


@pytest.mark.parametrize("trained", [None, 2, 16, 63, 64, 100, 4096])
@pytest.mark.parametrize(("length", "bins"), [(2, 1), (17, 4), (64, 8), (128, 16), (4986, 16), (10, 100)])
def test_edges_cover_every_position_once(length, bins, trained):
    edges = position_edges(length, bins, trained)
    assert edges[0] == 1
    assert edges[-1] == length
    assert edges == sorted(set(edges))
    assert min(bins, (length - 1) // 2) <= len(edges) - 1 <= max(2, bins)
    if trained and 1 < trained < length:
        assert trained in edges


def test_learned_positions(home):
    assert learned_positions(load(home, "gpt2").model) == 400
    assert learned_positions(load(home, "softpick").model) is None
