"""``softpick evaluate``: the harness's scores against ones computed here from logits, the passkey with a model that can
find it by construction, perplexities against transformers' own loss, going on after a stop, and the command."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")

import datasets
import huggingface_hub
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from softpick import cli
from softpick.analysis import attention_maps
from softpick.analysis.capture import watch_last_query
from softpick.evaluate import EvaluateSettings, evaluate, forget, summary_rows
from softpick.evaluation import passkey as passkey_module
from softpick.evaluation import tasks as tasks_module
from softpick.evaluation.passkey import make_prompts, passkey, retrieving_heads, shortest_prompt
from softpick.evaluation.perplexity import learned_positions, perplexity, perplexity_by_position, position_edges
from softpick.evaluation.tasks import TASKS, EvaluationError, run_tasks, starts_with_bos
from softpick.loading import ModelError
from softpick.parts import titles
from softpick.training import engine
from softpick.training.data import DataError, train_tokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "saw", "it", "run", "over", "hill", "to", "red", "barn"]
POSITIONS = 48


def sentences(generator, least, most=None):
    count = int(torch.randint(least, (most or least) + 1, (1,), generator=generator))
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator).tolist())


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_data(folder):
    """The five tasks in the harness's formats. Some questions are longer than the models have positions."""
    folder.mkdir()
    g = torch.Generator().manual_seed(1)

    def text(*size):
        return sentences(g, *size)

    arc = [
        {
            "question": text(3, 60 if i % 5 == 0 else 9) + "?",
            "choices": {"text": [text(1, 3) for _ in range(4)], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(14)
    ]
    write_lines(folder / "arc_easy.jsonl", arc)
    write_lines(folder / "arc_easy.train.jsonl", [row | {"question": text(70) + "?"} for row in arc[:3]])
    write_lines(folder / "lambada_openai.jsonl", [{"text": text(5, 90)} for _ in range(20)])
    piqa = [{"goal": text(4), "sol1": text(1, 4), "sol2": text(1, 4), "label": i % 2} for i in range(12)]
    write_lines(folder / "piqa.jsonl", piqa)
    sciq = [
        {
            "question": text(4) + "?",
            "support": " " * (i % 2) + text(0, 8),
            **{f"distractor{n}": text(1, 2) for n in (1, 2, 3)},
            "correct_answer": text(1, 2),
        }
        for i in range(12)
    ]
    write_lines(folder / "sciq.jsonl", sciq)
    pages = [f" = Title = \n {text(8)} , {text(size)} . \n" for size in (5, 20, 150)]
    write_lines(folder / "wikitext.jsonl", [{"page": page} for page in pages])
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data of the tasks, a corpus, and tiny models: untrained, with weights that make them prefer something."""
    root = tmp_path_factory.mktemp("evaluate")
    make_data(root / "data")
    generator = torch.Generator().manual_seed(0)
    text = sentences(generator, 4000)
    (root / "corpus.txt").write_text(text)
    tokenizer = train_tokenizer([text, "Question: ?\nAnswer: = , ."], 300)
    for name in ("softmax", "softpick"):
        model = engine.build_model(
            name, vocab_size=len(tokenizer), layers=2, heads=2, width=16, sequence_length=POSITIONS, seed=0,
            bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id,
        )  # fmt: skip
        for p in model.parameters():
            p.data *= 4
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    bare.eos_token = "<eos>"
    bare.backend_tokenizer.post_processor = None
    gpt2 = GPT2Config(
        vocab_size=300, n_positions=400, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    GPT2LMHeadModel(gpt2).save_pretrained(root / "gpt2")
    MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4)).save_pretrained(
        root / "mamba"
    )
    BertModel(BertConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        root / "bert"
    )
    for name in ("gpt2", "mamba", "bert"):
        bare.save_pretrained(root / name)
    return root


def load(home, name):
    from softpick.loading import load_subject
    from softpick.progress import Silent

    return load_subject(str(home / name), reporter=Silent())


class Recorder:
    """What was said, and which bars there were; ``stop`` interrupts at the bar with these words."""

    def __init__(self, stop=None):
        self.said, self.bars, self.updates, self.stop = [], [], [], stop

    def say(self, text):
        self.said.append(text)

    @contextmanager
    def progress(self, label, total):
        if self.stop and self.stop in label:
            raise KeyboardInterrupt
        self.bars.append((label, total))
        steps = []
        self.updates.append(steps)

        class Bar:
            def update(self, step, loss, note=""):
                steps.append(step)

        yield Bar()


# ---------------------------------------------------------------------------------------------------------------------
# The tasks, scored again from logits


def log_probability(model, tokenizer, context, continuation, bos):
    """Sum over a continuation's tokens, and whether each is the most likely one. BOS stays where the context is cut."""
    ids = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    after = ids[len(tokenizer(context, add_special_tokens=False)["input_ids"]) :]
    before = ids[: len(ids) - len(after)]
    opening = [] if bos is None else [bos]
    room = POSITIONS + 1 - len(after) - len(opening)
    ids = torch.tensor([opening + before[max(0, len(before) - room) :] + after])
    with torch.no_grad():
        log_p = model(ids[:, :-1]).logits.log_softmax(2)[0, -len(after) :]
    return float(log_p.gather(1, ids[0, -len(after) :, None]).sum()), log_p.argmax(1).tolist() == after


def lines(home, task):
    return [json.loads(line) for line in (home / "data" / f"{task}.jsonl").read_text().splitlines()]


def choices_of(task, row):
    """Context, choices and the right one's index."""
    if task == "arc_easy":
        right = row["choices"]["label"].index(row["answerKey"])
        return f"Question: {row['question']}\nAnswer:", row["choices"]["text"], right
    if task == "piqa":
        return f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"]
    support = row["support"].lstrip()
    wrong = [row[f"distractor{n}"] for n in (1, 2, 3)]
    return f"{support}\nQuestion: {row['question']}\nAnswer:", [*wrong, row["correct_answer"]], 3


@pytest.mark.parametrize("name", ["softmax", "softpick"])
def test_multiple_choice_is_scored_as_the_logits_say(home, name):
    subject = load(home, name)
    found = run_tasks(subject.model, subject.tokenizer, ["arc_easy", "piqa", "sciq"], data_dir=home / "data")
    for task, numbers in found.items():
        right = {"acc": [], "acc_norm": []}
        for row in lines(home, task):
            context, choices, answer = choices_of(task, row)
            scores = [log_probability(subject.model, subject.tokenizer, context, f" {c}", 0)[0] for c in choices]
            lengths = [len(choice) for choice in choices]
            right["acc"].append(max(range(len(choices)), key=lambda i: scores[i]) == answer)
            right["acc_norm"].append(max(range(len(choices)), key=lambda i: scores[i] / lengths[i]) == answer)
        for metric, hits in right.items():
            share = sum(hits) / len(hits)
            assert numbers[metric] == pytest.approx(share, abs=1e-9), (task, metric)
            error = math.sqrt(share * (1 - share) / (len(hits) - 1))
            assert numbers[f"{metric}_stderr"] == pytest.approx(error, abs=1e-9)
        assert numbers["samples"] == len(right["acc"])
    assert 0 < sum(numbers["acc"] for numbers in found.values()) < 3  # neither all nor nothing: the check can fail


@pytest.mark.parametrize("name", ["softmax", "softpick"])
def test_last_word(home, name):
    subject = load(home, name)
    found = run_tasks(subject.model, subject.tokenizer, ["lambada_openai"], data_dir=home / "data")["lambada_openai"]
    scored = []
    for row in lines(home, "lambada_openai"):
        words = row["text"].split(" ")
        context, last = " ".join(words[:-1]), " " + words[-1]
        scored.append(log_probability(subject.model, subject.tokenizer, context, last, 0))
    mean = sum(score for score, _ in scored) / len(scored)
    assert found["perplexity"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert found["acc"] == sum(greedy for _, greedy in scored) / len(scored)


def rolling(model, ids, bos):
    """Log-probability of all tokens: BOS first, windows of as many predictions as the model has positions, the last window
    with as much before it as fits."""
    ids, total, start = [bos, *ids], 0.0, 1
    while start < len(ids):
        stop = min(start + POSITIONS, len(ids))
        begin = start - 1 if stop - start == POSITIONS or start == 1 else stop - 1 - POSITIONS
        with torch.no_grad():
            log_p = model(torch.tensor([ids[begin : stop - 1]])).logits.log_softmax(2)[0]
        total += sum(float(log_p[i - 1 - begin, ids[i]]) for i in range(start, stop))
        start = stop
    return total


def test_word_perplexity(home):
    """BOS once in front and not scored, also over several windows; words are those of the page as it came."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    subject = load(home, "softpick")
    found = run_tasks(subject.model, subject.tokenizer, ["wikitext"], data_dir=home / "data")["wikitext"]
    total = words = size = 0
    longest = 0
    for row in lines(home, "wikitext"):
        ids = subject.ids(wikitext_detokenizer(row))
        longest = max(longest, len(ids))
        total += rolling(subject.model, ids, subject.opening)
        words += len(re.split(r"\s+", row["page"]))
        size += len(row["page"].encode())
    assert longest > 2 * POSITIONS
    assert found["word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-4)


def test_batches_limit_and_examples(home):
    subject = load(home, "softpick")

    def run(**given):
        return run_tasks(subject.model, subject.tokenizer, ["arc_easy"], data_dir=home / "data", **given)["arc_easy"]

    assert run(batch_size=1) == run(batch_size=5)
    assert run(limit=3)["samples"] == 3
    recorder = Recorder()
    shots = run(limit=6, num_fewshot=1, reporter=recorder)
    assert shots["samples"] == 6
    assert recorder.bars == [("arc_easy", 24)]
    assert recorder.updates[0][-1] == 24
    # the examples of the file for training are long
    words = f"contexts are longer than the model's {POSITIONS} positions; their beginnings were cut off"
    assert recorder.said == [f"arc_easy: 24 of 24 {words}"]
    assert shots["contexts_cut"] == 1
    recorder = Recorder()
    run(limit=6, reporter=recorder)
    assert recorder.said == [f"arc_easy: 4 of 24 {words}"]


def test_nothing_of_the_callers_is_changed(home):
    subject = load(home, "softpick")
    import tqdm

    before = vars(tqdm.tqdm)["__init__"]
    run_tasks(subject.model, subject.tokenizer, ["piqa"], data_dir=home / "data", limit=2)
    assert vars(tqdm.tqdm)["__init__"] is before
    assert subject.tokenizer.pad_token_id is None


def test_bos_where_the_model_was_trained_with_it(home):
    subject = load(home, "softpick")
    assert starts_with_bos(subject.model, subject.tokenizer) == subject.tokenizer.bos_token_id
    other = load(home, "gpt2")
    assert starts_with_bos(other.model, other.tokenizer) is None
    assert starts_with_bos(other.model, subject.tokenizer) == 0  # a tokenizer that puts it in front
    other.tokenizer.bos_token = "<bos>"  # there is one, but the tokenizer does not use it
    assert starts_with_bos(other.model, other.tokenizer) is None
    assert starts_with_bos(subject.model, other.tokenizer) == 0  # ours was trained with it all the same


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": ["arc_easy", "hellaswag"]}, "tasks: expected some of arc_easy, lambada_openai.*got 'hellaswag'"),
        ({"tasks": ["piqa", "piqa"]}, "tasks: expected each task once"),
        ({"num_fewshot": 2}, r"lacks piqa.train.jsonl \(goal, sol1, sol2, label \(0 or 1\)\)"),
        ({"num_fewshot": -1}, "num_fewshot: expected 0 or more"),
        ({"limit": 0}, "limit: expected at least 1"),
        ({"data_dir": "/nowhere"}, r"/nowhere is not a directory; expected one with piqa.jsonl \(goal"),
    ],
)
def test_tasks_that_cannot_run(home, given, message):
    subject = load(home, "softpick")
    with pytest.raises(EvaluationError, match=message):
        run_tasks(subject.model, subject.tokenizer, **({"tasks": ["piqa"], "data_dir": home / "data"} | given))


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("arc_easy", "", r"arc_easy.jsonl has no lines"),
        ("arc_easy", "{", r"line 1: not JSON .*expected an object with question, choices"),
        (
            "arc_easy",
            '{"question": "a", "choices": {"text": ["b"]}, "answerKey": "A"}',
            "choices has no text and label",
        ),
        (
            "arc_easy",
            '{"question": "a", "choices": {"text": ["b"], "label": ["A"]}, "answerKey": "B"}',
            "expected an answerKey among the labels, one a text; got 'B'",
        ),
        ("piqa", '\n{"goal": "a", "sol1": "b"}', "line 2 lacks sol2, label"),
        ("piqa", '{"goal": "a", "sol1": "b", "sol2": "c", "label": 2}', "label: expected 0 or 1, got 2"),
        ("wikitext", '["page"]', "line 1 lacks page"),
        ("lambada_openai", None, r"lacks lambada_openai.jsonl \(text\); one JSON object a line"),
    ],
)
def test_files_that_are_wrong(home, tmp_path, task, text, message):
    if text is not None:
        (tmp_path / f"{task}.jsonl").write_text(text)
    subject = load(home, "softpick")
    with pytest.raises(EvaluationError, match=message):
        run_tasks(subject.model, subject.tokenizer, [task], data_dir=tmp_path)


def test_a_continuation_longer_than_the_model(home, tmp_path):
    write_lines(tmp_path / "piqa.jsonl", [{"goal": "a", "sol1": "cat " * 80, "sol2": "b", "label": 0}])
    subject = load(home, "softpick")
    with pytest.raises(EvaluationError, match=f"continuation of .* tokens; expected at most {POSITIONS}"):
        run_tasks(subject.model, subject.tokenizer, ["piqa"], data_dir=tmp_path)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise ConnectionError("no name server")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_without_hub_and_files_the_files_are_named_at_once(home, no_hub, monkeypatch):
    tries = []
    load_dataset = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: tries.append(1) or load_dataset(*a, **k))
    subject = load(home, "softpick")
    with pytest.raises(EvaluationError) as raised:
        run_tasks(subject.model, subject.tokenizer, TASKS)
    message = str(raised.value)
    assert "the hub did not give them (no name server)" in message
    for task, fields in {"arc_easy": "question, choices {text", "wikitext": "page", "sciq": "support"}.items():
        assert re.search(rf"{task}\.jsonl \([^;]*{re.escape(fields)}", message), (task, message)
    assert len(tries) == 1  # not one a task
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("reachable", [True, False])
def test_data_of_the_hub_or_downloaded_before(home, no_hub, monkeypatch, reachable):
    """The hub's data set stands in for the file: the stock task loads it and gives the same numbers."""
    if reachable:
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: None)
    asked = []

    def load_dataset(path, name=None, **kwargs):
        asked.append((path, name, huggingface_hub.constants.HF_HUB_OFFLINE))
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(lines(home, "lambada_openai"))})

    subject = load(home, "softpick")
    local = run_tasks(subject.model, subject.tokenizer, ["lambada_openai"], data_dir=home / "data")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert run_tasks(subject.model, subject.tokenizer, ["lambada_openai"]) == local
    assert set(asked) == {("EleutherAI/lambada_openai", "default", not reachable)}


