"""THE table of what softpick replaces in other libraries, because they have no hook for it; and how it is replaced.

Nothing else in softpick assigns to an attribute of another library (``tests/test_patches.py`` looks). Each record says why, for
which version it was written, and what the replaced source looked like there: the test fails where the pinned version has
another one, so that somebody reads it again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

__all__ = ["PATCHES", "Patch", "digest", "original", "replace", "replace_table", "replaced"]


@dataclass(frozen=True)
class Patch:
    """A replaced attribute.

    Attributes:
        target: ``module:attribute``.
        library: its distribution.
        version: for which the replacement was written, and whose source :attr:`source` is a digest of.
        source: 16 digits of the SHA-256 of the source of :attr:`reads`; empty for a value without a source.
        why: what the replacement does, and why no hook of the library does it.
        reads: ``module:attribute`` whose source must not change; :attr:`target` if empty.
    """

    target: str
    library: str
    version: str
    source: str
    why: str
    reads: str = ""


_TRANSFORMERS = {"library": "transformers", "version": "5.23.0"}
_HARNESS = {"library": "lm_eval", "version": "0.4.13"}

PATCHES: Mapping[str, Patch] = {
    patch.target: patch
    for patch in (
        Patch(
            target="transformers:PreTrainedConfig.to_dict",
            source="bbfc1cf88ab9f891",
            why="A saved configuration keeps the attention implementation if it is one of ours; transformers drops it.",
            **_TRANSFORMERS,
        ),
        Patch(
            target="transformers:PreTrainedConfig._attn_implementation",
            source="d21c7d26e7de323d",
            why="A record is given in the place of a name, and its text is the name; transformers asks names for letters.",
            **_TRANSFORMERS,
        ),
        Patch(
            target="transformers:PreTrainedModel.get_correct_attn_implementation",
            source="d1e19ae1facb1751",
            why="A saved normalizer comes before transformers' default, and models that compute softmax by themselves refuse "
            "ours; transformers accepts any registered name there.",
            **_TRANSFORMERS,
        ),
        Patch(
            target="transformers:PreTrainedModel.set_attn_implementation",
            source="d3ff8558d37ecbf5",
            why="Every part of a model gets the implementation, or none; transformers before 5.20 leaves out parts whose "
            "configuration is a copy, and stops in the middle where a part refuses.",
            **_TRANSFORMERS,
        ),
        Patch(
            target="transformers:PreTrainedModel.save_pretrained",
            source="979de0ea85d74159",
            why="A part that runs a normalizer of ours which the saved configuration does not name is refused; transformers "
            "forgets it, and the part would run softmax.",
            **_TRANSFORMERS,
        ),
        Patch(
            target="transformers:PreTrainedModel.post_init",
            source="7e71a8ab677d5dc8",
            why="The layers of a model are looked at as soon as they exist; there is no event for it.",
            **_TRANSFORMERS,
        ),
        Patch(
            target="transformers.modeling_gguf_pytorch_utils:load_gguf_checkpoint",
            source="5db5a3fc71ae7450",
            why="A file's description is read once while a model is loaded; transformers reads it at each step.",
            **_TRANSFORMERS,
        ),
        Patch(
            target="transformers.modeling_gguf_pytorch_utils:tqdm",
            source="5db5a3fc71ae7450",
            reads="transformers.modeling_gguf_pytorch_utils:load_gguf_checkpoint",
            why="Our reporter shows how far a GGUF file is converted; transformers' hook for bars does not reach this one.",
            **_TRANSFORMERS,
        ),
        Patch(
            target="transformers.generation.continuous_batching.continuous_api:ContinuousBatchingManager.switch_to_cb_friendly_attn",
            source="dbb1a528a7185c86",
            why="Continuous batching keeps our implementations; transformers refuses names without 'flash', or switches "
            "the model to FlashAttention's softmax.",
            **_TRANSFORMERS,
        ),
        Patch(
            target="transformers.generation.continuous_batching.initialization:ensure_decode_fast_path_is_available",
            source="ed1080444ab8a449",
            why="Our functions read a block table; transformers gives one to names with 'flash' only.",
            **_TRANSFORMERS,
        ),
        Patch(
            target="transformers.generation.continuous_batching.initialization:is_flash_attention_requested",
            source="dcb8fd04fe328b5c",
            why="Our functions need no mask in continuous batching, so graphs may be used; transformers asks for a name.",
            **_TRANSFORMERS,
        ),
        Patch(
            target="transformers.generation.continuous_batching.cache:is_flash_attention_requested",
            source="dcb8fd04fe328b5c",
            why="Our functions need no mask in continuous batching, so no memory is kept for one; transformers asks the name.",
            **_TRANSFORMERS,
        ),
        Patch(
            target="transformers.masking_utils:_preprocess_mask_arguments",
            source="df23eb733c6e49fa",
            why="Packed sequences are found in position ids for our implementations, too; transformers asks for the names of "
            "its own.",
            **_TRANSFORMERS,
        ),
        Patch(
            target="transformers:PreTrainedConfig.output_attentions",
            source="38eb98543e7e2c98",
            why="output_attentions=True may stand beside our implementations; transformers allows it beside eager alone.",
            **_TRANSFORMERS,
        ),
        Patch(
            target="transformers:PreTrainedConfig.validate_output_attentions",
            source="3471aa55151e65bb",
            why="The same where a configuration is checked as a whole.",
            **_TRANSFORMERS,
        ),
        Patch(
            target="transformers:PreTrainedConfig.to_json_file",
            source="e2cc6a98508a4c56",
            why="The one place that writes config.json: names that no other program takes for softmax (checkpoints.py).",
            **_TRANSFORMERS,
        ),
        Patch(
            target="transformers:PreTrainedConfig._dict_from_json_file",
            source="5d7a21fac19188ea",
            why="The one place that reads config.json.",
            **_TRANSFORMERS,
        ),
        Patch(
            target="transformers:PreTrainedConfig.from_dict",
            source="5af3fddbff02e898",
            why="Takes what somebody else has read.",
            **_TRANSFORMERS,
        ),
        Patch(target="transformers:AutoConfig.for_model", source="93abff3407b5aac8", why="The same.", **_TRANSFORMERS),
        Patch(
            target="transformers:AttentionInterface.get_interface",
            source="0115b502544d95e1",
            why="While a model is measured its layers call a function of ours, whatever implementation they ask for.",
            **_TRANSFORMERS,
        ),
        Patch(
            target="transformers.models.git.modeling_git:GIT_SELF_ATTENTION_CLASSES",
            source="83e089f4e05357ed",
            reads="transformers.models.git.modeling_git:GitAttention.__init__",
            why="Such tables of attention classes by implementation (in the file of each model that has one) say what they "
            "lack, instead of a bare KeyError.",
            **_TRANSFORMERS,
        ),
        Patch(
            target="lm_eval.evaluator:add_env_info",
            source="a6e55f7becead9c0",
            why="The harness lists what is installed, which takes longer than a small task and is thrown away.",
            **_HARNESS,
        ),
        Patch(
            target="lm_eval.evaluator:get_git_commit_hash",
            source="3b8396124d9caddc",
            why="The harness asks git about the working directory.",
            **_HARNESS,
        ),
        Patch(
            target="lm_eval.api.metrics:print",
            source="0841b88ead038702",
            reads="lm_eval.api.metrics:bootstrap_stderr",
            why="Resampling prints a line for each metric.",
            **_HARNESS,
        ),
        Patch(
            target="tqdm:tqdm.__init__",
            library="tqdm",
            version="4.70.1",
            source="",
            why="No bars of the harness beside ours: TQDM_DISABLE counts only where it is set before tqdm is imported.",
        ),
        Patch(
            target="huggingface_hub.constants:HF_HUB_OFFLINE",
            library="huggingface_hub",
            version="2.4.0",
            source="",
            why="Where the hub does not answer its libraries are told so; HF_HUB_OFFLINE counts only where it is set before "
            "they are imported.",
        ),
        Patch(
            target="datasets.config:HF_HUB_OFFLINE",
            library="datasets",
            version="5.2.0",
            source="",
            why="The same.",
        ),
    )
}
"""By target."""

_originals: dict[str, Any] = {}


def _holder(target: str) -> tuple[Any, str]:
    """The module or class that has an attribute, and the attribute's name."""
    module, _, path = target.partition(":")
    *classes, name = path.split(".")
    return functools.reduce(getattr, classes, importlib.import_module(module)), name


