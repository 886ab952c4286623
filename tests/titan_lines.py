"""The same run of torchtitan as its versions are told of it: options by the names of 0.2.2, in words of the installed one."""

from importlib.metadata import version

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
