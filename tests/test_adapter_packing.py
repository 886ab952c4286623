"""What tells packed sequences apart, by itself, against loops over single tokens and pairs of tokens."""

from __future__ import annotations

import random
from contextlib import nullcontext
from importlib.metadata import version
from itertools import chain, pairwise
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

pytest.importorskip("transformers", minversion="5.17")

import softpick.integrations.transformers as st  # noqa: F401  (registers the implementations)
from softpick.integrations import transformers_packing as packing
from softpick.normalizers import NORMALIZERS

LOW = torch.finfo(torch.float32).min


def numbered(starts):
    """``(sequence, position)`` of each token of a row, counted one after another."""
    found, sequence, position = [], -1, 0
    for index, start in enumerate(starts):
        sequence, position = (sequence + 1, 0) if start or index == 0 else (sequence, position + 1)
        found.append((sequence, position))
    return found


def alike(sequence):
    return (sequence[:, :, None] == sequence[:, None, :]).tolist()


def check(found, rows, batch):
    """A packing is the one of some rows of starts."""
    want = [numbered(row) for row in rows]
    tokens = len(rows[0])
    for i, row in enumerate(want):
        got = found.sequence[i].tolist()
        assert [[a == b for a in got] for b in got] == [[a[0] == b[0] for a in row] for b in row]
        assert found.position[i].tolist() == [position for _, position in row]
    flat = [b * tokens + t for b in range(batch) for t in range(tokens) if want[b % len(rows)][t][1] == 0]
    assert found.offsets.tolist() == [*flat, batch * tokens]
    assert found.offsets.dtype == torch.int32
    assert tokens >= found.longest >= max(position + 1 for row in want for _, position in row)


def positions_of(rows):
    return torch.tensor([[position for _, position in numbered(row)] for row in rows])


ROWS = [[1, 0, 0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("batch", [1, 3])
def test_packing_by_positions(batch):
    """Positions of each row, or one row of positions for all."""
    check(packing.find_packing(batch, 8, 8, positions_of(ROWS[:1]), None, None, None), ROWS[:1], batch)
    check(packing.find_packing(3, 8, 8, positions_of(ROWS), None, None, None), ROWS, 3)
    check(packing.find_packing(batch, 2, 2, torch.zeros(1, 2).long(), None, None, None), [[1, 1]], batch)


def test_a_row_may_begin_within_a_sequence():
    found = packing.find_packing(1, 5, 5, torch.tensor([[3, 4, 0, 1, 0]]), None, None, None)
    assert alike(found.sequence) == alike(torch.tensor([[7, 7, 8, 8, 9]]))
    assert found.offsets.tolist() == [0, 2, 4, 5]


@pytest.mark.parametrize("longest", [None, 5])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[1:]])
def test_packing_by_offsets(rows, longest):
    batch = len(rows)
    offsets = [i for i, start in enumerate(chain(*rows)) if start] + [8 * batch]
    cu = torch.tensor(offsets, dtype=torch.int32)
    longest = None if longest is None else max(b - a for a, b in pairwise(offsets))
    for positions in (None, torch.arange(8)[None]):  # offsets win
        found = packing.find_packing(batch, 8, 8, positions, cu, cu.clone(), longest)
        check(found, rows, batch)
        assert found.longest == longest or longest is None


def test_what_does_not_pack():
    restarting, plain = torch.tensor([[0, 1, 0, 1]]), torch.arange(4)[None]
    causal = torch.ones(1, 1, 4, 4).bool().tril()

    def packs(positions, batch=1, tq=4, tk=4, **more):
        return packing.find_packing(batch, tq, tk, positions, None, None, None, **more) is not None

    assert packs(restarting)
    assert packs(restarting, batch=3)
    assert packs(restarting, is_causal=False, mask=causal)
    assert packs(restarting, is_causal=True, mask=torch.ones_like(causal))
    assert not packs(restarting, is_causal=False)
    assert not packs(restarting, is_causal=False, mask=torch.ones_like(causal))
    assert not packs(None)
    assert not packs(plain)
    assert not packs(restarting, tk=6)
    assert not packs(restarting, tq=2, tk=2)
    assert not packs(restarting.expand(2, 4), batch=3)
    assert not packs(restarting[None].expand(3, 1, 4))  # positions of text, height and width
    assert not packs(torch.zeros(1, 4, dtype=torch.long, device="meta"))
    assert not packs(torch.zeros(1, 1).long(), tq=1, tk=1)