def _look(target: str) -> Any:
    """The attribute as it stands in its class, so that class and static methods stay what they are; None if it is not there."""
    holder, name = _holder(target)
    return inspect.getattr_static(holder, name, None)


def original(target: str) -> Any:
    """The value of a target of :data:`PATCHES`, as it was before :func:`replace`."""
    return _originals[target] if target in _originals else _look(target)


def replace(target: str, value: Any) -> None:
    """Replace an attribute for good.

    Args:
        target: a key of :data:`PATCHES`.
        value: its value from now on.
    """
    assert target in PATCHES, target
    _originals.setdefault(target, _look(target))
    holder, name = _holder(target)
    setattr(holder, name, value)


def replace_table(module: ModuleType, name: str, table: dict[str, Any]) -> None:
    """Replace a table of attention classes in the file of a model: what ``GIT_SELF_ATTENTION_CLASSES`` stands for."""
    setattr(module, name, table)


@contextmanager
def replaced(values: Mapping[str, Any]) -> Iterator[None]:
    """Replace attributes for a while.

    Args:
        values: by keys of :data:`PATCHES`.
    """
    before = {}
    try:
        for target, value in values.items():
            assert target in PATCHES, target
            holder, name = _holder(target)
            before[target] = vars(holder).get(name, _ABSENT)
            setattr(holder, name, value)
        yield
    finally:
        for target, value in reversed(before.items()):
            holder, name = _holder(target)
            if value is _ABSENT:
                delattr(holder, name)
            else:
                setattr(holder, name, value)


_ABSENT = object()


def digest(patch: Patch) -> str:
    """16 digits of the SHA-256 of the source that a patch was written for; empty where there is none."""
    found = original(patch.reads or patch.target)
    if isinstance(found, classmethod | staticmethod):
        found = found.__func__
    if isinstance(found, property):
        found = found.fset
    if not inspect.isfunction(found):
        return ""
    return hashlib.sha256(inspect.getsource(found).encode()).hexdigest()[:16]
