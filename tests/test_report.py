"""The summary, the encoded maps, and the HTML file in a real browser (headless Chromium)."""

import json
import math
import os
import re
import shutil

import pytest
import torch

from softpick.analysis import report as report_module
from softpick.analysis.metrics import Meter
from softpick.analysis.report import METRICS, data_statement, decode_maps, encode_maps, run_labels, summary_rows
from softpick.analysis.report import write_report as write

EVIL = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=1>&'\"\u2028<!--"
LAYERS, HEADS, T = 2, 3, 20


def make_maps(kind, seed):
    g = torch.Generator().manual_seed(seed)
    s = torch.randn(LAYERS, HEADS, T, T, generator=g)
    keep = torch.ones(T, T).tril().bool()
    if kind == "softmax":
        s[:, :, :, 0] += 4  # a sink
        return torch.softmax(s.masked_fill(~keep, -math.inf), -1)
    f = torch.where(keep, torch.expm1(s), 0.0)
    return f.clamp(min=0) / (f.abs().sum(-1, keepdim=True) + 1e-6)


def make_run(normalizer, seed=0, loss=1.25, maps=None):
    g = torch.Generator().manual_seed(seed)
    maps = make_maps(normalizer, seed) if maps is None else maps
    meter = Meter("bos", [1])
    meter.begin_batch(torch.ones(1, T, dtype=torch.bool), torch.arange(1, T + 1)[None])
    for layer in range(LAYERS):
        meter.attention(layer, maps[layer][None], torch.randn(1, T, HEADS, 4, generator=g))
        meter.hidden(layer, torch.randn(1, T, 8, generator=g) * (1 + 100 * (normalizer == "softmax")))
    steps = list(range(1, 101))
    knockout = {
        "key": "strongest", "all keys": 20.0, "eviction": 30.0, "eviction_percent": 50.0, "absence": 21.0,
        "absence_percent": 5.0, "after": 4, "counted_from": 8, "tokens": 18,
        "masked": {"token": EVIL, "token_id": 1, "token_id_share": 100.0, "position": 0, "position_share": 100.0},
    }  # fmt: skip
    return {
        "perplexity": 19.5,
        "knockout": [knockout],
        "token_text": {str(i): f"word {i}" for i in range(2, T + 1)} | {"1": EVIL},
        "normalizer": normalizer,
        "title": normalizer,
        "seed": seed,
        "validation_loss": loss,
        "parameters": 123456,
        "seconds": 61,
        "curves": {
            "step": steps,
            "loss": [3 / s**0.2 for s in steps],
            "grad_norm": [10 / s if s != 50 else math.inf for s in steps],
            "eval_step": [50, 100],
            "eval_loss": [1.5, loss],
        },
        "measurements": meter.result().to_dict(),
        "samples": [
            {"text_tokens": [EVIL, *(f"t{i}" for i in range(1, T))], "maps": encode_maps(maps)},
            {"text_tokens": [f"u{i}" for i in range(T)], "maps": encode_maps(maps.flip(0), bits=8)},
        ],
    }


def make_report(*runs):
    return {
        "title": f"A title {EVIL}",
        "meta": {"task": "test", "data": f"made up {EVIL}", "sequence_length": T, "versions": {"torch": "x"}},
        "notes": [f"a note {EVIL}"],
        "runs": list(runs) or [make_run("softmax"), make_run("softpick", loss=1.5)],
    }


# Maps


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_encode_maps(bits, signed):
    x = make_maps("softpick", 0).double()
    x[0, 1] = 0.0  # an empty map
    x[1, 2, 5, 3] = 1e-12  # not an exact zero, and stays apart from one
    if signed:
        x[1, 0] = -x[1, 0]
    encoded = encode_maps(x, bits=bits)
    json.dumps(encoded, allow_nan=False)
    assert encoded["causal"] is True
    y = decode_maps(encoded)
    codes_zero = decode_maps(encoded | {"min": [1.0] * 6, "max": [2.0] * 6}) == 0
    assert torch.equal(codes_zero, x == 0)
    width = (x.amax((2, 3)).clamp(min=0) - x.amin((2, 3)).clamp(max=0))[..., None, None]
    assert bool(((x - y).abs() <= 0.5001 * width / (2**bits - 2)).all())