def test_positions_are_not_read_while_compiling(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert packing.find_packing(1, 4, 4, torch.tensor([[0, 1, 0, 1]]), None, None, None) is None


def test_a_single_query_does_not_wait_for_the_device(monkeypatch):
    """Each token of ``generate`` would."""
    monkeypatch.setattr(packing, "_restarts", None)
    assert packing.find_packing(2, 1, 1, torch.zeros(2, 1).long(), None, None, None) is None


def test_offsets_that_do_not_fit_are_named():
    q, k = torch.tensor([0, 2, 4]), torch.tensor([0, 4])
    for cu, tk, said in (
        ((q, None), 4, r"\(3,\), none, 4 queries, 4 keys"),
        ((None, k), 4, r"none, \(2,\), 4 queries, 4 keys"),
        ((q, k), 4, r"\(3,\), \(2,\), 4 queries, 4 keys"),
        ((q, q), 6, r"\(3,\), \(3,\), 4 queries, 6 keys"),
    ):
        with pytest.raises(ValueError, match=f"^cu_seq_lens_q, cu_seq_lens_k: expected both, .* got {said}"):
            packing.find_packing(1, 4, tk, None, *cu, None)


def test_restarts_are_read_once_and_read_again_where_they_may_have_changed(monkeypatch):
    reads, read = [], torch.Tensor.any
    monkeypatch.setattr(torch.Tensor, "any", lambda *a: reads.append(1) or read(*a))

    def answer(positions, times):
        before = len(reads)
        found = packing._restarts(positions)
        assert len(reads) - before == times
        return found

    first, second = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 0]])
    assert [answer(first, times) for times in (1, 0, 0)] == [False] * 3
    assert [answer(second, times) for times in (1, 0)] == [True] * 2
    assert not answer(first, 1)
    first[0, 1] = 0
    assert answer(first, 1)
    assert answer(first, 0)
    with torch.inference_mode():  # such tensors do not count their changes
        third = torch.tensor([[0, 1, 2]])
        assert not answer(third, 1)
        third[0, 2] = 0
        assert answer(third, 1)
    assert not packing._restarts(torch.tensor([[0, 1, 1]]))
    assert packing._restarts(torch.tensor([[5, 0, 1]]))


def drawn(random_, batch, heads, rows, keys, dims=4):
    mask = torch.tensor(random_.choices([True, False], [3, 1], k=batch * heads * rows * keys))
    mask = mask.view(batch, heads, rows, keys)
    return mask if dims == 4 else mask[(0,) * (4 - dims)]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_restarts_are_refused_where_a_token_sees_another_sequence(is_causal, additive, monkeypatch):
    """By every pair: a query that some query sees (others are padding), and a key of another sequence that it sees."""
    r, answers = random.Random(0), set()
    for _ in range(150):
        tokens, batch, dims = r.randint(2, 5), r.randint(1, 2), r.choice([4, 4, 4, 3, 2])
        rows = [[r.random() < 0.4 or i == 0 for i in range(tokens)] for _ in range(r.choice([1, batch]))]
        mask = drawn(r, batch, r.randint(1, 2), r.choice([1, tokens]), tokens, dims)
        kind = r.choice(["as drawn", "apart", "none", "padding", "back"])
        same = torch.tensor([[[a[0] == b[0] for b in numbered(row)] for a in numbered(row)] for row in rows])[:, None]
        if kind == "apart" and dims == 4:
            mask = mask & same
        if kind == "padding":
            mask = mask & (torch.arange(tokens) < tokens - 1)
        if kind == "back":
            mask = mask.expand(*mask.shape[:-2], tokens, tokens).tril()
        monkeypatch.setattr(packing._running, "starts", torch.tensor(rows), raising=False)
        seen = (torch.ones(1, 1, 1, 1).bool() if kind == "none" else mask).expand(batch, 2, tokens, tokens)
        pairs = [
            (i, j)
            for b in range(batch)
            for h in range(2)
            for i in range(tokens)
            for j in range(tokens)
            if seen[b, h, i, j] and seen[b, h, :, i].any() and not same[b % len(rows), 0, i, j]
        ]
        if kind == "none":
            mask = None
            refused = bool(pairs) and not is_causal
        else:
            one_row = mask.shape[-2] == 1
            back = not one_row and all(not seen[..., i, j].any() for i in range(tokens) for j in range(i + 1, tokens))
            refused = bool(pairs) and not back and (one_row or not is_causal)
            mask = torch.where(mask, 0.0, LOW) if additive else mask
        answers.add((refused, kind))
        said = "^position_ids: start again at 0, which packs sequences, and Linear looks both ways"
        with pytest.raises(ValueError, match=said) if refused else nullcontext():
            packing.check_restarts(torch.nn.Linear(1, 1), tokens, tokens, is_causal, mask)
    assert len(answers) > 6


