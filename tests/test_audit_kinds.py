"""``softpick analyze`` on saved models that are no decoders of text: encoder-decoders, images, sound, hybrids, fewer bits."""

import json
import wave

import pytest
import torch

transformers = pytest.importorskip("transformers")

from small_models import DIMS, VISION  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from softpick.analysis.audit import AuditError, AuditSettings, audit  # noqa: E402
from softpick.analysis.capture import measure_parts  # noqa: E402
from softpick.analysis.report import decode_maps, render  # noqa: E402
from softpick.experiment.failures import ModelError  # noqa: E402
from softpick.experiment.progress import Silent  # noqa: E402
from softpick.experiment.reading import DataError  # noqa: E402
from softpick.experiment.samples import Source, synthetic_image, synthetic_sound  # noqa: E402
from softpick.training.data import train_tokenizer  # noqa: E402

TEXT = "the cat sat on a mat and the dog saw it run over the hill to the red barn " * 60


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    (root / "corpus.txt").write_text(TEXT)
    tokenizer = train_tokenizer([TEXT], 300)
    n, bos, eos = len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = {
        "vocab_size": n,
        "pad_token_id": eos,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "decoder_start_token_id": bos,
    }

    def save(name, kind, config, *more):
        torch.manual_seed(0)
        kind(config).save_pretrained(root / name)
        for part in more:
            part.save_pretrained(root / name)

    ending = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    from tokenizers.processors import TemplateProcessing

    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, eos)]
    )
    t5 = transformers.T5Config(**ids, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4)
    save("t5", transformers.T5ForConditionalGeneration, t5, ending)
    bart = transformers.BartConfig(**ids, **DIMS, max_position_embeddings=64)
    save("bart", transformers.BartForConditionalGeneration, bart, tokenizer)
    whisper = transformers.WhisperConfig(
        **ids, **DIMS, num_mel_bins=80, max_source_positions=50, max_target_positions=24, begin_suppress_tokens=None
    )
    ears = transformers.WhisperFeatureExtractor(chunk_length=1)
    save("whisper", transformers.WhisperForConditionalGeneration, whisper, tokenizer, ears)
    eyes = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    registers = transformers.Dinov2WithRegistersConfig(**VISION, num_register_tokens=2)
    save("dinov2", transformers.Dinov2WithRegistersModel, registers, eyes)
    clip = transformers.CLIPConfig(
        vision_config=VISION, text_config={"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 16}, projection_dim=8,
    )  # fmt: skip
    save(
        "clip", transformers.CLIPModel, clip, transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    )
    save("bare", transformers.ViTModel, transformers.ViTConfig(**VISION))
    lfm2 = transformers.Lfm2Config(
        vocab_size=n, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"], pad_token_id=eos, bos_token_id=bos, eos_token_id=eos,
    )  # fmt: skip
    save("lfm2", transformers.Lfm2ForCausalLM, lfm2, tokenizer)
    llama = transformers.LlamaConfig(
        vocab_size=n, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=bos, eos_token_id=eos, initializer_range=0.1,
    )  # fmt: skip
    save("llama", transformers.LlamaForCausalLM, llama, tokenizer)
    return root


def run_of(home, name, **given):
    given = {
        "data": str(home / "corpus.txt"),
        "samples": 5,
        "sequence_length": 24,
        "batch_size": 2,
        "map_tokens": 12,
    } | given
    given |= {"evict_after": 4}
    return audit(AuditSettings(str(home / name), **given))


@pytest.mark.parametrize(("name", "layers"), [("t5", (2, 3, 3)), ("bart", (2, 2, 2))])
def test_an_encoder_decoder_has_three_runs(home, name, layers):
    report = run_of(home, name, texts=("the cat sat on a mat",), cost=True, cost_samples=1)
    encoder, decoder, cross = report["runs"]
    assert [run["title"] for run in report["runs"]] == [f"{name} encoder", f"{name} decoder", f"{name} cross-attention"]
    assert tuple(run["measurements"]["data"]["layers"] for run in report["runs"]) == layers
    assert all(run["measurements"]["data"]["sequence_length"]["max"] == 24 for run in report["runs"])
    assert [run["measurements"]["data"]["causal"] for run in report["runs"]] == [False, True, False]
    assert report["notes"] == [
        f"{name}: no knockout, because an encoder-decoder, of which the decoder is given its text, has no perplexity of a "
        "next token."
    ]
    assert {layer["name"].split(".")[0] for layer in encoder["cost"]["layers"]} == {"encoder", "decoder"}
    assert "cost" not in decoder
    words = [run["samples"][0]["text_tokens"] for run in report["runs"]]
    start = transformers.AutoTokenizer.from_pretrained(home / name).decode(
        [decoder["measurements"]["data"]["bos"]["first_token_id"]]
    )
    # the decoder reads the encoder's text, shifted by one where its tokenizer does not begin with the decoder's first token
    assert words[1] == words[2] == ([start, *words[0][:-1]] if name == "t5" else words[0])
    assert cross["samples"][0]["key_tokens"] == words[0]
    assert ("<eos>" if name == "t5" else "cat") in "".join(words[0])
    assert "encoder's first token" in cross["verdict"][0]
    json.dumps(report, allow_nan=False)
    render(report)
    # the same figures from the model itself
    model = transformers.AutoModel.from_pretrained(home / name).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / name)
    stream = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    begin, end = ([], [tokenizer.eos_token_id]) if name == "t5" else ([tokenizer.bos_token_id], [])
    rows = torch.tensor([[*begin, *stream[i * 23 : (i + 1) * 23], *end] for i in range(5)])
    shifted = torch.cat([torch.full((5, 1), model.config.decoder_start_token_id), rows[:, :-1]], 1) if end else rows
    want = measure_parts(model, [{"input_ids": rows, "decoder_input_ids": shifted}])
    for run in report["runs"]:
        found = want[run["part"]]
        assert run["measurements"]["rows"]["entropy"] == pytest.approx(found.rows["entropy"], rel=1e-4)
        assert run["measurements"]["sink"]["first"]["rate"] == found.sink["first"]["rate"]