def test_encode_maps_errors():
    with pytest.raises(ValueError, match=r"expected \(L, H, T, T\)"):
        encode_maps(torch.zeros(2, 3, 3))
    with pytest.raises(ValueError, match="bits: expected 8 or 16"):
        encode_maps(torch.zeros(1, 1, 3, 3), bits=4)
    with pytest.raises(ValueError, match="NaN"):
        encode_maps(torch.full((1, 1, 3, 3), torch.nan))


# Summary


def test_summary_rows():
    report = make_report()
    rows = dict(summary_rows(report))
    assert rows["Validation loss"] == ["1.2500", "1.5000"]
    assert rows["Row mass"][0] == "1.000"
    assert rows["Time"] == ["61 s", "61 s"]
    zero = report["runs"][1]["measurements"]["sparsity"]["zero"]
    assert rows["Weights exactly 0"] == ["0.0 %", f"{zero:.1f} %"]
    assert "Empty tiles 64×64" not in rows  # no run has it: samples are shorter
    assert list(rows) == [m.label for m in METRICS if m.label in rows]
    assert all(m.definition for m in METRICS)
    assert len({m.key for m in METRICS}) == len({m.label for m in METRICS}) == len(METRICS)


def test_every_metric_exists():
    """Every path leads somewhere: a renamed key would otherwise just vanish from the table."""
    run = make_run("softpick")
    both_ways = Meter()
    both_ways.begin_batch(torch.ones(1, 4, dtype=torch.bool))
    both_ways.attention(0, torch.full((1, 1, 4, 4), 0.25), torch.ones(1, 4, 1, 2), causal=False)
    assert run["measurements"]["sink"]["last"] is None  # of a causal model
    run["measurements"]["sink"]["last"] = both_ways.result().sink["last"]
    for metric in METRICS:
        at = run
        for part in metric.path:
            at = at[part]


def test_summary_by_normalizer():
    report = make_report(make_run("softpick", 0, 1.0), make_run("softpick", 1, 2.0), make_run("softmax", 0, 3.0))
    assert run_labels(report) == ["softpick · seed 0", "softpick · seed 1", "softmax"]
    rows = dict(summary_rows(report, by="normalizer"))
    assert rows["Validation loss"] == ["1.5000 ± 0.7071", "3.0000"]
    assert rows["Time"] == ["61 ± 0 s", "61 s"]
    assert len(dict(summary_rows(report))["Validation loss"]) == 3
    with pytest.raises(ValueError, match="by: expected"):
        summary_rows(report, by="seed")


def test_missing_values_are_dashes():
    report = make_report({"normalizer": "softpick", "validation_loss": math.nan}, make_run("softmax"))
    rows = dict(summary_rows(report))
    assert rows["Validation loss"] == ["–", "1.2500"]
    assert rows["Kurtosis"][0] == "–"


def test_data_statement():
    run = make_run("softmax")
    start = f"every sample starts with BOS (token 1 ({EVIL!r}))"
    assert data_statement(run) == f"T = 20 tokens, 1 samples, causal, {start}"
    assert data_statement({"normalizer": "x"}) == "not measured"


def test_note_when_softmax_has_no_sinks():
    without = make_report(make_run("softmax", maps=make_maps("softpick", 1)))
    notes = report_module._derived_notes(without)
    assert len(notes) == 1
    assert "hardly any attention sinks" in notes[0]
    assert report_module._derived_notes(make_report()) == []


# File


def test_write_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write(path, make_report())
    before = path.read_text()
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write(path, make_report())
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["report.html"]


def test_nothing_of_the_data_is_markup(tmp_path):
    path = tmp_path / "report.html"
    write(path, make_report() | {"title": f"__DATA__ {EVIL}"})
    text = path.read_text()
    assert text.count("<script") == 2  # the data and the program
    assert "<img" not in text
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S).group(1))
    assert data["notes"][0] == f"a note {EVIL}"
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)


