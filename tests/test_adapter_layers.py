"""What the source code of a layer says about its attention: small classes of one trait each, and layers of transformers."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from layer_files import GET, PARTS, layer, real, write  # noqa: E402

import softpick.integrations.transformers  # noqa: E402, F401
from softpick.integrations import transformers_layers as layers  # noqa: E402
from softpick.integrations.transformers_layers import SourceOfLayer, source_of  # noqa: E402


@pytest.fixture
def written(tmp_path, monkeypatch):
    return lambda *parts: write(tmp_path, monkeypatch, *parts)


# ---------------------------------------------------------------------------------------------------------------------
# Softmax of scores

SCORES = [
    "return F.softmax(q @ k.mT, dim=-1)",
    "return F.softmax(input=q @ k.mT, dim=-1)",
    "return torch.matmul(q, k.mT).softmax(-1)",
    "s = torch.einsum('qd,kd->qk', q, k); return torch.softmax(s, -1)",
    "s = torch.bmm(q, k); return nn.Softmax(dim=-1)(s)",
    "s = bias.baddbmm(batch1=q, batch2=k); return self.softmax(s)",
    "s: torch.Tensor = q @ k.mT; return s.softmax(-1)",
    "s: torch.Tensor; s = q @ k.mT; return s.softmax(-1)",
    "s = bias; s += q @ k.mT; return s.softmax(-1)",
    "s = kept = q @ k.mT; return s.softmax(-1)",
    "s = kept = q @ k.mT; return kept.softmax(-1)",
    "s, scale = q @ k.mT, 1.0; return s.softmax(-1)",
    "s = q @ k.mT; t = s / 8; u = self.drop(t + mask); return u.softmax(-1)",
    "return F.scaled_dot_product_attention(q, k, v)",
    "return F.multi_head_attention_forward(q, k, v)",
    "s = self.compare(q, k); return s.softmax(-1)",
    "s = self.compare(query_blocks, mask, key_blocks); return s.softmax(-1)",
    "s = self.compare(query=q, key=k); return s.softmax(-1)",
    "return [s.softmax(-1) for s in ()] and (lambda s: s)(q @ k.mT).softmax(-1)",
]
NO_SCORES = [
    "return self.gate(q).softmax(-1)",
    "s = q @ k.mT; return s, self.gate(v).softmax(-1)",
    "s = q @ k.mT; t = self.gate(v); return t.softmax(-1)",
    "return F.log_softmax(q @ k.mT, -1)",
    "s = q * k; return s.softmax(-1)",
    "s = -q; return s.softmax(-1)",
    "s = q; return s.softmax(-1)",
    "q, k = self.rotate(q, k); return q.softmax(-1), k.softmax(-1)",
    "s = rotate(q, k); return s.softmax(-1)",
    "s = self.norm(q); return s.softmax(-1)",
    "s = self.norm(q, v, mask); return s.softmax(-1)",
    "s = self.norm(k, v); return s.softmax(-1)",
    "s = q @ k.mT; return s.relu()",
    "s = q @ k.mT; return functools.partial(F.relu)(s)",
    "return q, k",
]


@pytest.mark.parametrize(
    ("body", "softmax"), [(body, True) for body in SCORES] + [(body, False) for body in NO_SCORES], ids=str
)
def test_softmax_of_a_product_or_of_what_a_module_makes_of_queries_and_keys(body, softmax, written):
    found = source_of(written(layer(f"def forward(self, q, k, v, bias, mask): {body}")).Layer)
    assert found == SourceOfLayer(True, False, softmax, frozenset(), False)


def test_scores_are_known_in_whichever_branch_they_were_made(written):
    """Most eager attention is written so: a product in two branches, a mask that is added, then softmax."""
    lines = (
        "def forward(self, q, k, mask):",
        "    if mask is None:",
        "        for a, b in ((q, k),):",
        "            s = a @ b.mT",
        "    t = s + 1",
        "    with torch.no_grad():",
        "        u = t",
        "    return u.softmax(-1)",
    )
    assert source_of(written(layer(*lines)).Layer).softmax is True


WEIGH = "def weigh(self, s): return s.softmax(-1)"
METHODS = [
    (True, "def forward(self, q, k): return self.weigh(q @ k.mT)", WEIGH),
    (True, "def forward(self, q, k, mask): return self.weigh(mask, q @ k.mT)", "def weigh(self, m, s): s.softmax()"),
    (True, "def forward(self, q, k): return self.weigh(s=q @ k.mT)", WEIGH),
    (True, "def forward(self, q, k): return self.weigh(s=q @ k.mT)", "def weigh(self, *, s): return s.softmax(-1)"),
    (True, "def forward(self, q, k): s = q @ k.mT; return self.weigh(s / 8)", WEIGH),
    (
        True,
        "def forward(self, q, k): return self.scale(q @ k.mT)",
        "def scale(self, s): return self.weigh(s / 8)",
        WEIGH,
    ),
    (
        False,  # deeper than anybody looks
        "def forward(self, q, k): return self.one(q @ k.mT)",
        "def one(self, s): return self.two(s)",
        "def two(self, s): return self.weigh(s)",
        WEIGH,
    ),
    (
        True,
        "def forward(self, q, k): return self.attend(q, k)",
        "def attend(self, q, k): return (q @ k.mT).softmax(-1)",
    ),
    (False, "def forward(self, x): return self.weigh(self.gate(x))", WEIGH),
    (False, "def forward(self, q, k): s = q @ k.mT; return s, self.weigh(self.gate(q), q)", WEIGH),
    (False, "def forward(self): return self.weigh()", "def weigh(self, s=None): return s.softmax(-1)"),
    (False, "def forward(self, q, k): return self.other.weigh(q @ k.mT)", WEIGH),
    (False, "def forward(self, other, q, k): return other.weigh(q @ k.mT)", WEIGH),
    (False, "def forward(self, q, k): return weigh(q @ k.mT)", WEIGH),
    (False, "def forward(self, q, k): return self.drop(q @ k.mT)", WEIGH),
    (False, "def forward(self, q, k): return self.again(q @ k.mT)", "def again(self, s): return self.again(s)"),
    (
        False,  # the scores are not what its softmax is of
        "def forward(self, q, k): return self.temper(q @ k.mT)",
        "def temper(self, s): return s * self.gate(self.rates).softmax(-1)",
    ),
]


@pytest.mark.parametrize(("softmax", "methods"), [(answer, methods) for answer, *methods in METHODS], ids=str)
def test_softmax_in_a_method_that_is_given_scores(softmax, methods, written):
    assert source_of(written(layer(*methods)).Layer).softmax is softmax


FUNCTION = "def weigh(s): return s.softmax(-1)"
FUNCTIONS = [
    (True, "weigh(q @ k.mT)", FUNCTION),
    (True, "weigh(q, k)", "def weigh(q, k): return (q @ k.mT).softmax(-1)"),
    (True, "scale(q @ k.mT)", "def scale(s): return weigh(s / 8)", FUNCTION),
    (False, "one(q @ k.mT)", "def one(s): return two(s)", "def two(s): return weigh(s)", FUNCTION),
    (False, "again(q @ k.mT)", "def again(s): return again(s)"),
    (False, "self.other.weigh(q @ k.mT)", FUNCTION),
    (False, "weigh_elsewhere(q @ k.mT)"),
    (False, "unknown(q @ k.mT)"),
    (False, "Other(q @ k.mT)", layer("def __init__(self, s): s.softmax(-1)", name="Other")),
    (False, "unread(q @ k.mT)", "exec('def unread(s): return s.softmax(-1)')"),
    (False, "relu(q @ k.mT)", "def relu(s): return s.relu()"),
    (False, "hand(self, q @ k.mT)", "def hand(self, s): return self.weigh(s)"),
]


@pytest.mark.parametrize(
    ("softmax", "call", "functions"), [(answer, call, rest) for answer, call, *rest in FUNCTIONS], ids=str
)
def test_softmax_in_a_function_of_the_same_file(softmax, call, functions, written):
    text = layer(f"def forward(self, q, k): return {call}", "def weigh(self, s): return s.softmax(-1)")
    assert source_of(written(text, *functions).Layer).softmax is softmax


# ---------------------------------------------------------------------------------------------------------------------
# The AttentionInterface, and what a layer gives to it

ASKS = [
    (True, {"scaling"}, False, f"f = {GET}; return f(self, q, scaling=1.0)"),
    (True, {"scaling", "softcap"}, True, f"f = {GET}; return f(self, q, scaling=1.0, softcap=None, **kwargs)"),
    (True, set(), True, f"f = {GET}; return f(self, q, **kwargs)"),
    (True, {"scaling"}, False, f"f: object = {GET}; return f(self, q, scaling=1.0)"),
    (True, {"scaling"}, False, f"f = g = {GET}; return g(self, q, scaling=1.0)"),
    (True, {"a", "b"}, True, f"f = {GET}; return f(q, a=1) if q else f(q, b=2, **kwargs)"),
    (True, {"a", "b"}, True, f"f = {GET}; return f(q, b=2, **kwargs) if q else f(q, a=1)"),
    (True, set(), False, f"f = {GET}; g = self.rotate; return g(q, base=2, **kwargs), self.act(x=3, **kwargs)"),
    (True, set(), False, f"f: object; f = {GET}; return make(q)(x=1)"),
    (True, set(), False, f"self.f = {GET}; return self.f(q, scaling=1.0)"),
    (True, {"scaling"}, False, "f = self.functions.get_interface(self.name, None); return f(q, scaling=1.0)"),
    (True, set(), False, "f = ALL_ATTENTION_FUNCTIONS[self.name]; return f(q, scaling=1.0)"),
    (
        True,
        {"scaling"},
        False,
        "attention_interface = ALL_ATTENTION_FUNCTIONS[self.name]; return attention_interface(q, scaling=1.0)",
    ),
    (
        False,
        {"scaling"},
        True,
        "attention_interface = self.eager; return attention_interface(q, scaling=1.0, **kwargs)",
    ),
    (False, set(), False, "f = self.eager; return f(q, scaling=1.0, **kwargs)"),
]


def named(x):
    return "+".join(sorted(x)) if isinstance(x, set) else str(x)  # in the same order in every process


@pytest.mark.parametrize(("asks", "passes", "hands_on", "body"), ASKS, ids=named)
def test_what_a_layer_gives_to_the_function_it_asked_for(asks, passes, hands_on, body, written):
    found = source_of(written(layer(f"def forward(self, q, **kwargs): {body}")).Layer)
    assert found == SourceOfLayer(True, asks, False, frozenset(passes), hands_on)


def test_a_class_is_what_it_and_its_bases_say(written):
    module = written(
        layer(f"def forward(self, q, **kwargs): f = {GET}; return f(q, scaling=1.0, **kwargs)", name="Asks"),
        layer("def other(self, q): return q", name="Child", base="Asks"),
        layer("def weigh(self, q, k): return (q @ k.mT).softmax(-1)", name="Takes", base="Child"),
        layer("def weigh(self, q): return q", name="Below", base="Takes"),
        layer("def forward(self, q, k): return self.weigh(q @ k.mT)", WEIGH, name="ByMethod"),
        layer("def weigh(self, s): return s.relu()", name="Relu", base="ByMethod"),
        layer("def weigh(self, s): return s.softmax(-1)", name="Again", base="Relu"),
    )
    passes = frozenset({"scaling"})
    assert source_of(module.Child) == SourceOfLayer(True, True, False, passes, True)
    assert source_of(module.Takes) == source_of(module.Below) == SourceOfLayer(True, True, True, passes, True)
    assert [source_of(kind).softmax for kind in (module.ByMethod, module.Relu, module.Again)] == [True, False, True]


def test_classes_of_torch_and_classes_without_source_say_nothing(written):
    nothing = SourceOfLayer(known=False, asks=False, softmax=False, passes=frozenset(), hands_on=False)
    unread = type("Unread", (torch.nn.Module,), {"__module__": "nowhere"})
    for kind in (torch.nn.Linear, torch.nn.MultiheadAttention, torch.nn.Module, unread):
        assert source_of(kind) == nothing
    module = written(layer("pass", base="nn.MultiheadAttention"), layer(WEIGH.replace("s.", "(s @ s)."), name="Reads"))
    assert source_of(module.Layer) == nothing._replace(known=True)
    half = type("Half", (module.Reads,), {"__module__": "nowhere"})
    assert source_of(half) == nothing._replace(known=True, softmax=True)


def test_models_are_not_taken_for_what_their_common_base_does(written):
    module = written("class Small(PreTrainedModel): pass")
    assert source_of(module.Small) == SourceOfLayer(True)


# Read off the files of transformers 5.17 to 5.24: whether the class names the interface, whether it takes softmax of scores
# by itself, and some of what it gives to the attention function.
REAL = [
    ("llama", "LlamaAttention", True, False, {"dropout", "scaling"}),
    ("mistral", "MistralAttention", True, False, {"dropout", "scaling", "sliding_window"}),
    ("gemma2", "Gemma2Attention", True, False, {"dropout", "scaling", "sliding_window", "softcap"}),
    ("t5", "T5Attention", True, False, None),
    ("bert", "BertSelfAttention", True, False, None),
    ("gpt2", "GPT2Attention", True, True, {"dropout", "scaling"}),  # _upcast_and_reordered_attn
    ("whisper", "WhisperAttention", True, False, None),
    ("llama4", "Llama4VisionAttention", True, False, {"dropout", "is_causal", "scaling"}),
    ("deepseek_v4", "DeepseekV4Attention", True, False, {"dropout", "s_aux", "scaling", "sliding_window"}),
    ("pegasus_x", "PegasusXAttention", True, False, None),
    ("pegasus_x", "PegasusXGlobalLocalAttention", False, True, set()),  # einsum, by a method
    ("bigbird_pegasus", "BigBirdPegasusSelfAttention", False, True, set()),
    ("bigbird_pegasus", "BigBirdPegasusBlockSparseAttention", False, True, set()),  # a product of a method of its own
    ("informer", "InformerProbSparseAttention", False, True, set()),
    ("gemma3n", "Gemma3nAudioAttention", False, True, set()),  # a module compares queries and keys
    ("git", "GitSelfAttention", False, True, set()),
    ("sam", "SamVisionAttention", False, True, set()),
    ("sam", "SamVisionSdpaAttention", False, True, set()),  # torch's attention
    ("falcon", "FalconAttention", False, True, set()),
    ("mpt", "MptAttention", False, True, set()),
    ("bloom", "BloomAttention", False, True, set()),  # baddbmm of a bias
    ("nllb_moe", "NllbMoeTop2Router", False, False, set()),  # softmax of experts
    ("mixtral", "MixtralTopKRouter", False, False, set()),
    ("pp_doclayout_v2", "PPDocLayoutV2MultiscaleDeformableAttention", False, False, set()),  # of sampling points
    ("deepseek_v4", "DeepseekV4HCACompressor", False, False, set()),  # of gates
    ("llama", "LlamaMLP", False, False, set()),
]


@pytest.mark.parametrize(("file", "name", "asks", "softmax", "passes"), REAL)
def test_layers_of_transformers(file, name, asks, softmax, passes):
    found = source_of(real(file, name))
    assert (found.known, found.asks, found.softmax, found.hands_on) == (True, asks, softmax, asks)
    assert passes is None or found.passes == passes


# ---------------------------------------------------------------------------------------------------------------------
# Layers that are refused


@pytest.mark.parametrize(
    ("attention", "names"),
    [
        (True, "q_proj k_proj v_proj"),
        (True, "query key value dropout"),
        (True, "to_q to_kv"),
        (True, "linear_k linear_v"),  # of learned queries
        (True, "q1 k1 v1"),
        (True, "Wqkv"),
        (True, "norm qkv out"),
        (True, "c_attn c_proj"),
        (True, "query_key_value"),
        (False, "to_kv"),
        (False, "q_proj"),
        (False, "q_proj k_proj"),
        (False, "q_proj v_proj"),
        (False, "k_proj"),
        (False, "v_proj"),
        (False, "gate up down"),
        (False, ""),
    ],
)
def test_names_of_projections(attention, names):
    layered, held = torch.nn.Module(), torch.nn.Module()
    for name in names.split():
        layered.add_module(name, torch.nn.Linear(1, 1))
        held.register_parameter(name, torch.nn.Parameter(torch.zeros(1)))
    outer = torch.nn.Module()
    outer.inner = held
    mixed = torch.nn.Module()
    for number, name in enumerate(names.split()):
        if number % 2:
            mixed.add_module(name, torch.nn.Linear(1, 1))
        else:
            mixed.register_parameter(name, torch.nn.Parameter(torch.zeros(1)))
    assert [layers._projects_keys_and_values(module) for module in (layered, held, mixed)] == [attention] * 3
    if "_" in names:  # names of what is inside begin with "inner."
        outer.bias = torch.nn.Linear(1, 1)
    assert layers._projects_keys_and_values(outer) is False


def test_parameters_of_parts_are_not_a_modules_own():
    outer = torch.nn.Module()
    outer.inner = torch.nn.Module()
    for name in ("in_proj_q", "bias_k", "bias_v", "to_qkv"):
        outer.inner.register_parameter(name, torch.nn.Parameter(torch.zeros(1)))
    assert layers._projects_keys_and_values(outer) is False
    assert layers._projects_keys_and_values(outer.inner) is True


@pytest.mark.parametrize(
    ("kind", "taken"),
    [("Linear", True), ("Pools", True), ("Asks", True), ("Either", True), ("Takes", False), ("Heads", False)],
)
def test_layers_that_take_softmax_whatever_the_implementation_are_refused(kind, taken, written):
    module = written(PARTS)
    made = getattr(module, kind)(*([2, 1] if kind == "Heads" else []))
    model = module.Small(module.SmallConfig(), torch.nn.Identity(), made)
    for path, looked_at in (("body.1", model), ("head.body.1", None)):
        if looked_at is None:  # the same inside a model of the same configuration
            looked_at = module.Small(model.config, head=model)
        if taken:
            assert layers.check_layers(looked_at, "softpick") is None
            continue
        wanted = (
            rf"^attn_implementation: {path} \({kind}\) of Small does not .* softmax instead of 'softpick'\. Parts of"
        )
        with pytest.raises(ValueError, match=wanted):
            layers.check_layers(looked_at, "softpick")


def test_torchs_own_layer_is_refused(written):
    module = written(PARTS)
    model = module.Small(module.SmallConfig(), pool=torch.nn.MultiheadAttention(2, 1))
    with pytest.raises(ValueError, match=r"pool \(MultiheadAttention\) of Small"):
        layers.check_layers(model, "softpick")


def test_parts_with_a_configuration_of_their_own_are_not_looked_at(written):
    module = written(PARTS)
    config = module.SmallConfig()
    tower = module.Other(module.OtherConfig(), module.Takes())
    layers.check_layers(module.Small(config, torch.nn.Sequential(tower), tower=tower), "softpick")
    layers.check_layers(module.Small(config, module.Small(module.SmallConfig(), module.Takes())), "softpick")
    with pytest.raises(ValueError, match=r"body\.0 \(Takes\) of Other"):
        layers.check_layers(tower, "softpick")
    behind = torch.nn.Sequential(tower, module.Small(config, module.Takes()))
    with pytest.raises(ValueError, match=r"body\.0\.1\.body\.0 \(Takes\) of Small"):
        layers.check_layers(module.Small(config, behind), "softpick")


def test_tables_of_classes_say_what_they_lack(written):
    tables = """
TABLE = {"eager": Takes, "sdpa": Asks}
NO_EAGER = {"first": Takes, "second": Asks}
SOME = {"eager": Takes, "sdpa": None}
FUNCTIONS = {"eager": len}
EMPTY = {}
LIST = ["eager"]
NUMBER = 3
"""
    module = written(PARTS, tables)
    before = dict(vars(module))
    layers.prepare(module.Small(module.SmallConfig()), "softpick")
    assert [name for name in before if getattr(module, name) is not before[name]] == ["TABLE"]
    assert before["TABLE"] == module.TABLE
    assert module.TABLE["sdpa"] is module.Asks
    with pytest.raises(ValueError, match=r"expected one of eager, sdpa for a model .* got 'softpick'$"):
        module.TABLE["softpick"]
    assert layers._explain_tables(type("Small", (), {"__module__": "nowhere"})) is None