def test_an_interrupted_encoder_decoder_goes_on(home, tmp_path, monkeypatch):
    monkeypatch.setattr("softpick.analysis.audit._SAVE_SECONDS", -1.0)

    class Stops(Silent):
        def progress(self, label, total):
            self.label = label
            return super().progress(label, total)

        def update(self, step, loss, note=""):
            if step == 2 and self.label.startswith("measuring"):
                raise KeyboardInterrupt

    settings = AuditSettings(
        str(home / "t5"), data=str(home / "corpus.txt"), samples=5, sequence_length=24, batch_size=1, knockout=()
    )
    with pytest.raises(KeyboardInterrupt):
        audit(settings, state=tmp_path, reporter=Stops())
    assert [file.suffix for file in tmp_path.iterdir() if file.name.startswith("audit-")] == [".pt"]
    went_on, at_once = audit(settings, state=tmp_path), audit(settings)
    for a, b in zip(went_on["runs"], at_once["runs"], strict=True):
        assert a["measurements"] == b["measurements"]


def test_sound(home, tmp_path):
    report = run_of(home, "whisper", samples=3)
    encoder, decoder, cross = report["runs"]
    assert [run["measurements"]["data"]["sequence_length"]["max"] for run in report["runs"]] == [50, 24, 24]
    assert cross["measurements"]["data"]["keys"]["max"] == 50
    assert encoder["token_text"] == {"4": "frame"}
    assert set(cross["token_text"].values()) == {"frame"}
    assert "3 synthetic sounds" in report["meta"]["data"]
    assert "of the first frame" not in encoder["verdict"][0]
    assert "on the first frame at T = 50" in encoder["verdict"][0]
    assert "on the first token at T = 24" in decoder["verdict"][0]
    render(report)
    for i in range(2):
        with wave.open(str(tmp_path / f"{i}.wav"), "wb") as file:
            file.setnchannels(1), file.setsampwidth(2), file.setframerate(16000)
            file.writeframes((synthetic_sound(i, 16000) * 32767).short().numpy().tobytes())
    given = run_of(home, "whisper", samples=2, data=str(tmp_path))
    assert "2 of 2 sounds of" in given["meta"]["data"]
    made = run_of(home, "whisper", samples=2)
    a, b = (r["runs"][0]["measurements"]["rows"]["entropy"] for r in (given, made))
    assert a == pytest.approx(b, rel=1e-3)  # 16 bits
    with wave.open(str(tmp_path / "0.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000)
        file.writeframes(bytes(400))
    with pytest.raises(DataError, match=r"0\.wav has 8000 samples of 16 bits a second .* expected 16000 of 16 bits"):
        run_of(home, "whisper", data=str(tmp_path))


def test_images(home, tmp_path):
    report = run_of(home, "dinov2", data=None, cost=True)
    (run,) = report["runs"]
    data = run["measurements"]["data"]
    assert data["sequence_length"]["max"] == 1 + 2 + 16
    assert {run["token_text"][str(t["token_id"])] for t in run["measurements"]["sink"]["by_token"]} == {
        "[CLS]", "register", "patch",
    }  # fmt: skip
    assert run["verdict"][0].count("on [CLS] at T = 19") == 1
    assert "published" not in run["verdict"][0]
    assert run["samples"][0]["text_tokens"][:4] == ["[CLS]", "register 1", "register 2", "patch 1,1"]
    assert report["meta"]["data"] == "5 synthetic images"
    assert run["notes"] == ["dinov2: no knockout, because a model of images has no perplexity of a next token."]
    assert len(run["cost"]["layers"]) == 12
    text = render(report)
    assert "every sample starts with [CLS]" in text
    from PIL import Image

    for i in range(3):
        Image.fromarray(synthetic_image(i).numpy()).save(tmp_path / f"{i}.png")
    own = run_of(home, "dinov2", data=str(tmp_path))
    assert own["meta"]["data"] == f"3 of 3 images of {tmp_path}"
    three = run_of(home, "dinov2", data=None, samples=3)
    assert own["runs"][0]["measurements"] == three["runs"][0]["measurements"]
    (tmp_path / "4.png").write_text("none")
    with pytest.raises(DataError, match=r"4\.png is no image that Pillow reads"):
        run_of(home, "dinov2", data=str(tmp_path))
    with pytest.raises(DataError, match="has no images"):
        run_of(home, "dinov2")
    with pytest.raises(ModelError, match="has no image processor that transformers can load"):
        run_of(home, "bare", data=None)


def test_synthetic_images_differ():
    made = [synthetic_image(i).float() for i in range(8)]
    assert all(float((made[i] - made[j]).abs().mean()) > 5 for i in range(8) for j in range(i))


def test_the_image_tower_of_two(home):
    said = []

    class Says(Silent):
        def say(self, text):
            said.append(text)

    report = audit(AuditSettings(str(home / "clip"), samples=2), reporter=Says())
    assert report["runs"][0]["measurements"]["data"]["sequence_length"]["max"] == 17
    assert any(text.endswith("CLIPVisionModel is measured, and nothing else of CLIPModel") for text in said), said


def test_a_hybrid_names_what_it_leaves_out(home):
    report = run_of(home, "lfm2")
    assert "lfm2: 2 of 3 layers have no attention and are not measured (Lfm2ShortConv): 0, 2." in report["notes"]
    assert report["runs"][0]["knockout"]


def test_a_text_model_gets_no_images(home, tmp_path):
    from PIL import Image

    Image.fromarray(synthetic_image(0).numpy()).save(tmp_path / "0.png")
    with pytest.raises(DataError, match="data: "):
        run_of(home, "llama", data=str(tmp_path))


# Models in fewer bits, as they are saved


def bitsandbytes(bits):
    pytest.importorskip("bitsandbytes")
    return {"quantization_config": transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})}


