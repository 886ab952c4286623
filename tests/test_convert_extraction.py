"""The extraction task of softpick convert: its cases, and what counts as a right answer."""

import json
import math
import re
import statistics

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from softpick.conversion import extraction
from softpick.conversion.convert import convert
from softpick.conversion.recipes import ConvertSettings
from softpick.experiment.models import Subject
from softpick.training.data import train_tokenizer

NAMES = [
    f"{a}{b}{c}" for a in ("bar", "kel", "mon", "tis") for b in ("da", "ri", "vo") for c in ("n", "lt", "sk", "rm")
]
TEXT = [
    "".join(
        f"The keeper of house number {7 * i + j} is called {name} and lives there since a long time.\n"
        for j, name in enumerate(NAMES[i : i + 6])
    )
    for i in range(0, 48, 6)
]


def unigram():
    """A tokenizer of another kind than the byte-level one of the package: words begin with a mark, as SentencePiece's do."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama(size=300, room=512, tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=room, bos_token_id=0, eos_token_id=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module", params=["byte level", "unigram"])
def subject(request):
    tokenizer = train_tokenizer(TEXT, 290) if request.param == "byte level" else unigram()
    return Subject("tiny", llama(), tokenizer, causal=True)


def flat(text):
    return " ".join(text.split())


def test_a_case_can_be_answered_from_its_passage_and_nowhere_else(subject):
    cases = extraction.make_cases(subject, TEXT, 12, 128)
    assert len(cases) == 12
    assert len({case.answer for case in cases}) == 12
    places = []
    for case in cases:
        assert len(case.prompt) == 128
        assert case.prompt[0] == case.bare[0] == subject.tokenizer.bos_token_id
        prompt = flat(subject.tokenizer.decode(case.prompt[1:]))
        anchor = flat(subject.tokenizer.decode(case.bare[1:]))
        assert len(anchor.split()) == 4
        assert prompt.endswith(anchor)
        # an independent reader: what follows where the last words of the prompt stood before
        passage = prompt[: -len(anchor)]
        (follows,) = re.findall(re.escape(anchor) + r"\s+(\w+)", passage)
        assert follows == case.answer
        assert len(re.findall(rf"\b{case.answer}\b", passage)) == 1
        assert f"{anchor} {case.answer}" in flat(" ".join(TEXT))
        places.append(passage.index(anchor) / len(passage))
    assert max(places) - min(places) > 0.4  # not always at the same place
    assert cases == extraction.make_cases(subject, TEXT, 12, 128)
    assert cases[:5] == extraction.make_cases(subject, TEXT, 5, 128)


def test_rare_words_come_first(subject):
    """Each name occurs once in the text, every other word in each of its lines."""
    cases = extraction.make_cases(subject, TEXT, 30, 128)
    assert len(cases) == 30
    assert all("".join(TEXT).count(f" {case.answer} ") == 1 for case in cases)


@pytest.mark.parametrize(
    "line",
    ["House {i} is now called {name}.\n" * 2, "House one is now called {name}.\n", "House {i} is now called {same}.\n"],
    ids=["both twice", "the words before it twice", "the word twice"],
)
def test_what_stands_in_the_passage_twice_is_not_asked_for(subject, line):
    text = "".join(line.format(i=i, name=name, same=NAMES[i // 2]) for i, name in enumerate(NAMES))
    asked = {case.answer for case in extraction.make_cases(subject, [text], 100, 128)}
    assert not asked & set(NAMES)
    once = "".join(f"House {i} is now called {name}.\n" for i, name in enumerate(NAMES))
    assert {case.answer for case in extraction.make_cases(subject, [once], 20, 128)} <= set(NAMES)


def test_room_and_text_that_is_too_short():
    tokenizer = train_tokenizer(TEXT, 290)
    small = Subject("tiny", llama(room=96), tokenizer, causal=True)
    cases = extraction.make_cases(small, TEXT, 3, 128)
    assert {len(case.prompt) for case in cases} == {64}  # 32 are kept for the answer
    assert extraction.make_cases(small, ["too short"], 3, 128) == []
    assert extraction.make_cases(small, ["- . - , " * 200], 3, 128) == []


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (" kelvon and", True),
        ("kelvon", True),
        ("\n kelvon.", True),
        (" kelvonsk", False),
        (" Kelvon", False),
        ("", False),
    ],
)
def test_what_is_right(written, expected):
    assert extraction.right(written, "kelvon") is expected


def test_answers_are_greedy(subject):
    """Beside a loop without cache, one case at a time."""
    model = subject.model
    cases = extraction.make_cases(subject, TEXT, 5, 64)
    new = max(len(subject.ids(f" {case.answer}")) for case in cases) + 3
    for bare in (False, True):
        found = extraction.answers(subject, model, cases, bare=bare)
        for case, text in zip(cases, found, strict=True):
            ids = torch.tensor([case.bare if bare else case.prompt])
            size = ids.shape[1]
            with torch.no_grad():
                for _ in range(new):
                    ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            assert text == subject.tokenizer.decode(ids[0, size:])


def test_scores():
    cases = [extraction.Case((1, 2, 3), (1, 3), word) for word in ("anna", "berta", "carla", "dora")]
    found = extraction.score(
        cases,
        {
            "teacher": [" anna", " berta!", " carla", "x"],
            "student": [" anna", " bert", "x", " dora"],
            "without_passage": ["", "", "", " dora is"],
        },
    )
    expected = {"teacher": [1, 1, 1, 0], "student": [1, 0, 0, 1], "without_passage": [0, 0, 0, 1]}
    for name, marks in expected.items():
        assert found[name]["accuracy_percent"] == 100 * sum(marks) / 4
        assert found[name]["standard_error_percent"] == pytest.approx(100 * statistics.pstdev(marks) / math.sqrt(4))
    assert found["difference"]["accuracy_percent"] == -25.0
    assert found["difference"]["standard_error_percent"] == pytest.approx(50 * statistics.pstdev([0, -1, -1, 1]))
    assert found["examples"][1] == {"answer": "berta", "teacher": " berta!", "student": " bert", "without_passage": ""}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("extraction")
    train_tokenizer(TEXT, 290).save_pretrained(home / "teacher")
    llama().save_pretrained(home / "teacher")
    for name, texts in (("text", TEXT[:6]), ("held", TEXT)):
        (home / name).mkdir()
        for i, text in enumerate(texts):
            (home / name / f"{i}.txt").write_text(text)
    return home


def settings(home, **given):
    values = {
        "data": str(home / "text"), "validation_data": str(home / "held"), "align_steps": 2, "distil_steps": 0,
        "align_sequence_length": 16, "align_batch_size": 2, "micro_batch_size": 2, "warmup_steps": 0, "samples": 0,
        "prompts": 0, "validation_sequences": 2, "extraction": 3, "extraction_tokens": 64, "device": "cpu",
    }  # fmt: skip
    return ConvertSettings.of_recipe(str(home / "teacher"), **(values | given))


def test_the_command_reports_it_and_goes_on_after_the_last_answers(home, tmp_path, monkeypatch):
    asked = []
    answers = extraction.answers

    def killed(subject, model, cases, bare=False):
        asked.append(bare)
        if len(asked) == 2:
            raise SystemExit("killed")
        return answers(subject, model, cases, bare=bare)

    monkeypatch.setattr(extraction, "answers", killed)
    with pytest.raises(SystemExit):
        convert(settings(home), tmp_path / "out")
    result = convert(settings(home), tmp_path / "out")
    assert asked == [False, False, False, True]  # the teacher, killed at the student; the student, the teacher alone
    found = result["extraction"]
    assert found["cases"] == 3
    assert found["prompt_tokens"] == 64
    for name in ("teacher", "student", "without_passage", "difference"):
        assert set(found[name]) == {"accuracy_percent", "standard_error_percent"}
    assert json.loads((tmp_path / "out/results.json").read_text())["extraction"] == found
    assert "Extraction, 3 cases: the student writes" in (tmp_path / "out/report.html").read_text()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model",
        "report.html",
        "results.json",
    ]


def test_left_out_and_impossible(home, tmp_path):
    assert convert(settings(home, extraction=0), tmp_path / "none")["extraction"] is None
    (tmp_path / "marks.txt").write_text("- . - , " * 200)
    result = convert(settings(home, validation_data=str(tmp_path / "marks.txt")), tmp_path / "marks")
    assert result["extraction"] == {"cases": 0}
    assert "no case could be made" in result["notes"][-1]