def test_restarts_say_nothing_of_layers_with_other_numbers_of_tokens(monkeypatch):
    """Cross-attention, slices of queries, and a model within the model; and while compiling nothing is read."""
    layer = torch.nn.Linear(1, 1)
    monkeypatch.setattr(packing._running, "starts", torch.tensor([[True, False, True, False]]), raising=False)
    for sizes in ((4, 5), (5, 4), (3, 3), (5, 5)):
        packing.check_restarts(layer, *sizes, False, None)
    with pytest.raises(ValueError, match="position_ids: start again"):
        packing.check_restarts(layer, 4, 4, False, None)
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        packing.check_restarts(layer, 4, 4, False, None)
    monkeypatch.setattr(packing._running, "starts", None, raising=False)
    packing.check_restarts(layer, 4, 4, False, None)


def test_offsets_and_pages_are_not_looked_for_while_compiling(monkeypatch):
    monkeypatch.setattr(packing._running, "given", True, raising=False)
    monkeypatch.setattr(packing._running, "paged", True, raising=False)
    assert packing.runs_paged()
    with pytest.raises(ValueError, match="cu_seq_lens_q: the model does not hand it on"):
        packing.check_offsets(torch.nn.Linear(1, 1), True, None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert packing.runs_paged() is False
    packing.check_offsets(torch.nn.Linear(1, 1), True, None)
    monkeypatch.undo()
    assert packing.runs_paged() is False
    packing.check_offsets(torch.nn.Linear(1, 1), True, None)


def test_masks_that_look_back():
    """Of two or more tokens, of two or more dimensions, boolean or additive: no query sees a later key."""
    for tokens in (2, 3):
        back = torch.ones(tokens, tokens).bool().tril()
        for shape in ((), (1,), (2, 3)):
            mask = back.expand(*shape, tokens, tokens)
            for given in (mask, torch.where(mask, 0.0, LOW), mask & mask.triu()):
                assert packing.looks_back(given) is True
            for i in range(tokens):
                for j in range(i + 1, tokens):
                    ahead = mask.clone()
                    ahead[..., i, j] = True
                    assert packing.looks_back(ahead) is False
    assert packing.looks_back(None) is False
    for shape in ((), (3,), (1, 1), (1, 1, 1, 1), (1, 3), (2, 3), (3, 2), (2, 2, 1, 3)):
        assert packing.looks_back(torch.zeros(shape).bool()) is False


def test_two_masks_become_one():
    mask, keep = torch.randn(2, 1, 4, 4), torch.rand(2, 1, 4, 4) < 0.5
    assert torch.equal(packing.masked(mask > 0, keep), (mask > 0).logical_and(keep))
    assert torch.equal(packing.masked(mask, keep), torch.where(keep, mask, torch.tensor(LOW)))
    assert packing.masked(mask.half(), keep).dtype == torch.float16
    assert torch.equal(packing.excluded(torch.where(keep, mask, torch.tensor(LOW))), keep.logical_not())


@pytest.mark.parametrize("chunk", [None, 2, 3])
@pytest.mark.parametrize("how", ["none", "boolean", "additive"])
def test_masks_without_what_sequences_see_of_one_another(how, chunk):
    """Every pair of tokens: of one sequence and, without a mask, not ahead and within the window."""
    found = packing.find_packing(3, 8, 8, positions_of(ROWS), None, None, None)
    want = [numbered(row) for row in ROWS]
    given = drawn(random.Random(1), 3, 1, 8, 8)
    if chunk is not None:  # transformers' mask, whose diagonal tells of padding
        given = given.tril()
    windows = [None, (0, 0), (1, 0), (2, 0), (0, 1), (2, 1)] if how == "none" else [None]
    for is_causal in (True, False):
        for window in windows:
            mask = {"none": None, "boolean": given, "additive": torch.where(given, 0.0, LOW)}[how]
            got = packing.apart(mask, found, is_causal, window, chunk)
            keep = got if got.dtype == torch.bool else got > LOW
            assert got.dtype == (torch.float32 if how == "additive" else torch.bool)
            if how == "additive":
                assert set(got.unique().tolist()) <= {LOW, 0.0}
            for b in range(3):
                for i in range(8):
                    for j in range(8):
                        (sequence, at), (other, key) = want[b][i], want[b][j]
                        sees = sequence == other
                        if how == "none":
                            sees = sees and (not is_causal or j <= i)
                            left, right = window or (99, 99)
                            sees = sees and -right <= i - j <= left
                        elif chunk is None:
                            sees = sees and bool(given[b, 0, i, j])
                        else:
                            sees = sees and j <= i and at // chunk == key // chunk and bool(given[b, 0, j, j])
                        assert bool(keep[b, 0, i, j]) == sees


def test_chunks_are_those_of_the_layer():
    kinds = ["chunked_attention", "full_attention", "chunked_attention"]
    config = SimpleNamespace(layer_types=kinds, attention_chunk_size=4)
    chunks = [packing.chunk_of(SimpleNamespace(config=config, layer_idx=i)) for i in range(4)]
    assert chunks == [4, None, 4, None]  # a layer that its configuration does not list (of another model's table)
    assert packing.chunk_of(SimpleNamespace(config=config)) is None
    assert packing.chunk_of(SimpleNamespace(config=SimpleNamespace(attention_chunk_size=4), layer_idx=0)) is None
    assert packing.chunk_of(SimpleNamespace(config=SimpleNamespace(layer_types=kinds), layer_idx=0)) is None
    assert packing.chunk_of(torch.nn.Linear(1, 1)) is None


def test_starts_behind_tokens_and_behind_padding():
    """A start counts from the second token on if the row's mask has a token before it."""
    r = random.Random(0)
    for _ in range(100):
        tokens, offset, batch = r.randint(1, 5), r.randint(0, 4), r.randint(1, 2)
        positions = torch.tensor([[r.choice([0, 0, 1, 2]) for _ in range(tokens)] for _ in range(r.choice([1, batch]))])
        width = max(1, tokens + offset - r.choice([0, 0, 1, 2]))
        padding = [[r.random() < 0.4 for _ in range(width)] for _ in range(batch)]
        for given in (None, torch.tensor(padding), torch.tensor(padding).long(), torch.ones(batch, 1, tokens, tokens)):
            got = packing._starts_behind_tokens(positions, given, offset).expand(batch, -1).tolist()
            two = given is not None and given.dim() == 2
            assert got == [
                [
                    positions[b % len(positions), i].item() == 0 and (not two or any(padding[b][: i + offset]))
                    for i in range(1, tokens)
                ]
                for b in range(batch)
            ]


# ---------------------------------------------------------------------------------------------------------------------
# Masks of transformers


def preprocessed(
    positions, *, batch=1, tokens=4, padding=None, packed=None, early=False, keys=None, offset=0, **fields
):
    """What our ``_preprocess_mask_arguments`` makes of transformers' answer, and that answer."""
    config = SimpleNamespace(**{"_attn_implementation": "softpick", "model_type": "tiny", **fields})
    answer = (early, padding, packed, tokens, tokens if keys is None else keys, offset, 0)
    asked = []
    wrapper = packing.packed_in_masks(
        lambda *args, **kwargs: asked.append((args, kwargs)) or answer, lambda c: c._attn_implementation in NORMALIZERS
    )
    embeds = torch.zeros(batch, tokens, 7)
    got = wrapper(config, embeds, "mask", "cache", positions, "index", more=1)
    args, kwargs = asked.pop()
    assert args[0] is config
    assert args[1] is embeds
    assert args[2:4] == ("mask", "cache")
    assert args[4] is positions
    assert (args[5:], kwargs) == (("index",), {"more": 1})
    return got, answer


CHUNKED = {"layer_types": ["full_attention", "chunked_attention"]}
RESTARTING, PLAIN = torch.tensor([[0, 1, 0, 1]]), torch.arange(4)[None]


@pytest.fixture(params=["eager", "compiling", "tracing"])
def mode(request, monkeypatch):
    if request.param == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    if request.param == "tracing":
        monkeypatch.setattr(packing, "is_tracing", lambda tensor=None: True)
    return request.param


def test_packed_sequences_are_found_beside_a_padding_mask(mode):
    for rows, batch in ((ROWS[:1], 1), (ROWS[:1], 3), (ROWS, 3)):
        got, answer = preprocessed(positions_of(rows), batch=batch, tokens=8, padding=torch.ones(batch, 8).bool())
        assert got[:2] == answer[:2]
        assert got[3:] == answer[3:]
        assert got[2].shape == (batch, 8)
        want = torch.tensor([[sequence for sequence, _ in numbered(rows[b % len(rows)])] for b in range(batch)])
        assert alike(got[2]) == alike(want)


def test_packed_sequences_are_found_without_a_padding_mask():
    """With a cache, where transformers does not look for them, of as few as two tokens."""
    assert alike(preprocessed(RESTARTING)[0][2]) == alike(torch.tensor([[1, 1, 2, 2]]))
    assert preprocessed(torch.zeros(1, 2).long(), tokens=2)[0][2].diff().tolist() == [[1]]
    padding = torch.tensor([[False, False, True, True, True]])
    behind, *_ = preprocessed(torch.tensor([[0, 0, 0, 1, 0]]), tokens=5, padding=padding)
    assert alike(behind[2])[0][2:] == [[False, False, True, True, False]] * 2 + [[False] * 4 + [True]]


def test_masks_of_others_stay(mode, monkeypatch):
    """Nothing is changed where nothing is packed, where transformers has found it, and for implementations of its own."""
    ones = torch.ones(1, 4).bool()
    left = torch.tensor([[False, True, True, True]])
    for positions, more in (
        (RESTARTING, {"padding": ones, "_attn_implementation": "sdpa"}),
        (RESTARTING, {"packed": torch.zeros(1, 4)}),
        (RESTARTING, {"padding": torch.ones(1, 1, 4, 4), "early": True}),
        (None, {"padding": ones}),
        (None, {}),
        (RESTARTING[None], {"padding": ones}),
        (RESTARTING.expand(2, 4), {"padding": ones, "batch": 3}),
        (torch.zeros(1, 1).long(), {"tokens": 1, "padding": ones[:, :1]}),
        (PLAIN, {}),
        (PLAIN, {"keys": 9}),
    ):
        got, answer = preprocessed(positions, **more)
        assert got is answer
    if mode == "eager":
        for positions, more in (
            (PLAIN, {"padding": ones}),
            (PLAIN, CHUNKED),
            (torch.tensor([[0, 0, 1, 2]]), {"padding": left}),
            (torch.tensor([[0, 0, 1, 2]]), {"padding": left, **CHUNKED}),
        ):
            got, answer = preprocessed(positions, **more)
            assert got is answer
    monkeypatch.setattr(packing._running, "paged", True, raising=False)
    if mode != "compiling":
        got, answer = preprocessed(RESTARTING, padding=ones)
        assert got is answer


def test_packed_sequences_that_a_mask_cannot_hold_are_refused(mode):
    """Beside a cache that holds tokens; and of chunks, with padding on the left or where values cannot be read."""
    ones, error = torch.ones(1, 4).bool(), ValueError if mode == "eager" else RuntimeError
    left = torch.tensor([[False, True, True, True], [True, True, True, True]])
    cases = [
        (RESTARTING, {"keys": 9, "padding": torch.ones(1, 9).bool()}),
        (RESTARTING, {"keys": 6, "offset": 2, "padding": torch.ones(1, 6).bool()}),
        (torch.tensor([[1, 2, 0, 1]]), {"keys": 6, "padding": torch.tensor([[True] + [False] * 5]), "offset": 1}),
        (torch.tensor([[0, 0, 1, 0]]).expand(2, 4), {"batch": 2, "padding": left, **CHUNKED}),
    ]
    if mode != "eager":
        cases += [(RESTARTING, {}), (RESTARTING, {"keys": 9}), (RESTARTING, {"padding": ones, **CHUNKED})]
    for positions, more in cases:
        with pytest.raises(error, match=r"^(Expected.*)?position_ids: packed sequences"):
            preprocessed(positions, **more)
    # starts that are all behind padding are those of generate
    padding = torch.tensor([[False, False, False, True, True, True]])
    got, answer = preprocessed(torch.tensor([[0, 0, 1, 2]]), keys=6, offset=2, padding=padding)
    assert got is answer


def test_chunks_of_packed_sequences_with_padding_on_the_right(monkeypatch):
    """And without padding, as far as transformers can; padding on the left harms nobody but those with chunks."""
    monkeypatch.setattr(packing, "_CHUNKS_FROM_THE_ROW", False)
    left, right = torch.tensor([[False, True, True, True]]), torch.tensor([[True, True, True, False]])
    positions = torch.tensor([[0, 1, 0, 0]])
    for more in ({**CHUNKED, "padding": right}, CHUNKED, {"padding": left}, {"layer_types": None, "padding": left}):
        assert alike(preprocessed(positions, **more)[0][2]) == alike(torch.tensor([[1, 1, 2, 3]]))


def test_since_when_transformers_counts_chunks_within_a_sequence():
    """Not a name of some version: 5.24 has no longer what 5.23 has."""
    assert packing._CHUNKS_FROM_THE_ROW is (Version(version("transformers")) < Version("5.23"))


@pytest.mark.parametrize("old", [True, False])
def test_chunks_counted_from_the_row_are_refused(old, mode, monkeypatch):
    """transformers before 5.23, whether it finds the sequences or we do; unless offsets are given, too."""
    monkeypatch.setattr(packing, "_CHUNKS_FROM_THE_ROW", old)
    error = ValueError if mode == "eager" else RuntimeError
    found = {"packed": torch.zeros(1, 4)}
    ones = {"padding": torch.ones(1, 4).bool()}
    calls = [(RESTARTING, {**CHUNKED, **found}), (torch.tensor([[0, 0]]), {**CHUNKED, "packed": 1, "tokens": 2})]
    if mode == "eager":
        calls += [(RESTARTING, {**CHUNKED, **ones}), (RESTARTING, CHUNKED)]
    for positions, more in calls:
        if old:
            with pytest.raises(
                error, match=r"position_ids: packed sequences of a tiny model, .* need transformers 5\.23"
            ):
                preprocessed(positions, **more)
        else:
            preprocessed(positions, **more)
        with monkeypatch.context() as given:
            given.setattr(packing._running, "given", True, raising=False)
            if mode == "eager":
                preprocessed(positions, **more)
    for positions, more in (
        (RESTARTING, found),
        (RESTARTING, {**found, **CHUNKED, "_attn_implementation": "eager"}),
        (PLAIN, {**found, **CHUNKED}),
        (None, {**found, **CHUNKED}),
        (RESTARTING, ones),
    ):
        preprocessed(positions, **more)
