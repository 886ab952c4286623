"""``make vllm-test`` counts as a refusal of the architecture what is one, and nothing else that may go wrong."""

import pytest
from vllm_refuses import is_refusal

# of vLLM 0.32.0 with transformers 5.19, from its output of 2026-11-30
NOT_IMPORTED = (
    "1 validation error for ModelConfig\n  Value error, The checkpoint you are trying to load has model type "
    "`llama_with_softpick` but Transformers does not recognize this architecture. This could be because of an issue"
)
IMPORTED = (
    "1 validation error for ModelConfig\n  Value error, Model architectures ['LlamaForCausalLM_with_softpick'] are not "
    "supported for now. Supported architectures: dict_keys(['AfmoeForCausalLM', 'ApertusForCausalLM'])"
)


@pytest.mark.parametrize(("text", "imported"), [(NOT_IMPORTED, False), (IMPORTED, True)])
def test_the_refusal_is_one(text, imported):
    assert is_refusal(ValueError(text), imported)
    assert not is_refusal(ValueError(text), not imported)
    assert not is_refusal(RuntimeError(text), imported)
    assert not is_refusal(ValueError(text.replace("_with_softpick", "")), imported)


@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        ImportError("No module named 'vllm'"),
        MemoryError(),
        OSError("/nowhere/config.json"),
        ValueError("No available memory for the cache blocks"),
        RuntimeError("Engine core initialization failed: LlamaForCausalLM_with_softpick"),
        TypeError("generate() got an unexpected keyword argument"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_failures_are_no_refusals(error, imported):
    assert not is_refusal(error, imported)
