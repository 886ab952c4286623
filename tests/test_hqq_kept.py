"""What hqq leaves in a folder is the whole model, also parameters of modules that hold others; bits are counted right."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("hqq")

from transformers import MixtralConfig, MixtralForCausalLM

from softpick.experiment.models import Subject, load_subject
from softpick.experiment.perplexity import perplexity
from softpick.experiment.progress import Silent
from softpick.quantization import methods
from softpick.quantization.apply import Job
from softpick.quantization.apply import quantize as quantize_weights
from softpick.quantization.methods import load_hqq
from softpick.quantization.verify import QuantizationError
from softpick.training import engine
from softpick.training.data import train_tokenizer

TEXT = "def function(a, b):\n    return a * 3 + b - 4\n" * 50


def experts():
    config = MixtralConfig(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64, bos_token_id=0,
        eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def sinks():
    sizes = {"vocab_size": 300, "layers": 2, "heads": 2, "width": 64, "sequence_length": 64, "seed": 0}
    model = engine.build_model("learned_sink", **sizes, score_scale=True, output_gate=True, intermediate_size=64)
    for name, parameter in model.named_parameters():
        if "sink" in name or "scale" in name:
            parameter.data += torch.rand_like(parameter)
    return model


@pytest.fixture(params=[experts, sinks])
def job(request, tmp_path):
    torch.manual_seed(0)
    model = request.param()
    model.save_pretrained(tmp_path / "model")
    train_tokenizer([TEXT], 300).save_pretrained(tmp_path / "model")
    subject: Subject = load_subject(str(tmp_path / "model"), reporter=Silent(), decoder=True)
    return Job(subject, 4, 32, torch.zeros(1, 4, dtype=torch.long), tmp_path / "made", Silent())


@pytest.mark.thinned(every=2)
def test_what_was_saved_is_what_was_measured(job):
    made = quantize_weights("hqq", job)
    loaded = load_hqq(job.folder)
    rows = torch.randint(2, 290, (3, 32))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=rows).logits, made.subject.model(input_ids=rows).logits)
    assert perplexity(loaded, rows) == perplexity(made.subject.model, rows)
    assert loaded.config._attn_implementation == job.subject.model.config._attn_implementation
    # 4 bits, a scale and an offset in fp32 for 32 weights (2 bits), and what hqq writes beside each matrix
    assert 6 <= made.verification.bits_per_weight < 12


def test_a_file_that_lacks_something_is_found(job, monkeypatch):
    """Whichever library it is that forgets it."""
    from hqq.models.hf.base import AutoHQQHFModel

    monkeypatch.setattr(methods, "_hqq_library", lambda: AutoHQQHFModel)
    if "Mixtral" in type(job.subject.model).__name__:
        with pytest.raises(QuantizationError, match="the library did not save all of the model"):
            quantize_weights("hqq", job)


def test_a_model_that_does_not_run_any_more_is_said(job, monkeypatch):
    """HunYuan's router looks at the dtype of its layer's weight, which a layer of hqq does not have."""

    def apply(job):
        model = methods.METHODS["hqq"].apply(job)
        model.register_forward_pre_hook(lambda model, _: model.model.layers[0].self_attn.q_proj.weight.dtype)
        return model

    monkeypatch.setitem(methods.METHODS, "toy", replace(methods.METHODS["hqq"], apply=apply))
    with pytest.raises(QuantizationError, match=r"toy: the quantized model does not run \(AttributeError: .*'weight'"):
        quantize_weights("toy", job)
