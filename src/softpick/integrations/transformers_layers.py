"""Which layers of a transformers model compute attention through its AttentionInterface, and which masks its class expects.

Both are read from the source code of the classes, when a model is built or given another implementation: transformers
accepts a registered name for models that use it in some layers only, or nowhere.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.loss import loss_utils
from transformers.masking_utils import sdpa_mask
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils.generic import TransformersKwargs
from transformers.utils.import_utils import is_tracing

from softpick.integrations.patches import replace_table
from softpick.integrations.transformers_packing import runs_paged, watch_offsets

__all__ = [
    "KIND_OF_MASKS",
    "SourceOfLayer",
    "attention_mask",
    "check_layers",
    "passed_to_everybody",
    "prepare",
    "source_of",
]


class SourceOfLayer(NamedTuple):
    """What the source code of a module's class says about attention."""

    known: bool
    """Whether there is source code to read."""
    asks: bool = False
    """Whether the class asks transformers' AttentionInterface for its attention function."""
    softmax: bool = False
    """Whether the class, or a function of its file that it calls, takes the softmax of scores or calls torch's attention."""
    passes: frozenset[str] = frozenset()
    """Names of the keyword arguments that the class gives to the attention function."""
    hands_on: bool = False
    """Whether the class hands its own further keyword arguments on to the attention function."""


_ATTENTION = ("scaled_dot_product_attention", "multi_head_attention_forward")
_PRODUCT = re.compile(r"matmul|einsum|bmm")
_INTERFACE = "get_interface"


@functools.cache
def source_of(kind: type[nn.Module]) -> SourceOfLayer:
    """What the source code of a class and of its bases says about attention.

    Args:
        kind: a class of modules.
    """
    trees = []
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] == "torch" or base in PreTrainedModel.__mro__:
            continue
        tree = _tree(base)
        if tree is not None:
            trees.append((tree, sys.modules.get(base.__module__)))
    if not trees:
        return SourceOfLayer(False)
    asks = any(_INTERFACE in _names(tree) or "ALL_ATTENTION_FUNCTIONS" in _names(tree) for tree, _ in trees)
    methods = {name: function for tree, _ in reversed(trees) for name, function in _functions(tree).items()}
    softmax = any(_computes_softmax(tree, module, methods) for tree, module in trees)
    passes: set[str] = set()
    hands_on = False
    for tree, _ in trees:
        for call in _calls_of_attention(tree):
            passes |= {keyword.arg for keyword in call.keywords if keyword.arg is not None}
            hands_on |= any(keyword.arg is None for keyword in call.keywords)
    return SourceOfLayer(True, asks, softmax, frozenset(passes), hands_on)


def _tree(thing: Any) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except (OSError, TypeError, SyntaxError):
        return None


def _names(tree: ast.AST) -> set[str]:
    return {
        n.attr if isinstance(n, ast.Attribute) else n.id
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute | ast.Name)
    }