def test_write_report_errors(tmp_path):
    with pytest.raises(ValueError, match="'runs' with at least one run"):
        write(tmp_path / "x.html", {"title": "x", "runs": []})
    with pytest.raises(ValueError, match=r"runs\[0\] to be a dict with a 'normalizer'"):
        write(tmp_path / "x.html", {"title": "x", "runs": [{}]})
    assert not os.listdir(tmp_path)


# Browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        message = "chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1280,900",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(chromedriver))
    yield driver
    driver.quit()


def opened(browser, tmp_path, report):
    path = tmp_path / "report.html"
    write(path, report)
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(path.as_uri())
    return path


def in_view(browser, element_id):
    """The element, scrolled to and settled: scrolling hides the tip, and its event comes a frame after the scroll."""
    from selenium.webdriver.common.by import By

    element = browser.find_element(By.ID, element_id)
    browser.execute_async_script(
        "const [element, done] = arguments; element.scrollIntoView({block: 'center'});"
        "requestAnimationFrame(() => requestAnimationFrame(() => requestAnimationFrame(done)))",
        element,
    )
    return element


def pixels(browser, canvas):
    """``[query][key]`` to RGBA."""
    flat = browser.execute_script(
        "const [id, t] = arguments, c = document.getElementById(id).getContext('2d');"
        "return [...c.getImageData(0, 0, t, t).data]",
        canvas,
        T,
    )
    return [[flat[4 * (q * T + k) :][:4] for k in range(T)] for q in range(T)]


def choose(browser, select, value):
    browser.execute_script(
        "const s = document.getElementById(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('change'))",
        select,
        str(value),
    )


def image(browser, canvas):
    return browser.execute_script("return document.getElementById(arguments[0]).toDataURL()", canvas)


def css_color(browser, name):
    value = browser.execute_script(
        "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0]).trim()", name
    )
    return [int(value[i : i + 2], 16) for i in (1, 3, 5)] + [255]


@pytest.mark.browser
def test_opens_without_errors_or_requests(browser, tmp_path):
    path = opened(browser, tmp_path, make_report())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.pwned") is None
    assert browser.title.startswith("A title </script>")
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    # of this document: the browser's own start page loads chrome:// resources at the same time
    urls = {r["request"]["url"] for r in requests if r["documentURL"] == path.as_uri()}
    assert {u for u in urls if not u.startswith("data:")} == {path.as_uri()}
    text = browser.execute_script("return document.body.innerText")
    assert "a note </script>" in text
    # every section that shows sink figures says what they were measured on
    for section in ("summary", "heads", "maps"):
        shown = browser.execute_script("return document.getElementById(arguments[0]).innerText", section)
        assert "T = 20 tokens, 1 samples, causal, every sample starts with BOS (token 1 (" in shown
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.browser
def test_table_shows_the_numbers(browser, tmp_path):
    report = make_report()
    opened(browser, tmp_path, report)
    shown = browser.execute_script(
        "return [...document.querySelectorAll('#summary tr[data-key]')].map(r => [...r.cells].map(c => c.innerText))"
    )
    assert [[row[0], [v.replace("−", "-") for v in row[1:]]] for row in shown] == [
        [a, b] for a, b in summary_rows(report)
    ]
    tip = browser.execute_script(
        "document.querySelector('tr[data-key=\"sink_first_0.3\"] button').focus();"
        "const t = document.getElementById('tip'); return [getComputedStyle(t).visibility, t.textContent]"
    )
    assert tip[0] == "visible"
    assert "alpha > 0.3" in tip[1]
    assert "T = 20 tokens" in tip[1]


