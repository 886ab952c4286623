"""Small data, models and tasks that the tests of ``softpick evaluate`` share."""

import json
import re
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
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from softpick.evaluation import passkey as passkey_module
from softpick.training import engine
from softpick.training.data import train_tokenizer

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
    from softpick.experiment.models import load_subject
    from softpick.experiment.progress import Silent

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
        steps = []
        if ": loading " not in label:  # a model's weights: test_console.py
            self.bars.append((label, total))
            self.updates.append(steps)

        class Bar:
            def update(self, step, loss, note=""):
                steps.append(step)

        yield Bar()


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise ConnectionError("no name server")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


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


def lines(home, task):
    return [json.loads(line) for line in (home / "data" / f"{task}.jsonl").read_text().splitlines()]
