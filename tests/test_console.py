"""What a terminal shows while a command works: bars in one line, also of loading, and no other library's."""

import io
import re

import pytest

pytest.importorskip("typer")
transformers = pytest.importorskip("transformers")

from rich.console import Console  # noqa: E402
from transformers.utils import logging  # noqa: E402

from softpick.cli.console import ConsoleReporter  # noqa: E402
from softpick.experiment.models import load_subject  # noqa: E402
from softpick.experiment.progress import Silent  # noqa: E402
from softpick.integrations.patches import original  # noqa: E402
from softpick.training.data import train_tokenizer  # noqa: E402


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("name", ["a", "meta-llama-Llama-3.3-70B-Instruct-abliterated-GPTQ-Int4-calibrated-on-c4-2"])
def test_bars_of_long_names_keep_their_numbers(name, width):
    """On a terminal a bar shows the end of its label, how far it is and how long is left, in one line."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, legacy_windows=False)
    with ConsoleReporter(console).progress(f"measuring {name}", 256) as progress:
        progress.update(128, None)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n").strip().splitlines()[-1]
    assert len(last) <= width
    assert name[-2:] in last
    assert last.startswith("mea")
    for part in ("128/256", "0:00:0", "left"):
        assert part in last, last


class Bars(Silent):
    def __init__(self):
        self.seen = []

    def progress(self, label, total):
        self.seen.append([label, total, 0])
        return super().progress(label, total)

    def update(self, step, loss, note=""):
        self.seen[-1][2] = step


def test_loading_shows_a_bar(tmp_path, capfd):
    tokenizer = train_tokenizer(["the cat sat on a mat " * 20], 260)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    capfd.readouterr()
    bars = Bars()
    load_subject(str(tmp_path / "m"), reporter=bars)
    ((label, total, done),) = bars.seen
    assert (label, done) == ("loading m", total)
    assert total == len(dict(model.named_parameters()))
    assert "Loading weights" not in capfd.readouterr().err
    assert logging.set_tqdm_hook(None) is None
    assert original("transformers.modeling_gguf_pytorch_utils:tqdm").__name__.startswith("tqdm")
