"""The harness's scores against ones computed here from logits, and where the tasks' data come from."""

import math
import re

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")

import datasets
import huggingface_hub
from evaluation_home import POSITIONS, Recorder, home, lines, load, no_hub, write_lines  # noqa: F401 (fixtures)

from softpick.evaluation.tasks import TASKS, EvaluationError, run_tasks, starts_with_bos

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
