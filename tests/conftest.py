import os
import signal

import pytest
import torch

# Before anything imports Triton: without a GPU its kernels run in its interpreter, on tensors of the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Commands under test are interrupted. Started in the background of a shell, this process ignores SIGINT, and so would they.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Many small tensors: threads would only wait for one another.
torch.set_num_threads(int(os.environ.get("SOFTPICK_TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def thin(cases, times=1, every=0):
    """Some cases of a parametrized test: those in which every value of every parameter occurs ``times``, or every n-th case."""
    if every:
        return cases[::every]
    values = {case: {(name, id(value)) for name, value in case.callspec.params.items()} for case in cases}
    kept = []
    for _ in range(times):
        unseen = set().union(*values.values())
        while unseen:
            best = max(values, key=lambda case: len(unseen & values[case]))
            unseen -= values.pop(best)
            kept.append(best)
    return kept


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(items):
    families = {}
    for item in items:
        if mark := item.get_closest_marker("thinned"):
            families.setdefault(item.nodeid.split("[")[0], (mark, []))[1].append(item)
    for mark, cases in families.values():
        kept = set(thin(cases, *mark.args, **mark.kwargs))
        for case in cases:
            if case not in kept:
                case.add_marker("long")
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
