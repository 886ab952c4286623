import os

import pytest
import torch

# Before anything imports Triton: without a GPU its kernels run in its interpreter, on tensors of the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Many small tensors: threads would only wait for one another.
torch.set_num_threads(int(os.environ.get("SOFTPICK_TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# Half a minute and more: `make test-long` (SOFTPICK_LONG=1) runs them too, `make test` must stay below 20 minutes.
LONG = (
    "test_backcopy_shows_the_phenomenon",
    "test_weights[gptq",
    "test_memory_of_long_texts",
    "test_examples_run[pretrain_and_compare.py]",
    "test_two_ranks_are_one[tensor_parallel]",
    "test_fsdp_in_bf16_keeps_sums_in_fp32",
    "test_what_was_asked_for_or_an_error",
    "test_ranks_end_when_no_gradient_is_finite",
    "test_ranks_stop_together",
    "test_kernels_compile_and_fit[Hopper]",
    "test_ctrl_c_leaves_a_run_that_resumes_to_the_same_figures",
    "test_add_a_normalizer",
    "test_killed_commands_lose_nothing",
    "test_killed_at_any_moment",
    "test_an_interrupt_from_outside",
)


def pytest_collection_modifyitems(items):
    if not os.environ.get("SOFTPICK_LONG"):
        for item in items:
            if item.name.startswith(LONG):
                item.add_marker(pytest.mark.skip(reason="takes long: make test-long"))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def poisoned(monkeypatch):
    """Fill new_empty and torch.empty with NaN, so that an element nobody writes is seen."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def filled(*args, _original=original, **kwargs):
            out = _original(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(owner, name, filled)
