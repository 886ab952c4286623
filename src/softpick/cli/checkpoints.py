"""Commands that rewrite checkpoints: import."""

from __future__ import annotations

from typer import Argument, Option

from softpick.cli.console import make_console
from softpick.cli.options import OUTPUT, require

__all__ = ["import_"]


def import_(
    source: str = Argument(..., metavar="DIR", help="Folder with config.json, the weights and the tokenizer."),
    output: str = Option(None, metavar=OUTPUT, help="A new or empty folder.  [default: DIR-softpick_llama]"),
) -> None:
    """Write a checkpoint in the layout of flash-linear-attention (model type `transformer`, as the authors of softpick publish
    theirs) as a `softpick_llama` checkpoint of transformers with the same logits.
    """
    require("transformers", extra="transformers")
    from softpick.integrations.fla import import_checkpoint

    folder = output or f"{source.rstrip('/')}-softpick_llama"
    made = import_checkpoint(source, folder)
    make_console().print(
        f"{made['normalizer']}, {made['parameters']:,} parameters in {made['tensors']} tensors\nmodel: {folder}",
        markup=False,
        soft_wrap=True,
    )