def torchao():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return {"quantization_config": transformers.TorchAoConfig(Int8WeightOnlyConfig(version=2))}


def gptq():
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    rows = torch.arange(512).remainder(250).view(16, 32)
    samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows]
    return {"quantization_config": transformers.GPTQConfig(bits=4, dataset=samples, group_size=32, model_seqlen=32)}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: bitsandbytes(8), "bitsandbytes, 8 bits"),
        (lambda: bitsandbytes(4), "bitsandbytes, 4 bits"),
        (torchao, "torchao"),
        pytest.param(gptq, "gptq, 4 bits", marks=pytest.mark.long),
    ],
    ids=["bitsandbytes-8", "bitsandbytes-4", "torchao", "gptq"],
)
def test_a_model_in_fewer_bits_is_measured_as_it_is(home, tmp_path, make, said):
    """Its maps are those of its own eager attention, and not those of the model before it was rounded."""
    given = make()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(home / "llama", device_map="cpu", dtype=torch.float32, **given)
    if said.startswith("gptq"):
        model.config.quantization_config.dataset = None
    model.save_pretrained(tmp_path / "few")
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "llama")
    tokenizer.save_pretrained(tmp_path / "few")
    (run,) = run_of(tmp_path, "few", data=str(home / "corpus.txt"), texts=("the cat sat on a mat",))["runs"]
    assert run["quantization"] == said
    rounded = load(tmp_path / "few", device_map="cpu", attn_implementation="eager").eval()
    ids = torch.tensor(
        [[tokenizer.bos_token_id, *tokenizer("the cat sat on a mat", add_special_tokens=False)["input_ids"]]]
    )
    with torch.no_grad():
        want = torch.cat(rounded(ids, output_attentions=True).attentions)
        whole = load(home / "llama", attn_implementation="eager").eval()
        before = torch.cat(whole(ids, output_attentions=True).attentions)
    got = decode_maps(run["samples"][0]["maps"])
    torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-4)
    assert (got - before).abs().max() > 3 * (got - want).abs().max()
    assert run["knockout"][0]["eviction"]
    message = f"cost: the weights of .*few are rounded already \\({said}\\); what rounding costs is measured on"
    with pytest.raises(AuditError, match=message):
        run_of(tmp_path, "few", data=str(home / "corpus.txt"), cost=True)


def test_what_hqq_saved_is_refused_by_name(home, tmp_path):
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "config.json").write_text((home / "llama" / "config.json").read_text())
    (tmp_path / "h" / "qmodel.pt").write_bytes(b"")
    with pytest.raises(
        ModelError, match=r"in the format of hqq's own library \(qmodel\.pt\), which transformers does not load"
    ):
        run_of(tmp_path, "h", data=str(home / "corpus.txt"))


@pytest.mark.parametrize("source", [None, "corpus.txt"])
def test_source_says_what_it_depends_on(home, source):
    found = Source(None if source is None else str(home / source), "text")
    assert found.identity("text")
    assert found.identity("images") == []
