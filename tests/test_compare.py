"""softpick compare as a user runs it, in processes of its own: what it prints and writes, a real Ctrl-C, the phenomenon."""

import json
import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("transformers")


TEXT = [f"def function_{i}(a, b):\n    return a * {i} + b - {i * i}\n" * 6 for i in range(60)]
TINY = [
    "--layers",
    "1",
    "--heads",
    "2",
    "--width",
    "16",
    "--sequence-length",
    "16",
    "--vocab-size",
    "270",
    "--batch-size",
    "4",
    "--steps",
    "40",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i, text in enumerate(TEXT):
        (folder / f"{i:03}.txt").write_text(text)
    return folder


def command(*arguments):
    return [sys.executable, "-m", "softpick.cli", *map(str, arguments)]


def softpick(*arguments, code=0):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(*arguments), capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "finished"
    names = "softmax,softpick,learned_sink"
    printed = softpick("compare", "--data", corpus, "--normalizers", names, "--output", output, *TINY)
    return output, printed


def figures(output):
    results = json.loads((output / "results.json").read_text())
    return [(run["normalizer"], run["validation_loss"], run["curves"], run["measurements"]) for run in results["runs"]]


def test_prints_a_table_and_writes_report_and_figures(finished):
    output, printed = finished
    for words in ("Validation loss", "Sink rate", "Kurtosis", "Weights exactly 0", "softmax", "learned sink"):
        assert words.lower() in printed.lower()
    html = (output / "report.html").read_text()
    assert "http://" not in html.replace("http://www.w3.org", "")
    results = json.loads((output / "results.json").read_text())
    assert [run["normalizer"] for run in results["runs"]] == ["softmax", "softpick", "learned_sink"]
    softmax, softpick_run, _ = results["runs"]
    assert softmax["measurements"]["sparsity"]["zero"] == 0
    assert softpick_run["measurements"]["sparsity"]["zero"] > 5
    assert len({run["curves"]["loss"][0] for run in results["runs"]}) == 3  # three different models ...
    assert softmax["parameters"] == softpick_run["parameters"]  # ... of the same shape
    assert results["meta"]["sequence_length"] == 16


@pytest.mark.long
def test_checkpoints_load_after_one_import(finished):
    output, _ = finished
    for name in ("softpick", "learned_sink"):
        code = (
            "import softpick.integrations.transformers as st;"
            "from transformers import AutoModelForCausalLM, AutoTokenizer;"
            f"path = next(p.parent for p in __import__('pathlib').Path({str(output)!r}).glob('{name}-seed0/**/config.json'));"
            "m = AutoModelForCausalLM.from_pretrained(path); assert st.normalizer_of(m) == " + repr(name) + ";"
            f"t = AutoTokenizer.from_pretrained(path if (path / 'tokenizer.json').exists() else {str(output / 'tokenizer')!r});"
            "ids = t('def function', return_tensors='pt').input_ids; assert ids[0, 0] == t.bos_token_id;"
            "out = m.generate(ids, max_new_tokens=4, do_sample=False); assert out.shape[1] == ids.shape[1] + 4"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_finished_run_is_not_trained_again_and_other_settings_are_refused(finished, corpus):
    output, _ = finished
    before = (output / "softpick-seed0" / "run.json").stat().st_mtime_ns
    names = "softmax,softpick,learned_sink"
    softpick("compare", "--data", corpus, "--normalizers", names, "--output", output, *TINY)
    assert (output / "softpick-seed0" / "run.json").stat().st_mtime_ns == before
    printed = softpick("compare", "--data", corpus, "--output", output, *TINY[:-1], 50, code=2)
    assert "other settings" in printed
    assert "steps" in printed


@pytest.mark.long
def test_ctrl_c_leaves_a_run_that_resumes_to_the_same_figures(corpus, finished, tmp_path):
    output = tmp_path / "interrupted"
    arguments = (
        "compare",
        "--data",
        corpus,
        "--normalizers",
        "softmax,softpick,learned_sink",
        "--output",
        output,
        *TINY,
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )
    for line in process.stdout:  # interrupt in the middle of the second model
        if "[2/3]" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=120) == 130, rest
    assert not (output / "results.json").exists()
    assert (output / "softmax-seed0" / "run.json").exists()
    softpick(*arguments)
    assert figures(output) == figures(finished[0])  # also: the same seed gives the same run


@pytest.mark.long
def test_backcopy_shows_the_phenomenon(tmp_path):
    """Two thirds of the default steps: softmax has a sink, softpick has none, at the same loss."""
    output = tmp_path / "backcopy"
    softpick("compare", "--task", "backcopy", "--steps", 1000, "--output", output)
    runs = json.loads((output / "results.json").read_text())["runs"]
    rates = {run["normalizer"]: run["measurements"]["sink"]["first"]["rate"]["0.3"] for run in runs}
    losses = {run["normalizer"]: run["validation_loss"] for run in runs}
    assert rates["softmax"] > 90
    assert rates["softpick"] == 0
    assert abs(losses["softpick"] / losses["softmax"] - 1) < 0.03