# ---------------------------------------------------------------------------------------------------------------------
# Passkey


def number_tokenizer():
    """Every word and every number is one token; what the filler cuts in two is unknown."""
    text = passkey_module.prompt_text("1", 0.5, 400)[0]
    words = sorted(set(re.findall(r"\w+|[^\w\s]", text)) - {"1"})
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<bos>", "<eos>", *words])}
    first = len(vocabulary)
    vocabulary |= {str(n): first + n for n in range(50_000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    ), first


@pytest.fixture(scope="module")
def finders():
    """Models whose one head fetches numbers by construction, and their tokenizer.

    A number's embedding is a mark and a code of its own, all other words have neither. Every query looks for the mark, the
    value is the code, and the output is the word whose code it is.
    """
    tokenizer, first = number_tokenizer()
    code, width = 24, 64
    generator = torch.Generator().manual_seed(0)
    codes = torch.nn.functional.normalize(torch.randn(50_000, code, generator=generator), dim=1)

    def make(normalizer):
        model = engine.build_model(
            normalizer, vocab_size=len(tokenizer), layers=1, heads=2, width=width, sequence_length=128, seed=0, bos=1,
            eos=2, rope_parameters={"rope_type": "default", "rope_theta": 1e30},
        ).eval()  # fmt: skip
        layer = model.model.layers[0]
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.zero_()
            words = model.model.embed_tokens.weight
            words[:, 0] = 1.0  # of every word: what queries are made of
            words[first:, 1] = 1.0  # the mark
            words[first:, 2 : 2 + code] = codes
            # head 0 (channels 0 to 31 of the projections); the last pair of channels hardly turns with the position
            layer.self_attn.q_proj.weight[31, 0] = 4.0
            layer.self_attn.k_proj.weight[31, 1] = 4.0
            for i in range(code):
                layer.self_attn.v_proj.weight[i, 2 + i] = 1.0
                layer.self_attn.o_proj.weight[32 + i, i] = 1.0
            model.lm_head.weight[first:, 32 : 32 + code] = codes
        return model

    return tokenizer, {name: make(name) for name in ("softmax", "softpick")}


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


@pytest.mark.parametrize("name", ["softmax", "softpick", "gpt2"])
def test_heads_are_those_of_the_full_maps(home, name):
    """Mass, largest weight and weight on the key, from whole maps of prompt and answer, one prompt at a time."""
    subject = load(home, name)
    model, tokenizer = subject.model, subject.tokenizer
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
        on_key, mass = rows[..., list(prompt.key_tokens)].sum(3), rows.sum(3)
        figures = torch.stack([on_key, torch.where(mass > 0, on_key / mass, 0.0), mass, rows.amax(3)])
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


def test_perplexity_is_that_of_transformers_loss(home):
    subject = load(home, "softpick")
    tokens = torch.randint(2, 300, (5, 30), generator=torch.Generator().manual_seed(0))
    seen = []
    got = perplexity(subject.model, tokens, batch_size=2, progress=seen.append)
    with torch.no_grad():
        assert got == pytest.approx(math.exp(float(subject.model(tokens, labels=tokens).loss)), rel=1e-5)
    assert seen == [2, 4, 5]
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


# ---------------------------------------------------------------------------------------------------------------------
# Everything together


def settings(home, model="softpick", **given):
    defaults = {
        "tasks": ("piqa", "wikitext"),
        "data_dir": str(home / "data"),
        "passkey": (300, 340),
        "passkey_prompts": 3,
        "data": str(home / "corpus.txt"),
        "samples": 4,
        "bins": 4,
    }
    return EvaluateSettings(model=str(home / model), **(defaults | given))


def without_times(report):
    runs = [{k: v for k, v in run.items() if k != "seconds"} for run in report["runs"]]
    return json.loads(json.dumps({"runs": runs, "notes": report["notes"]}))


@pytest.fixture(scope="module")
def report(home):
    return evaluate(settings(home, "softmax", against=(str(home / "softpick"),)), command="softpick evaluate")


def test_two_models_side_by_side(home, report):
    json.dumps(report, allow_nan=False)
    softmax, softpick = report["runs"]
    assert (softmax["normalizer"], softpick["normalizer"]) == ("softmax", "softpick")
    for run in report["runs"]:
        subject = load(home, run["normalizer"])
        assert run["tasks"] == run_tasks(subject.model, subject.tokenizer, ["piqa", "wikitext"], data_dir=home / "data")
        assert [found["length"] for found in run["passkey"]] == [300, 340]
        assert run["trained_length"] == POSITIONS
        assert run["bos"] == "<bos>"
        assert run["perplexity"]["length"] == 2 * POSITIONS
        tokens = torch.tensor(subject.ids((home / "corpus.txt").read_text()))
        piece = 2 * POSITIONS - 1
        rows = torch.stack([torch.cat([torch.tensor([0]), tokens[i * piece : (i + 1) * piece]]) for i in range(4)])
        within, beyond = run["perplexity"]["within"], run["perplexity"]["beyond"]
        assert within == pytest.approx(perplexity(subject.model, rows[:, :POSITIONS]), rel=1e-4)
        whole = (POSITIONS - 1) * math.log(within) + POSITIONS * math.log(beyond)
        assert math.exp(whole / (2 * POSITIONS - 1)) == pytest.approx(perplexity(subject.model, rows), rel=1e-4)
        head = run["retrieving"]["heads"][0]
        assert head["by_length"][1]["mass"] == run["passkey"][1]["heads"]["answer"]["mass"][head["layer"]][head["head"]]
    meta = report["meta"]
    assert meta["seed"] == 0
    assert meta["command"] == "softpick evaluate"
    assert all(
        name in meta["versions"] for name in ("softpick", "torch", "transformers", "lm_eval", "datasets", "Python")
    )
    assert meta["hardware"]
    assert any("not one passkey was found" in note for note in report["notes"])
    rows = dict(summary_rows(report))
    assert rows["piqa acc (%, up)"][0].startswith(f"{100 * softmax['tasks']['piqa']['acc']:.2f} ± ")
    assert rows["passkey, 300 tokens (%, up)"] == ["0.0 ± 0.0", "0.0 ± 0.0"]
    assert rows["perplexity beyond the trained length (down)"][1] == f"{softpick['perplexity']['beyond']:.4g}"


def test_going_on_after_a_stop(home, report, tmp_path):
    chosen = settings(home, "softmax", against=(str(home / "softpick"),))
    stopped = Recorder(stop="softpick: passkey, 340")
    with pytest.raises(KeyboardInterrupt):
        evaluate(chosen, reporter=stopped, state=tmp_path / "out")
    again = Recorder()
    resumed = evaluate(chosen, reporter=again, state=tmp_path / "out")
    assert again.bars == [("softpick: passkey, 340 tokens", 3)]
    assert "softpick: 4 parts were there from before" in again.said
    assert "softmax: 5 parts were there from before" in again.said
    assert without_times(resumed) == without_times(report)
    third = Recorder()
    evaluate(chosen, reporter=third, state=tmp_path / "out")
    assert third.bars == []
    # what a part depends on makes it anew, and only that part
    changed = Recorder()
    other = settings(home, "softmax", against=(str(home / "softpick"),), passkey_prompts=2, limit=3)
    evaluate(other, reporter=changed, state=tmp_path / "out")
    assert len(changed.bars) == 8
    assert not any("perplexity" in label for label, _ in changed.bars)
    (tmp_path / "out" / "mine.json").write_text("{}")
    forget(tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.json"]


def test_a_missing_hub_and_a_short_text_are_told_before_anything_is_computed(home, no_hub, tmp_path):
    recorder = Recorder()
    with pytest.raises(EvaluationError, match=r"piqa\.jsonl .*wikitext\.jsonl"):
        evaluate(settings(home, data_dir=None), reporter=recorder)
    with pytest.raises(DataError, match="too few for one sequence of 100000"):
        evaluate(settings(home, sequence_length=100_000), reporter=recorder)
    assert recorder.bars == []
    # tasks that are done need no hub to go on
    chosen = settings(home, data_dir=None, tasks=("piqa",), perplexity=False, passkey=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: None)
        rows = datasets.DatasetDict(
            {split: datasets.Dataset.from_list(lines(home, "piqa")) for split in ("train", "validation")}
        )
        patch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
        first = evaluate(chosen, state=tmp_path)
    assert without_times(evaluate(chosen, state=tmp_path)) == without_times(first)


def test_other_data_make_a_task_anew(home, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rows = lines(home, "piqa")
    write_lines(data / "piqa.jsonl", rows)
    chosen = settings(home, tasks=("piqa",), data_dir=str(data), passkey=(), perplexity=False)
    first = evaluate(chosen, state=tmp_path / "out")["runs"][0]["tasks"]["piqa"]
    write_lines(data / "piqa.jsonl", rows[:5])
    second = evaluate(chosen, state=tmp_path / "out")["runs"][0]["tasks"]["piqa"]
    assert (first["samples"], second["samples"]) == (12, 5)


def test_a_model_with_learned_positions(home):
    run = evaluate(settings(home, "gpt2", passkey=None, tasks=()))["runs"][0]
    assert run["passkey"] == []
    assert run["retrieving"] is None
    assert run["perplexity"]["length"] == 400
    assert run["notes"] == ["gpt2: no passkeys beyond its 400 positions, whose embeddings are learned."]
    with pytest.raises(
        ModelError, match=r"passkey: .*gpt2 has learned embeddings for 400 positions; expected .* got 500"
    ):
        evaluate(settings(home, "gpt2", tasks=(), passkey=(300, 500)))
    with pytest.raises(ModelError, match=r"sequence_length: .*gpt2 has learned embeddings for 400 positions"):
        evaluate(settings(home, "gpt2", tasks=(), passkey=(), sequence_length=401))


@pytest.mark.parametrize(
    ("model", "given", "error", "message"),
    [
        ("softpick", {"samples": 0}, EvaluationError, "samples: expected at least 1, got 0"),
        ("softpick", {"dtype": "int3"}, EvaluationError, "dtype: expected one of auto, float32"),
        ("softpick", {"passkey": (300, 300)}, EvaluationError, "passkey: expected different lengths"),
        ("softpick", {"passkey": (30,)}, EvaluationError, r"passkey: expected at least \d+ tokens .*got 30"),
        ("softpick", {"tasks": ("boolq",)}, EvaluationError, "tasks: expected some of"),
        ("softpick", {"tasks": (), "passkey": (), "perplexity": False}, EvaluationError, "got none of them"),
        ("softpick", {"sequence_length": 100_000}, DataError, "too few for one sequence of 100000"),
        ("softpick", {"device": "cuda:77"}, ModelError, "device: cannot move"),
        ("bert", {}, ModelError, r"is an encoder \(bert\); expected a causal language model"),
        ("mamba", {"tasks": ()}, EvaluationError, r"no attention layers were seen .*--passkey none"),
        ("nothing", {}, ModelError, "there is no directory or file"),
    ],
)
def test_what_cannot_be_evaluated(home, model, given, error, message):
    with pytest.raises(error, match=message):
        evaluate(settings(home, model, **given))


def test_no_attention_is_no_matter_without_passkeys(home):
    run = evaluate(settings(home, "mamba", passkey=(), tasks=("piqa",), sequence_length=40))["runs"][0]
    assert run["tasks"]["piqa"]["samples"] == 12
    assert run["perplexity"]["within"] > 1


def test_the_same_model_twice_is_refused(home):
    with pytest.raises(EvaluationError, match="against: expected different models"):
        evaluate(settings(home, against=(str(home / "softpick"),)))


def test_titles_tell_models_apart():
    assert titles(["runs/softmax/model", "runs/softpick/model"]) == ["softmax/model", "softpick/model"]
    assert titles(["a/x", "b/y"]) == ["x", "y"]
    assert titles(["org/name"]) == ["name"]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def invoke(*arguments):
    return CliRunner().invoke(cli.build_app(), ["evaluate", *map(str, arguments)])


def test_the_command(home, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "softpick", "evaluate", str(home / "softmax"), "--against", str(home / "softpick")]
    command += [
        "--tasks",
        "arc_easy,wikitext",
        "--data-dir",
        str(home / "data"),
        "--limit",
        "4",
        "--passkey",
        "300,330",
    ]
    command += ["--passkey-prompts", "2", "--data", str(home / "corpus.txt"), "--samples", "2", "--seed", "7"]
    command += ["--output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warnings, no bars of others
    assert "softpick: passkey, 330 tokens: 2/2" in done.stdout
    assert re.search(r"wikitext word_perplexity \(down\) +\d", done.stdout)
    assert sorted(file.name for file in out.iterdir()) == ["heads.png", "passkey.png", "perplexity.png", "results.json"]
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in out.glob("*.png"))
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["seed"] == 7
    assert results["meta"]["command"].startswith("softpick evaluate ")
    assert [run["title"] for run in results["runs"]] == ["softmax", "softpick"]
    assert results["runs"][0]["tasks"]["arc_easy"]["samples"] == 4
    again = invoke(*command[4:])
    assert again.exit_code == 2
    assert "results.json is there already; choose another --output" in again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "arc_easy,boolq"], "tasks: expected some of arc_easy"),
        (
            ["--tasks", "arc_easy", "--data-dir", "/nowhere"],
            "/nowhere is not a directory; expected one with arc_easy.jsonl",
        ),
        (["--tasks", "none", "--passkey", "300,x"], "passkey: expected integers separated by commas"),
        (["--tasks", "none", "--passkey", "none", "--data", "/nowhere"], "/nowhere does not exist"),
        (["--tasks", "none", "--passkey", "none", "--no-perplexity"], "got none of them"),
    ],
)
def test_errors_of_the_command(home, tmp_path, arguments, message):
    result = invoke(home / "softpick", "--output", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_a_missing_tokenizer(home, tmp_path):
    load(home, "softpick").model.save_pretrained(tmp_path / "model")
    result = invoke(tmp_path / "model", "--tasks", "none", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "has no tokenizer that transformers can load" in result.output


@pytest.mark.parametrize(("module", "tasks"), [("lm_eval", "piqa"), ("datasets", "piqa"), ("matplotlib", "none")])
def test_a_missing_extra_is_named(home, monkeypatch, module, tasks):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == module else find(name, *a))
    result = invoke(home / "softpick", "--tasks", tasks)
    assert result.exit_code == 2
    assert f"this command needs {module}: pip install 'softpick[evaluate]'" in result.output


def test_a_missing_harness_is_named_by_the_function_too(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    subject = load(home, "softpick")
    with pytest.raises(ImportError, match=r"need lm-eval.*pip install 'softpick\[evaluate\]'"):
        run_tasks(subject.model, subject.tokenizer, ["piqa"], data_dir=home / "data")


def test_tasks_are_the_papers():
    assert TASKS == ("arc_easy", "lambada_openai", "piqa", "sciq", "wikitext")
    assert set(tasks_module.HEADLINES) == set(TASKS)