@pytest.mark.browser
def test_several_seeds(browser, tmp_path):
    opened(browser, tmp_path, make_report(make_run("softpick", 0, 1.0), make_run("softpick", 1, 2.0)))
    cells = "return [...document.querySelectorAll('#summary tr[data-key=validation_loss] td')].map(c => c.innerText)"
    assert browser.execute_script(cells) == ["1.5000 ± 0.7071"]
    choose(browser, "columns", "run")
    assert browser.execute_script(cells) == ["1.0000", "2.0000"]


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_maps(browser, tmp_path, theme):
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    opened(browser, tmp_path, make_report())
    assert browser.execute_script("return document.documentElement.dataset.theme") == theme
    zero, masked = css_color(browser, "--zero"), css_color(browser, "--masked")
    assert zero != masked
    maps = make_maps("softpick", 0)
    for layer, head in ((0, 0), (1, 2)):
        choose(browser, "map-layer", layer)
        choose(browser, "map-head", head)
        a, colors = maps[layer, head], pixels(browser, "map-1")
        for query in range(T):
            for key in range(T):
                if key > query:
                    assert colors[query][key] == masked
                else:
                    assert (colors[query][key] == zero) is (a[query, key].item() == 0), (query, key)
    # the sink of softmax is brighter than another key of its row; nothing in it is an exact zero
    for row in pixels(browser, "map-0")[3:]:
        assert row[0][1] > row[2][1]
        assert row[2] != zero
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_sinks_by_position_and_knockout(browser, tmp_path):
    """The tables name tokens and show the numbers; the chart follows its controls."""
    report = make_report()
    opened(browser, tmp_path, report)
    cells = (
        "return [...document.querySelectorAll(arguments[0] + ' tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    rows = browser.execute_script(cells, "#tokens")
    sink = report["runs"][0]["measurements"]["sink"]
    first = sink["by_token"][0]
    assert first["token_id"] == 1
    assert rows[0][0] == "softmax"
    assert "script" in rows[0][1]
    assert rows[0][1].endswith("(1)")
    assert float(rows[0][2].removesuffix(" %")) == pytest.approx(first["strongest"], rel=5e-3)
    assert float(rows[0][3].removesuffix(" %")) == pytest.approx(first["rate"]["0.3"], rel=5e-3)
    assert float(rows[0][7]) == pytest.approx(first["alpha"], rel=5e-3)
    assert len([r for r in rows if r[0] == "softmax"]) == min(8, len(sink["by_token"]))
    assert browser.execute_script(cells, "#knockouts")[0][4:] == ["20", "30 (after 4 tokens)", "+50 %", "21", "+5 %"]
    chart = "return document.querySelector('#positions svg[role=img]').innerHTML"
    before = browser.execute_script(chart)
    for control, value in (
        ("position-metric", "alpha"),
        ("position-weights", "_normalized"),
        ("position-metric", "strongest"),
    ):
        choose(browser, control, value)
        assert browser.execute_script(chart) != before, control
        before = browser.execute_script(chart)
    assert browser.execute_script("return document.getElementById('position-weights').disabled")
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_top_activations_and_histograms(browser, tmp_path):
    report = make_report()
    opened(browser, tmp_path, report)
    cells = "return [...document.querySelectorAll('#tops tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    rows, layers = browser.execute_script(cells), report["runs"][0]["measurements"]["hidden"]["per_layer"]
    assert len(rows) == 2 * 3 * LAYERS
    top = layers[0]["top"][0]
    assert float(rows[0][1].replace("−", "-").replace(",", "")) == pytest.approx(top["value"], rel=5e-3)
    assert rows[0][2:5] == [str(top[k]) for k in ("layer", "sample", "position")]
    assert rows[0][5].endswith(f"({top['token_id']})")
    assert rows[0][6] == str(top["channel"])
    # massive activations are found or said to be none; outlier features likewise
    massive = browser.execute_script("return document.querySelectorAll('#massive tbody tr').length")
    assert massive == sum(len(r["measurements"]["hidden"]["massive"]["list"]) for r in report["runs"])
    features = browser.execute_script("return document.querySelectorAll('#features tbody tr').length")
    assert features == sum(len(r["measurements"]["hidden"]["outlier_features"]["list"]) for r in report["runs"])
    # bars of row mass: softmax's rows are all in the last bin
    bars = "return [...document.querySelectorAll('#context .bar')].slice(0, 40).map(b => +b.getAttribute('height'))"
    heights = browser.execute_script(bars)
    softmax, softpick = heights[0::2], heights[1::2]
    assert max(softmax[:19]) == 0 < softmax[19]
    want = [
        sum(n)
        for n in zip(
            *(c["mass_histogram"] for c in report["runs"][1]["measurements"]["rows"]["by_context"]), strict=True
        )
    ]
    for height, count in zip(softpick, want, strict=True):
        assert height / softmax[19] == pytest.approx(count / sum(want), abs=2e-3)
    choose(browser, "mass-context", 16)
    assert browser.execute_script(bars) != heights
    assert browser.get_log("browser") == []


def audited(run):
    """With what only audits have."""
    channel = {
        "channel": 3, "value": 24926.0, "layer": 1, "from": 0, "to": 1, "rises": 0, "module": "MLP", "cancelled": None,
        "position": 0, "token_id": 1, "first_token_percent": 100.0,
    }  # fmt: skip
    head = {
        "layer": 0, "head": 1, "kind": "no-op", "where": "first", "position": 0, "token_id": 1, "alpha": 0.5,
        "value_ratio": 0.1, "one_direction": 1.0, "variation": 0.2, "samples": 4,
    }  # fmt: skip
    layer = {
        "name": "a.b",
        "weights": 4,
        "group": 64,
        "schemes": {"int8-tensor": {"sqnr_db": 20.0, "estimate_percent": 3.0}},
    }
    cost = {
        "sequences": 1, "tokens": 8, "perplexity": 9.0, "approximations": ["Simulated."], "layers": [layer],
        "schemes": [{"name": "int8-tensor", "change_percent": 131.7}], "kv_cache": [{"bits": 4, "change_percent": 10.2}],
        "keep": [{"scheme": "int8-tensor", "kept": 1, "names": ["a.b"], "change_percent": 4.0, "weights_percent": 2.0}],
        "remedies": [{"scheme": "int8-tensor", "remedy": "prefix", "change_percent": 5.0}],
    }  # fmt: skip
    return run | {
        "verdict": [EVIL], "sinks": {"samples": 4, "heads": [head] * 40}, "cost": cost,
        "outliers": {"samples": 4, "massive": [channel]},
    }  # fmt: skip


@pytest.mark.browser
def test_an_audit(browser, tmp_path):
    report = make_report(audited(make_run("softmax")))
    reference = {
        "key": "zero",
        "label": "Zeros",
        "model": EVIL,
        "text": "99 %",
        "yours": ["0 %"],
        "source": "s",
        "conventions": "c",
    }
    opened(browser, tmp_path, report | {"references": [reference]})
    sections = browser.execute_script("return [...document.querySelectorAll('main section')].map(s => s.id)")
    assert sections[:3] == ["verdict", "summary", "references"]
    assert browser.execute_script("return document.querySelector('#verdict li').textContent") == EVIL
    cells = (
        "return [...document.querySelectorAll(arguments[0] + ' tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    assert browser.execute_script(cells, "#massive-channels")[0][1:6] == ["3", "24,926", "1", "0 to 1", "MLP"]
    assert browser.execute_script(cells, "#cost-schemes")[0][1:] == ["int8-tensor", "+132 %"]
    assert browser.execute_script(cells, "#cost-keep")[0][1:] == ["int8-tensor", "1", "2 %", "+4 %", "a.b"]
    assert browser.execute_script(cells, "#published")[0][1] == EVIL
    # long tables are short until asked
    shown = "return [...document.querySelectorAll('#kinds-of-sinks tbody tr')].filter(r => r.offsetHeight).length"
    assert browser.execute_script(shown) == 12
    browser.execute_script("document.getElementById('kinds-of-sinks-all').click()")
    assert browser.execute_script(shown) == 40
    # the maps open on the strongest sink, with tokens on the axes
    alpha = torch.tensor(report["runs"][0]["measurements"]["sink"]["strongest"]["alpha"])
    at = divmod(int(alpha.argmax()), HEADS)
    chosen = browser.execute_script("return ['map-layer', 'map-head'].map(i => +document.getElementById(i).value)")
    assert tuple(chosen) == at
    labels = "const done = arguments[0]; const frame = requestAnimationFrame;"
    labels += "frame(() => frame(() => done(document.querySelectorAll('#maps .tokens.q').length)))"
    assert browser.execute_async_script(labels) > 5
    assert browser.execute_script("return window.pwned") is None
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_controls_redraw(browser, tmp_path):
    small = 0.4 * make_maps("softpick", 0)  # no weight of 1, or the ranges would be the same
    opened(browser, tmp_path, make_report(make_run("softmax"), make_run("softpick", maps=small)))
    for control, value in (
        ("map-layer", 1),
        ("map-head", 2),
        ("map-sample", 1),
        ("map-range", "own"),
        ("map-curve", "log"),
    ):
        before = image(browser, "map-1")
        choose(browser, control, value)
        assert image(browser, "map-1") != before, control
    heads = "return document.querySelector('#heads .grid').innerHTML"
    before = browser.execute_script(heads)
    choose(browser, "head-metric", 4)
    assert browser.execute_script(heads) != before
    boxes = "return document.querySelector('#hidden svg[role=img]').innerHTML"
    before = browser.execute_script(boxes)
    choose(browser, "box-axis", "linear")
    assert browser.execute_script(boxes) != before
    before = image(browser, "map-1")
    browser.execute_script("document.getElementById('theme').click()")
    assert image(browser, "map-1") != before
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_hover_and_keyboard_name_the_weight(browser, tmp_path):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By

    opened(browser, tmp_path, make_report())
    choose(browser, "map-layer", 0)
    choose(browser, "map-head", 0)
    canvas = in_view(browser, "map-0")
    size = canvas.size["width"]
    query, key = 7, 0
    ActionChains(browser).move_to_element_with_offset(
        canvas, round((key + 0.5) / T * size - size / 2), round((query + 0.5) / T * size - size / 2)
    ).perform()
    tip = browser.find_element(By.ID, "tip").text
    weight = make_maps("softmax", 0)[0, 0, query, key].item()
    assert 'query 7: "t7"' in tip
    assert "key 0: " + json.dumps(EVIL, ensure_ascii=False)[:20] in tip
    assert f"weight: {weight:.4f}" in tip
    canvas.send_keys(Keys.ARROW_DOWN)
    assert 'query 8: "t8"' in browser.find_element(By.ID, "tip").text
    readout = browser.find_element(By.CSS_SELECTOR, ".readout").text
    assert "exactly 0" in readout or f"{make_maps('softpick', 0)[0, 0, 8, 0].item():.4f}" in readout
    assert f"{make_maps('softmax', 0)[0, 0, 8, 0].item():.4f}" in readout
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_a_weight_below_the_quantization_is_not_called_zero(browser, tmp_path):
    from selenium.webdriver import Keys
    from selenium.webdriver.common.by import By

    maps = make_maps("softmax", 0)
    maps[0, 0, 2, 0], maps[0, 0, 3, 0] = 1e-9, 0.0
    opened(browser, tmp_path, make_report(make_run("softmax", maps=maps)))
    choose(browser, "map-layer", 0)
    choose(browser, "map-head", 0)
    canvas = in_view(browser, "map-0")  # the cursor starts at query 1, key 0
    for expected in (r"below 1\.\de-5, not 0", "weight: exactly 0"):
        canvas.send_keys(Keys.ARROW_DOWN)
        assert re.search(expected, browser.find_element(By.ID, "tip").text)


@pytest.mark.browser
def test_reports_with_little_in_them(browser, tmp_path):
    bare = [{"normalizer": "softpick"}, {"normalizer": "softmax", "curves": {"step": [1], "loss": [2.0]}}]
    opened(browser, tmp_path, {"runs": bare})
    assert browser.get_log("browser") == []
    opened(browser, tmp_path, make_report(make_run("softpick"), {"normalizer": "softmax"}))
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_narrow_screen(browser, tmp_path):
    size = {"width": 380, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        opened(browser, tmp_path, make_report())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 380
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
