"""Saved networks, the server of the page, and the page itself in headless Chromium."""

import http.client
import json
import os
import queue
import stat
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import jaxprune
from jaxprune import browser, files, models, presets, structure
from jaxprune.browser import _chromium
from tests.support.zoo import filled

ROOT = Path(__file__).parents[2]
MODULES = Path(os.environ.get("JAXPRUNE_MODULES", ROOT / ".venv/browser/node_modules"))
SIZE = 32


def network(seed=0):
    """A thin MobileNet whose values are not trivial, and its variables."""
    widths = models.default_widths("mobilenet_v1", 0.25)
    model = models.mobilenet_v1(
        num_classes=4, widths=widths, padding="SYMMETRIC", rngs=nnx.Rngs(seed)
    )
    graph, state = nnx.split(model)
    model = nnx.merge(graph, filled(state))
    model.eval()
    return model, structure.from_nnx(model, state="model_state").variables


def sparse(variables, sparsity):
    params, _ = jaxprune.prune(variables["params"], sparsity, prunable=presets.pointwise)
    return variables | {"params": params}


def write_images(folder, count=3):
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(count, SIZE, SIZE, 3)).astype(np.float32)
    pixels = draw.integers(0, 256, (count, 8, 8, 1))
    browser.write_images(folder, pixels, inputs, np.arange(count))
    return inputs


# ---- saved networks


@pytest.mark.slow
def test_saved_network_computes_the_same(tmp_path):
    model, variables = network()
    browser.save(tmp_path, "dense", model, sparse(variables, 0.9), {"title": "Dense"})
    loaded, found, facts = browser.load(tmp_path, "dense")
    assert facts == {"title": "Dense"}
    x = write_images(tmp_path)
    wanted = jax.jit(structure.from_nnx(model, state="model_state").evaluate)(
        sparse(variables, 0.9), x
    )
    actual = jax.jit(structure.from_nnx(loaded, state="model_state").evaluate)(found, x)
    assert np.abs(wanted).max() > 1e-3
    np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("name", ["", "a/b", "..\\a", "a b"])
def test_names_that_are_no_file_names_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="`name` must be letters"):
        browser.save(tmp_path, name, None, {}, {})
    assert not [*tmp_path.iterdir()]


def test_images_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"`pixels` has shape \(2, 8, 8\); `inputs` has shape"):
        browser.write_images(tmp_path, np.zeros((2, 8, 8)), np.zeros((3, 8, 8, 3)), [0, 1])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": "resnet8"}, "model"),
        ({"widths": {"stem": 0, "blocks": []}}, "stem"),
        ({"padding": "VALID"}, "padding"),
    ],
)
def test_damaged_description_is_named(change, text, tmp_path):
    model, variables = network()
    browser.save(tmp_path, "dense", model, variables, {})
    path = tmp_path / "dense.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=text) as error:
        browser.load(tmp_path, "dense")
    assert "dense.json" in str(error.value)


# ---- times


def test_summary_compares_with_the_first():
    rows = browser.summary({"dense": [8.0, 4.0, 6.0], "sparse": [2.0, 1.0, 4.0]})
    assert rows["sparse"]["speedup"] == 4.0 and rows["dense"]["speedup"] == 1.0
    assert rows["dense"] == {
        "min": 4.0, "q25": 5.0, "median": 6.0, "speedup": 1.0, "speedup_q25": 1.0
    }  # fmt: skip
    assert rows["sparse"]["speedup_q25"] == pytest.approx(5 / 1.5)


@pytest.mark.parametrize("times", [{}, {"a": []}, {"a": [1.0], "b": [0.0]}])
def test_times_that_are_none_are_refused(times):
    with pytest.raises(ValueError, match="`times` must be positive"):
        browser.summary(times)


# ---- the server


@pytest.fixture
def served(tmp_path):
    """A server of a small folder with a file beside it that is nobody's business."""
    folder, modules = tmp_path / "data", tmp_path / "node_modules"
    (modules / "@litertjs/core/wasm").mkdir(parents=True)
    (modules / "@litertjs/core/wasm/a.wasm").write_bytes(b"wasm")
    folder.mkdir()
    (folder / "networks.json").write_text("{}")
    (tmp_path / "secret.json").write_text("secret")
    (folder / "link.json").symlink_to(tmp_path / "secret.json")
    with browser.serve(folder, modules) as server:
        yield server


def ask(server, method, path, body=None):
    address = server.url.removeprefix("http://").strip("/")
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("path", "kind", "part"),
    [
        ("/", "text/html; charset=utf-8", b"<!doctype html>"),
        ("/?rounds=3", "text/html; charset=utf-8", b"<!doctype html>"),
        ("/measure.js", "text/javascript", b"loadAndCompile"),
        ("/data/networks.json", "application/json", b"{}"),
        ("/litert/core/wasm/a.wasm", "application/wasm", b"wasm"),
    ],
)
def test_server_sends_what_the_page_needs(served, path, kind, part):
    status, headers, content = ask(served, "GET", path)
    assert status == 200 and headers["Content-Type"] == kind and part in content
    # The page may load nothing from elsewhere, and has a precise clock.
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
    assert "http" not in headers["Content-Security-Policy"]
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"