def _called(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _arguments(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def _multiplies(tree: ast.AST, products: set[str]) -> bool:
    """Whether an expression has a matrix product in it, or a variable that holds one."""
    return any(
        (isinstance(n, ast.Name) and n.id in products)
        or (isinstance(n, ast.BinOp) and isinstance(n.op, ast.MatMult))
        or (isinstance(n, ast.Call) and _PRODUCT.search(_called(n)))
        for n in ast.walk(tree)
    )


def _compares(value: ast.AST, target: ast.AST) -> bool:
    """Whether one variable becomes what a module makes of queries and keys, which a rotation of both (two results) is not."""
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute) or not isinstance(target, ast.Name):
        return False
    given = {name for argument in _arguments(value) for name in _names(argument)}
    return any(map(_QUERIES.search, given)) and any(map(_KEYS.search, given))


def _products(function: ast.FunctionDef, products: set[str]) -> set[str]:
    """Variables of a function that hold a matrix product, given some; in whichever order the lines stand."""
    while True:
        before = len(products)
        for n in ast.walk(function):
            if isinstance(n, ast.Assign | ast.AugAssign | ast.AnnAssign) and n.value:
                for target in n.targets if isinstance(n, ast.Assign) else [n.target]:
                    if _multiplies(n.value, products) or _compares(n.value, target):
                        products |= {x.id for x in ast.walk(target) if isinstance(x, ast.Name)}
        if len(products) == before:
            return products


def _functions(tree: ast.AST) -> dict[str, ast.FunctionDef]:
    return {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}


def _computes_softmax(tree: ast.AST, module: Any, methods: Mapping[str, ast.FunctionDef], depth: int = 2) -> bool:
    """Whether code calls torch's attention or the softmax of scores, itself, in a method or in a function of its own file.

    Scores are a matrix product, or what a module makes of queries and keys. The softmax of anything else (routers, gates,
    pooling) is not attention's.
    """
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        given = {a.arg for a in [*function.args.args, *function.args.kwonlyargs]} - {"self"}
        products = _products(function, given if depth < 2 else set())
        for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
            name = _called(call)
            if name in _ATTENTION:
                return True
            named = "softmax" in name.lower() or (isinstance(call.func, ast.Call) and _called(call.func) == "Softmax")
            if named and "log" not in name.lower() and _multiplies(call, products):
                return True
            method = methods.get(name) if depth and ast.unparse(call.func) == f"self.{name}" else None
            handed = any(_multiplies(argument, products) for argument in _arguments(call))
            if method is not None and handed and _computes_softmax(method, module, methods, depth - 1):
                return True
            helper = getattr(module, name, None) if depth and isinstance(call.func, ast.Name) else None
            if inspect.isfunction(helper) and helper.__module__ == getattr(module, "__name__", None):
                inner = _tree(helper)
                if inner is not None and _computes_softmax(inner, module, {}, depth - 1):
                    return True
    return False


def _calls_of_attention(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls of what a layer got from the AttentionInterface, by the names of the variables that hold it."""
    held = {
        target.id
        for n in ast.walk(tree)
        if isinstance(n, ast.Assign | ast.AnnAssign) and n.value is not None and _INTERFACE in _names(n.value)
        for target in (n.targets if isinstance(n, ast.Assign) else [n.target])
        if isinstance(target, ast.Name)
    } | {"attention_interface"}
    for n in ast.walk(tree):
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in held:
            yield n


# ---------------------------------------------------------------------------------------------------------------------
# Layers that compute softmax by themselves

# Names of projections: "q_proj", "to_q", "query", "k_proj", "linear_v", "Wqkv", "to_kv"
_JOINT = re.compile(r"(^|_)w?(qkv|query_key_value|c_attn)(_|$)|^Wqkv$")
_QUERIES, _KEYS, _VALUES = (
    re.compile(rf"(^|_)w?({names})(_|$)") for names in (r"q\d?|query|queries", r"k\d?|kv|keys?", r"v\d?|kv|values?")
)


def _projects_keys_and_values(module: nn.Module) -> bool:
    """Whether a module has layers or parameters of attention's names; of a joint projection ``kv`` queries as well."""
    names = [name for name, _ in module.named_children()] + [name for name, _ in module.named_parameters(recurse=False)]
    if any(_JOINT.search(name) for name in names):
        return True
    queries, keys, values = ([name for name in names if p.search(name)] for p in (_QUERIES, _KEYS, _VALUES))
    return bool(keys and values) and bool(queries or {*keys} != {*values})


def _own(model: PreTrainedModel, module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules of a model with their names, without those of models inside it that have a configuration of their own."""
    for name, child in module.named_children():
        if not isinstance(child, PreTrainedModel) or child.config is model.config:
            yield prefix + name, child
            yield from _own(model, child, f"{prefix}{name}.")


def check_layers(model: PreTrainedModel, name: str) -> None:
    """Refuse a model of which a layer computes softmax by itself, whatever the implementation.

    Models inside it that have a configuration of their own are not looked at: each has an implementation of its own, and is
    checked when it is given it.

    Args:
        model: as far as it is built.
        name: the implementation that was chosen for it.

    Raises:
        ValueError: naming the layer.
    """
    for path, module in _own(model, model):
        kind: Any = type(module)
        source = source_of(kind)
        own = isinstance(module, nn.MultiheadAttention) or (
            source.softmax and not source.asks and _projects_keys_and_values(module)
        )
        if own:
            raise ValueError(
                f"attn_implementation: {path} ({type(module).__name__}) of {type(model).__name__} does not use transformers' "
                f"AttentionInterface; it would compute softmax instead of {name!r}. Parts of a model with a configuration of "
                f'their own are chosen by name: attn_implementation={{"text_config": "{name}"}} leaves the others (a vision '
                "tower) as they are"
            )


class _Classes(dict[str, Any]):
    """A table of attention classes by implementation, which says what it lacks."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(
            f"attn_implementation: expected one of {', '.join(self)} for a model that chooses between classes of attention, "
            f"each of which computes softmax; got {key!r}"
        )


def _explain_tables(kind: type) -> None:
    """Tables such as ``{"eager": GitSelfAttention}`` in the file of a class raise a sentence where a name is missing."""
    module = sys.modules.get(kind.__module__)
    if module is None:
        return
    for name, table in list(vars(module).items()):
        if type(table) is dict and "eager" in table and all(inspect.isclass(value) for value in table.values()):
            replace_table(module, name, _Classes(table))


# ---------------------------------------------------------------------------------------------------------------------
# Masks

KIND_OF_MASKS: dict[type, str] = {}
"""By class of configuration, for classes of models that do not compute with sdpa's masks: ``"eager"`` or ``"flash"``."""


@functools.cache
def _kind_of_masks(kind: type[PreTrainedModel]) -> str:
    """Which masks a class of models was written for.

    Returns:
        ``"sdpa"``: boolean ones, or None where the layer says whether it is causal. ``"flash"``: none where the layer says
        whether it is causal, else (of eager) additive ones. ``"eager"``: additive ones only, and None means that all keys
        are seen.
    """
    module = sys.modules.get(kind.__module__)
    tree = None if module is None else _tree(module)
    by_name = tree is not None and any(
        isinstance(n, ast.Compare)
        and "_attn_implementation" in _names(n.left)
        and any(
            isinstance(c, ast.Constant) and c.value == "sdpa"
            for comparator in n.comparators
            for c in ast.walk(comparator)
        )
        for n in ast.walk(tree)
    )
    by_name |= tree is not None and "create_causal_mask" in _names(tree) and _keeps_causality(tree)
    if kind._supports_sdpa and not by_name:
        return "sdpa"
    if kind._supports_flash_attn and kind._supports_attention_backend and not by_name:
        return "flash"
    return "eager"


def _keeps_causality(tree: ast.AST) -> bool:
    """Whether a file has a layer that is causal only if it is told so, and tells no layer (UMT5 before transformers 5.18)."""
    makers = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    asks = any(
        argument.arg == "is_causal" and isinstance(default, ast.Constant) and default.value is False
        for made in makers
        for argument, default in [
            *zip(reversed(made.args.args), reversed(made.args.defaults), strict=False),
            *zip(made.args.kwonlyargs, made.args.kw_defaults, strict=True),
        ]
    )
    return asks and not any(k.arg == "is_causal" for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords)


WITH_WINDOWS: dict[type, bool] = {}
"""By class of configuration: whether every attention layer gives its sliding window to the attention function."""


def attention_mask(*args: Any, config: Any = None, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """The mask function of every normalizer: sdpa's boolean masks, but additive ones for models that compute with those.

    None, as where a mask is only causal, also where it is only a sliding window that the layers know.

    Arguments and result are those of ``transformers.masking_utils.sdpa_mask`` and ``eager_mask``.
    """
    if runs_paged():
        return None
    kind = KIND_OF_MASKS.get(type(config), "sdpa")
    padding = kwargs.get("attention_mask")
    if padding is not None and padding.is_meta:  # which has no values that could make a mask superfluous
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    if kind == "eager":
        kwargs["allow_is_causal_skip"] = False
    elif _only_a_window(config, **kwargs):
        return None
    mask = sdpa_mask(*args, config=config, dtype=dtype, **kwargs)
    if mask is None or kind == "sdpa":
        return mask
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min)


def _only_a_window(
    config: Any,
    *,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **_: Any,
) -> bool:
    """Whether a causal mask of as many keys as queries holds nothing but the window that the layers are given, too."""
    return (
        WITH_WINDOWS.get(type(config), False)
        and allow_is_causal_skip
        and not use_vmap
        and local_size is not None
        and local_size == getattr(config, "sliding_window", None) != getattr(config, "attention_chunk_size", None)
        and 1 < q_length == kv_length
        and isinstance(q_offset, int)
        and q_offset == kv_offset
        and (attention_mask is None or (not is_tracing(attention_mask) and bool(attention_mask[:, -kv_length:].all())))
    )


def prepare(model: PreTrainedModel, name: str) -> None:
    """Look at a model that is given one of our implementations, before (or after) its layers are built.

    Args:
        model: its class and configuration count, and its layers as far as they exist.
        name: of the implementation.

    Raises:
        ValueError: the model, or one of its layers, would compute softmax whatever the implementation.
    """
    if not (model._supports_attention_backend or model._can_set_attn_implementation()):
        raise ValueError(
            f"attn_implementation: {type(model).__name__} does not use transformers' AttentionInterface; it would "
            f"compute softmax instead of {name!r}"
        )
    _explain_tables(type(model))
    of: Any = type(model)
    kind = _kind_of_masks(of)
    if kind != "sdpa" and KIND_OF_MASKS.get(type(model.config)) != "eager":
        KIND_OF_MASKS[type(model.config)] = kind
    if name != "softmax":
        check_layers(model, name)
    classes: set[Any] = {type(module) for module in model.modules()}
    layers = [source for each in classes if (source := source_of(each)).asks]
    if layers:
        watch_offsets(of)
        known = (
            kind != "eager" and model._supports_flash_attn and all("sliding_window" in layer.passes for layer in layers)
        )
        WITH_WINDOWS[type(model.config)] = known and WITH_WINDOWS.get(type(model.config), True)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments that models pass on


def _parameters(functions: Iterable[Callable[..., Any]]) -> set[str]:
    return {
        name
        for function in functions
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }


@functools.cache
def _of_losses() -> frozenset[str]:
    """Arguments of transformers' loss functions, and those that it documents as passed to every model."""
    losses = {*loss_utils.LOSS_MAPPING.values(), loss_utils.fixed_cross_entropy}
    documented = {*TransformersKwargs.__annotations__, *FlashAttentionKwargs.__annotations__}
    return frozenset((_parameters(losses) | documented) - _of_attention())


@functools.cache
def _of_attention() -> frozenset[str]:
    """Arguments by which one of transformers' own attention functions changes its result."""
    functions = [f for f in AttentionInterface._global_mapping.values() if f.__module__.startswith("transformers.")]
    return frozenset(_parameters(functions))


@torch.compiler.assume_constant_result
def passed_to_everybody(kind: Any, name: str) -> bool:
    """Whether an argument that reached attention has nothing to do with it.

    So it is for arguments of losses and of outputs, which models hand on to all of their parts, and for whatever the layer
    neither gives to its attention function itself nor computes with in its own eager one, nor any function of transformers.

    Args:
        kind: the class of the layer.
        name: of the argument.
    """
    source = source_of(kind)
    if name in source.passes:
        return False
    if name in _of_losses():
        return True
    return source.asks and source.hands_on and name not in _of_attention() | _of_eager(kind)


@functools.cache
def _of_eager(kind: type[nn.Module]) -> frozenset[str]:
    """Named arguments of the eager attention functions in the file of a class."""
    functions = [
        f for name, f in vars(sys.modules[kind.__module__]).items() if "eager" in name and inspect.isfunction(f)
    ]
    return frozenset(_parameters(functions))
