"""``softpick evaluate``: models side by side, going on after a stop, what cannot be evaluated, and the command."""

import importlib.util
import json
import math
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")

import datasets
import huggingface_hub
from evaluation_home import POSITIONS, Recorder, home, lines, load, no_hub, write_lines  # noqa: F401 (fixtures)
from typer.testing import CliRunner

from softpick import cli
from softpick.evaluation import tasks as tasks_module
from softpick.evaluation.evaluate import EvaluateSettings, evaluate, forget, summary_rows
from softpick.evaluation.tasks import TASKS, EvaluationError, run_tasks
from softpick.experiment.models import ModelError
from softpick.experiment.perplexity import perplexity
from softpick.experiment.reading import DataError
from softpick.experiment.result_cache import titles

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
    # a change of what a result depends on makes that result anew, and no other
    changed = Recorder()
    other = settings(home, "softmax", against=(str(home / "softpick"),), passkey_prompts=2, limit=3)
    evaluate(other, reporter=changed, state=tmp_path / "out")
    assert len(changed.bars) == 8
    assert not any("perplexity" in label for label, _ in changed.bars)
    (tmp_path / "out" / "mine.json").write_text("{}")
    forget(tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.json"]


def test_a_missing_hub_and_a_short_text_are_reported_before_anything_is_computed(home, no_hub, tmp_path):
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