@pytest.mark.parametrize(
    "path",
    [
        "/data/../secret.json", "/data/link.json", "/../secret.json", "/data//etc/passwd",
        "/_serving.py", "/data", "/data/no.json", "/litert/../../secret.json",
    ],
)  # fmt: skip
def test_server_sends_nothing_else(served, path):
    status, _, content = ask(served, "GET", path)
    assert status == 404 and b"secret" not in content and b"import" not in content


def test_server_takes_results_only(served):
    assert ask(served, "POST", "/result", json.dumps({"rounds": 3}))[0] == 200
    assert served.results.get(timeout=10) == {"rounds": 3}
    assert ask(served, "POST", "/other", "{}")[0] == 404
    assert ask(served, "POST", "/result", "{")[0] == 400
    assert ask(served, "POST", "/result", "")[0] == 404
    assert served.results.empty()


def test_folders_without_the_files_are_refused(tmp_path):
    (tmp_path / "networks.json").write_text("{}")
    with (
        pytest.raises(ValueError, match="`modules` .*`npm install @litertjs/core`"),
        browser.serve(tmp_path, tmp_path),
    ):
        pass


# ---- the browser


def fake_browser(monkeypatch, tmp_path, script):
    """Puts a program in the place of Chromium."""
    program = tmp_path / "fake-browser"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(_chromium, "NAMES", ("fake-browser",))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return browser.Server("http://127.0.0.1:9/", queue.SimpleQueue())


def test_missing_browser_says_what_to_install(monkeypatch):
    monkeypatch.setattr(_chromium, "NAMES", ("no-such-browser",))
    with pytest.raises(FileNotFoundError, match="apt-get install chromium"):
        browser.visit(browser.Server("http://127.0.0.1:9/", queue.SimpleQueue()))


def test_browser_that_ends_is_an_error(monkeypatch, tmp_path):
    server = fake_browser(monkeypatch, tmp_path, "exit 7")
    with pytest.raises(RuntimeError, match="ended with code 7"):
        browser.visit(server, seconds=60)


def test_page_that_says_nothing_is_an_error(monkeypatch, tmp_path):
    server = fake_browser(monkeypatch, tmp_path, "exec sleep 60")
    with pytest.raises(TimeoutError, match="sent nothing in 0.1 seconds"):
        browser.visit(server, seconds=0.1)


def test_page_that_fails_is_an_error(monkeypatch, tmp_path):
    server = fake_browser(monkeypatch, tmp_path, "exec sleep 60")
    server.results.put({"error": "no WebAssembly"})
    with pytest.raises(RuntimeError, match="the page failed: no WebAssembly"):
        browser.visit(server, seconds=60)


@pytest.mark.slow
def test_page_measures_networks_and_predicts_what_jax_does(tmp_path):
    pytest.importorskip("litert_converter", reason="LiteRT is missing; see make browser-check")
    if not (MODULES / "@litertjs/core").is_dir():
        pytest.skip("@litertjs/core is missing; see make browser-check")
    try:
        _chromium.find_chromium()
    except FileNotFoundError:
        pytest.skip("Chromium is missing; see make browser-check")
    folder = tmp_path / "networks"
    inputs = write_images(folder)
    model, variables = network()
    wanted = {}
    apply = jax.jit(structure.from_nnx(model, state="model_state").evaluate)
    for name, own in (("dense", variables), ("sparse", sparse(variables, 0.9))):
        browser.save(folder, name, model, own, {"title": name, "accuracy": 0.5})
        wanted[name] = np.argmax(apply(own, inputs), -1).tolist()
    said = []
    records = browser.convert(folder, ["dense", "sparse"], classes=list("abcd"), say=said.append)
    assert [record["sparse_inference"] for record in records] == [False, True]
    assert len(said) == 2
    picture = tmp_path / "page.png"
    with browser.serve(folder, MODULES) as server:
        result = browser.visit(server, "rounds=5", screenshot=str(picture))
    assert result["isolated"], "the clock of the page is not precise"
    # No request left the machine.
    assert result["requests"] and all(own.startswith(server.url) for own in result["requests"])
    for own in result["networks"]:
        assert own["error"] < 1e-5
        assert own["predictions"] == wanted[own["name"]]
        assert len(own["ms"]) == 5 and min(own["ms"]) > 0
    assert picture.read_bytes()[1:4] == b"PNG"
    # Outputs that are not those of JAX are noticed.
    page = files.parse_json((folder / "networks.json").read_bytes())
    page["networks"][1]["logits"][2][0] += 1
    (folder / "networks.json").write_text(json.dumps(page))
    with browser.serve(folder, MODULES) as server:
        result = browser.visit(server, "rounds=1")
    assert [own["error"] > 0.9 for own in result["networks"]] == [False, True]
