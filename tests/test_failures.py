"""What a disk, a terminal, a signal or a mistake does to a command: one sentence, an exit code, no traceback."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("typer")

from softpick import __version__
from softpick.experiment.failures import _file_of, in_one_sentence, sentence
from softpick.experiment.files import DamagedFileError, parse_json, read_json
from softpick.experiment.settings import RANGES

SOFTPICK = [sys.executable, "-m", "softpick"]


def run(*arguments, **options):
    return subprocess.run(
        [*SOFTPICK, *map(str, arguments)], capture_output="stdout" not in options, text=True, timeout=300, **options
    )


# ---------------------------------------------------------------------------------------------------------------------
# Start-up


# what softpick's subjects stand on, each of which takes longer to import than to print a help text
SLOW = ("torch", "numpy", "transformers", "tokenizers", "safetensors", "accelerate", "huggingface_hub", "datasets")
SLOW += ("matplotlib", "pyarrow", "lm_eval", "fastapi", "torchao", "triton")


def processor_time(code):
    """Seconds that a fresh Python takes for it, the lower one of two runs; what it printed."""
    clock = "\nimport sys, time\nprint(time.process_time(), file=sys.stderr)"
    runs = [
        subprocess.run([sys.executable, "-c", code + clock], capture_output=True, text=True, timeout=100) for _ in "12"
    ]
    assert not any(done.returncode for done in runs), runs[0].stderr
    return min(float(done.stderr.split()[-1]) for done in runs), runs[0].stdout


@pytest.fixture(scope="module")
def time_of_torch():
    return processor_time("import torch")[0]


@pytest.mark.parametrize("arguments", ["--version", "--help", "train --help", "compare --help", "quantize --help"])
def test_help_and_version_import_nothing_slow(arguments, time_of_torch):
    """Less than 0.4 of the time that this machine takes for torch (on an idle one 0.1 to 0.2 s, torch 1.5)."""
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({SLOW}))\n"  # an import would raise
        "from softpick.cli import main\n"
        "try:\n"
        f"    main({arguments.split()})\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
    )
    seconds, printed = processor_time(code)
    assert seconds < 0.4 * time_of_torch
    assert ("Usage" in printed) != (arguments == "--version")


def test_version_needs_nothing_but_python():
    code = (
        "import sys\n"
        "for name in ('torch', 'typer', 'rich', 'click', 'numpy', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "from softpick.cli import main\n"
        "main(['--version'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout == f"softpick {__version__}\n", done.stderr


def test_names_are_there_as_before():
    code = (
        "import softpick\n"
        "assert 'torch' not in __import__('sys').modules\n"
        "assert set(softpick.__all__) <= set(dir(softpick))\n"
        "from softpick import nn, softpick as function, NORMALIZERS\n"
        "from softpick import *\n"
        "assert callable(function) and softpick is function\n"
        "import softpick as package\n"
        "for name in package.__all__:\n"
        "    assert getattr(package, name) is not None\n"
        "assert package.functional.softpick is package.softpick and package.nn is nn and package.ops\n"
        "try:\n"
        "    package.nothing\n"
        "except AttributeError as error:\n"
        "    assert 'nothing' in str(error)\n"
        "else:\n"
        "    raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_the_first_use_may_be_inside_a_compiled_function():
    code = (
        "import torch, softpick\n"
        "f = torch.compile(lambda x: softpick.scaled_dot_product_attention(x, x, x), backend='eager', fullgraph=True)\n"
        "x = torch.randn(1, 1, 4, 8)\n"
        "assert torch.equal(f(x), softpick.scaled_dot_product_attention(x, x, x))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# ---------------------------------------------------------------------------------------------------------------------
# Terminals, disks and signals


@pytest.mark.parametrize("arguments", ["--version", "--help", "normalizers", "recipes tiny_cpu"])
def test_an_output_that_is_full(arguments):
    with open("/dev/full", "w") as full:
        done = run(*arguments.split(), stdout=full, stderr=subprocess.PIPE)
    assert done.returncode not in (0, 120)
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.thinned
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [("--version", 0), ("--help", 0), ("normalizers", 0), ("recipes nothing", 2), ("analyze nowhere/at/all", 2)],
)
def test_streams_that_are_closed(tmp_path, arguments, code, closed):
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -m softpick {arguments} {closed}', sys.executable],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "unexpected" not in done.stderr
    if code and "2>" not in closed:
        assert done.stderr.startswith("softpick: error: ")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_files_do_not_take_the_place_of_a_closed_stream(tmp_path, closed):
    code = (
        "import os, sys\n"
        "from softpick.experiment.failures import process\n"
        "with process(), open('file', 'w') as file:\n"
        "    print('one')\n"
        "    print('two', file=sys.stderr)\n"
        "    os.system('echo three; echo four >&2')\n"
        "    file.write(str(file.fileno() > 2))\n"
    )
    (tmp_path / "code.py").write_text(code)
    done = subprocess.run(["sh", "-c", f'exec "$0" code.py {closed}', sys.executable], cwd=tmp_path, timeout=100)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "True"


@pytest.mark.thinned(every=2)
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_knows_few_characters(encoding):
    done = run("normalizers", env=os.environ | {"PYTHONIOENCODING": encoding})
    assert done.returncode == 0
    assert "softpick" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("after", [0.3, 1.0, 2.0, 4.0])
def test_an_interrupt_while_libraries_are_imported(tmp_path, after):
    command = [*SOFTPICK, "analyze", "nowhere/at/all", "--output", str(tmp_path / "out")]
    code = (  # the signal comes from inside, so that it falls into an import whatever else the machine does
        "import signal, sys\n"
        "from softpick.cli import main\n"
        f"signal.setitimer(signal.ITIMER_REAL, {after})\n"
        "signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))\n"
        f"main({command[3:]!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 130 or "nowhere" in done.stderr  # it was quicker than the signal
    assert "Traceback" not in done.stderr
    assert "interrupted" in done.stderr + done.stdout or done.returncode != 130


def test_an_interrupt_from_outside(tmp_path):
    process = subprocess.Popen(
        [*SOFTPICK, "train", "tiny_cpu", "--output", str(tmp_path / "run")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, (out, err)
    assert "Traceback" not in err


# ---------------------------------------------------------------------------------------------------------------------
# Sentences


def raised(function):
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def broken(kind, *arguments):
    def function():
        raise kind(*arguments)

    return function


def write_damaged(path):
    path.write_text('{"a": 1,\n "b" 2}')

    def load(json_path):
        return json.loads(open(json_path).read())

    return lambda: load(path)


def read_weights(path):
    from safetensors.torch import load_file

    path.write_bytes(b"\xff" * 100)
    return lambda: load_file(path)


def too_large():
    import torch

    return torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("make", "words", "code"),
    [
        (lambda p: broken(OSError, errno.ENOSPC, "x", str(p / "f")), "f: No space left on device", 2),
        (lambda p: broken(PermissionError, errno.EACCES, "x", str(p / "f")), "f: Permission denied", 2),
        (lambda p: broken(OSError, errno.EROFS, "x", str(p / "f")), "f: Read-only file system", 2),
        (lambda p: lambda: (p / ("n" * 300)).write_text(""), "n: File name too long", 2),
        (lambda p: p.read_text, ": Is a directory", 2),
        (lambda p: write_damaged(p / "trainer_state.json"), "trainer_state.json, line 2: is damaged", 2),
        (lambda p: read_weights(p / "model.safetensors"), "model.safetensors: is damaged", 2),
        (lambda p: broken(RuntimeError, "PytorchStreamWriter failed writing file"), "cannot be written", 2),
        (lambda p: too_large, "memory: there is not enough", 2),
        (lambda p: broken(MemoryError), "memory: there is not enough", 2),
        (lambda p: broken(BrokenPipeError), "closed", 1),
        (lambda p: broken(ModuleNotFoundError, "No module named 'x'"), "No module named 'x'", 2),
        (lambda p: broken(KeyError, "x"), "unexpected KeyError at test_failures.py:", 1),
        (lambda p: broken(ValueError, "one\ntwo"), "unexpected ValueError at", 1),
    ],
)
def test_sentences(tmp_path, make, words, code, capsys):
    function = make(tmp_path)
    message, found = sentence(raised(function))
    assert words in message
    assert "\n" not in message
    assert found == code
    with pytest.raises(SystemExit) as stopped:
        in_one_sentence(function)()
    assert stopped.value.code == code
    assert capsys.readouterr().err == f"softpick: error: {sentence(raised(function))[0]}\n"


def test_errors_of_softpick_are_their_own_words():
    from softpick.experiment.reading import DataError, read_corpus

    error = raised(lambda: read_corpus("/nowhere"))
    assert isinstance(error, DataError)
    assert sentence(error) == ("data: /nowhere does not exist", 2)
    assert sentence(raised(lambda: RANGES["steps"].nothing))[1] == 1  # an error of Python's


def test_errors_and_warnings_of_every_part_of_softpick_are_its_words(capsys):
    import warnings

    import torch

    from softpick.experiment.failures import process
    from softpick.functional import scaled_dot_product_attention

    x = torch.zeros(1, 1, 4, 8)
    error = raised(lambda: scaled_dot_product_attention(x, x, x, normalizer="nothing"))
    message, code = sentence(error)
    assert code == 2
    assert "unexpected" not in message
    import softpick.functional as module

    with process():
        warnings.warn_explicit("words", UserWarning, module.__file__, 1)
    assert capsys.readouterr().err == "softpick: warning: words\n"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["compare", "--data", ""], "data"),
        (["compare", "--output", ""], "output"),
        (["analyze", "x", "--data", ""], "data"),
        (["analyze", "x", "--output", ""], "output"),
        (["evaluate", "x", "--data", ""], "data"),
        (["evaluate", "x", "--data-dir", ""], "data_dir"),
        (["quantize", "x", "--output", ""], "output"),
        (["train", "tiny_cpu", "--output", ""], "output"),
        (["grid", "tiny_cpu", "--output", ""], "output"),
    ],
)
def test_an_empty_path_is_refused(arguments, name, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from softpick.cli import build_app

    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(build_app(), arguments)
    assert done.exit_code == 2
    assert f"{name}: expected a path, got ''" in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", ["hub:", "hub: ", " "])
def test_data_without_a_name(data):
    from softpick.training.recipes import RecipeError, get_recipe

    with pytest.raises(RecipeError, match="data: expected a path or hub:NAME"):
        get_recipe("tiny_cpu").override([f"data={data}"])


def test_errors_of_every_command_are_sentences():
    from softpick.cli import build_app

    for command in build_app().registered_commands:
        assert command.callback.__code__ is in_one_sentence(print).__code__, command.name


def test_the_file_nearest_to_the_error(tmp_path):
    (tmp_path / "outer").write_text("x")
    (tmp_path / "inner").write_text("x")

    def inner(path):
        raise RuntimeError

    def outer(path, other):
        inner(other)

    assert _file_of(raised(lambda: outer(str(tmp_path / "outer"), tmp_path / "inner"))) == str(tmp_path / "inner")


@pytest.mark.parametrize("content", [b"", b'{"a": 1,\n "b" 2}', b"\xff\xfe\x00", b"[" * 100_000, b"9" * 10_000 + b"x"])
def test_files_of_a_run_that_are_damaged(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"results\.json cannot be read as JSON") as stopped:
        read_json(path)
    assert sentence(stopped.value)[1] == 2
    assert "\n" not in str(stopped.value)
    path.write_text('{"a": [1, null]}')
    assert read_json(path) == {"a": [1, None]}
    with pytest.raises(DamagedFileError, match=r"m\.jsonl, line 8: is damaged"):
        parse_json('{"a": 1', "m.jsonl", 8)


def test_metrics_that_are_damaged(tmp_path):
    pytest.importorskip("transformers")
    from softpick.training.pretrain import _Metrics

    metrics = _Metrics(tmp_path / "metrics.jsonl", True, None)
    for step in (1, 2, 3):
        metrics.write("train", step, {"loss": 1.0})
    with metrics.path.open("a") as file:
        file.write('{"kind": "tr')  # a kill cut this line short
    assert len(metrics.entries("train")) == 3
    metrics.resume(2)
    assert [entry["step"] for entry in metrics.entries("train")] == [1, 2]
    for line in ("not json", "[1]", '{"kind": "train", "step": "x"}'):
        metrics.path.write_text('{"kind": "train", "step": 1}\n' + line + "\n")
        for call in (lambda: metrics.resume(1), lambda: metrics.entries("train")):
            with pytest.raises(DamagedFileError, match=r"metrics\.jsonl, line 2: is damaged"):
                call()


@pytest.mark.long
def test_warnings_of_softpick_are_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    (tmp_path / "b.docx").write_text("x")
    done = run("train", "tiny_cpu", f"data={tmp_path}", "--output", tmp_path / "run")
    assert done.returncode == 2
    first, *_ = done.stderr.splitlines()
    assert first == f"softpick: warning: data: {tmp_path}: 1 file of other kinds left out (1 .docx)"
    assert "too few for one sequence" in done.stderr


def test_a_loss_that_is_not_finite_ends_with_an_error(tmp_path, monkeypatch):
    """Both commands that train; what was trained stays for a look at it."""
    pytest.importorskip("transformers")
    from typer.testing import CliRunner

    from softpick.cli import build_app
    from softpick.training import engine

    real = engine.train

    def broken_training(*args, **kwargs):
        outcome = real(*args, **kwargs)
        outcome.validation_loss = float("nan")
        return outcome

    monkeypatch.setattr(engine, "train", broken_training)
    (tmp_path / "text.txt").write_text("the cat sat on a mat and the dog saw it run over the hill " * 3000)
    small = ["steps=1", "warmup_steps=1", "validation_sequences=4", "probe_every=0", f"data={tmp_path / 'text.txt'}"]
    commands = {
        "train": ["train", "tiny_cpu", *small],
        "compare": ["compare", "--steps", "1", "--vocab-size", "300", "--data", str(tmp_path / "text.txt")],
    }
    for name, arguments in commands.items():
        done = CliRunner().invoke(build_app(), [*arguments, "--output", str(tmp_path / name)])
        assert done.exit_code in (1, 2), name
        assert "the validation loss is nan" in done.output
        assert "Traceback" not in done.output
    assert (tmp_path / "train" / "model").is_dir()
