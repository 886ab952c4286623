"""What the tests of torchtitan share: its command line in the words of the installed version, a tokenizer, refusals."""

import dataclasses
import json
from importlib.metadata import version

import pytest
import torch

OLD = version("torchtitan") == "0.2.2"
NAMES = {  # of 0.3.0, where they are other ones; None for what it does not have
    "experimental.custom_import": "module",
    "model.name": "config",
    "model.flavor": "flavor",
    "model.hf_assets_path": "hf_assets_path",
    "training.dataset": "dataloader.dataset",
    "training.dataset_path": "dataloader.dataset_path",
    "optimizer.lr": "optimizer.param_groups.0.optimizer_kwargs.lr",
    "job.dump_folder": "dump_folder",
    "activation_checkpoint.selective_ac_option": None,
}


def command_line(**options):
    """Arguments of ``torchtitan.train``; dots of a name may be double underscores. True has no value, None is left out."""
    named = {name.replace("__", "."): value for name, value in options.items()}
    named = {
        "experimental.custom_import": "softpick.integrations.torchtitan",
        "model.name": "softpick_llama",
    } | named
    mode = named.pop("activation_checkpoint.mode", "selective")
    if OLD:
        named["activation_checkpoint.mode"] = mode
    else:
        named = {NAMES.get(name, name): value for name, value in named.items()}
        named.pop(None, None)
    line = []
    for name, value in named.items():
        if value is None:
            continue
        line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line if OLD else [*line, f"activation_checkpoint:{mode}"]


def write_tokenizer(folder):
    """A tokenizer of words: w0 is token 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<s>", "</s>", *(f"w{i}" for i in range(500))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def drawn(model_args):
    """A model with weights, and with sinks and scales that are not those it starts from."""
    model = model_args.build()
    with torch.no_grad():
        model.init_weights()
        for name, parameter in model.named_parameters():
            if name.endswith(("sinks", "score_scale")):
                parameter.add_(torch.rand_like(parameter))
    return model


def refused(changes, message):
    """Options by their places in the configuration, for a run on two ranks of tensor times two of context parallelism."""
    from softpick.integrations import torchtitan as adapter

    if OLD:
        from torchtitan.config import JobConfig

        config, update = JobConfig(), adapter.FLAVORS["tiny"].update_from_config
    else:
        config = dataclasses.replace(adapter.softpick_llama(), flavor="tiny")
        config.training.seq_len = 64
        update = config.model_spec.model.update_from_config
    config.parallelism.context_parallel_degree = config.parallelism.tensor_parallel_degree = 2
    for place, value in changes.items():
        *sections, name = place.split(".")
        section = config
        for part in sections:
            section = getattr(section, part)
        setattr(section, name, value)
    with pytest.raises(ValueError, match=f"^{message}"):
        update(config) if OLD else update(config=config)
