"""What the server refuses: other hosts, other sites, paths outside, large and strange uploads, requests without its tokens."""

from __future__ import annotations

import io
import pickle
import socket

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from counterpoint import cli
from counterpoint.errors import CounterpointError, DataError
from counterpoint.serve import guard as room
from counterpoint.serve.app import application, bound, site_of
from counterpoint.serve.guard import Guard, token_for
from counterpoint.serve.places import OutsideError, Places
from counterpoint.serve.space import kind_of

from .conftest import BASE, served

PAGES = (
    "/runs",
    "/run/0/runs/first",
    "/claims",
    "/search",
    "/map",
    "/detections",
    "/train",
    "/static/serve.css",
    "/nope",
)


@pytest.mark.parametrize("path", PAGES)
def test_every_answer_has_the_headers_and_no_inline_script(page, path):
    answer = page.get(path)
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["script-src"] == "'self'"
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "set-cookie" not in answer.headers
    if "html" in answer.headers["content-type"]:
        scripts = [tag for tag in answer.text.split("<script")[1:] if "application/json" not in tag.split(">")[0]]
        assert all('src="/static/' in tag.split(">")[0] for tag in scripts)
        assert " onclick=" not in answer.text
        assert "http://" not in answer.text.replace(BASE, "")


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil.example:8377", "[", "10.0.0.1"]
)
def test_a_server_of_this_machine_answers_to_its_own_names_only(page, host):
    answer = page.get("/runs", headers={"host": host})
    assert answer.status_code == 421
    assert "run" not in answer.text


@pytest.mark.parametrize("host", ["localhost", "localhost:9999", "127.0.0.1:8377", "[::1]:8377"])
def test_loopback_names_are_its_own(page, host):
    assert page.get("/runs", headers={"host": host}).status_code == 200


def test_a_server_of_the_network_needs_its_token(project):
    token = token_for("0.0.0.0", None)
    assert token is not None
    assert len(token) >= 32
    site = site_of([project], Guard("0.0.0.0", 8377, token))
    browser = TestClient(application(site), base_url="http://192.168.0.7:8377", follow_redirects=False)
    for path in PAGES:
        assert browser.get(path).status_code == 401
    assert browser.post("/stop", data={"form_token": site.guard.form_token, "name": "x"}).status_code == 401
    for wrong in ("", "x", token[:-1], token + "x", "é"):
        answer = browser.get("/runs", params={"token": wrong})
        assert (answer.status_code, "set-cookie" in answer.headers) == (401, False)
    browser.cookies.set(site.guard.cookie, token)  # the cookie is not the token
    assert browser.get("/runs").status_code == 401
    browser.cookies.clear()
    answer = browser.get("/runs", params={"token": token})
    assert (answer.status_code, answer.headers["location"]) == (303, "/runs")  # without the token
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert token.lower() not in cookie
    assert browser.get("/runs").status_code == 200
    browser.cookies.clear()
    assert browser.get("/runs", headers={"authorization": f"Bearer {token}"}).status_code == 200
    # A foreign name that resolves to this machine gets nothing, even with the token.
    assert browser.get("/runs", params={"token": token}, headers={"host": "evil.example"}).status_code == 421
    # The redirect stays here, whatever the path.
    away = browser.get("http://192.168.0.7:8377//evil.example", params={"token": token})
    assert away.headers["location"] == "/"


def test_tokens_are_compared_in_constant_time(project, monkeypatch):
    compared = []
    original = room.hmac.compare_digest
    monkeypatch.setattr(room.hmac, "compare_digest", lambda a, b: compared.append(a) or original(a, b))
    site = site_of([project], Guard("0.0.0.0", 8377, "t" * 20))
    browser = TestClient(application(site), base_url="http://127.0.0.1:8377")
    browser.get("/runs?token=guess")
    assert b"guess" in compared


def test_tokens_that_are_easy_to_guess_are_refused():
    for weak in ("", "short", "with space in the middle", "ü" * 20):
        with pytest.raises(CounterpointError, match="at least 16"):
            token_for("127.0.0.1", weak)
    assert token_for("127.0.0.1", None) is None
    assert token_for("::1", None) is None
    assert token_for("0.0.0.0", None) != token_for("0.0.0.0", None)


POSTS = ("/search", "/map/labels", "/decide/0/0/film.json", "/train", "/stop", "/resume")


@pytest.mark.parametrize("path", POSTS)
def test_requests_that_change_state_need_the_form_s_token_and_this_origin(page, path):
    own = {"origin": BASE, "x-form-token": page.form}
    for headers in ({}, {"x-form-token": "0" * 64}, {"origin": BASE}):
        assert page.post(path, json={}, headers=headers).status_code == 403
        assert page.post(path, data={"form_token": "guess"}, headers=headers).status_code == 403
    for strange in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ):
        assert page.post(path, json={}, headers=own | strange).status_code == 403
    assert page.post(path, content="x", headers=own | {"content-type": "text/plain"}).status_code == 415
    for body in ("{", "[" * 100_000):
        assert page.post(path, content=body, headers=own | {"content-type": "application/json"}).status_code == 400
    assert page.post(path, json={}, headers=own).status_code in (303, 400, 404)  # it is read, and has no valid content
    assert page.get(path).status_code in (200, 404, 405)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(page, method):
    assert page.browser.request(method, "/runs").status_code == 405


OUTSIDE = [
    "/run/0/../secret.txt",
    "/run/0/..%2f..%2fsecret.txt",
    "/run/0/%2e%2e/secret.txt",
    "/run/0/runs/leaving",
    "/live/0/runs/leaving",
    "/run/0//etc",
    "/run/1/runs/first",
    "/run/0/runs/first%00",
    "/comparisons/0/leaving.json",
    "/comparisons/0/table.csv",
    "/detection/0/0/leaving.json",
    "/detection/7/0/film.json",
    "/video/1/0/film.json",
    "/video/0/0/table.csv",
    "/export/0/../secret.json",
    "/search?in=0/../secret.json",
    "/map/points?in=/etc/passwd",
    "/map/item?in=0/items.parquet&row=99999",
    "/map/item?in=0/items.parquet&row=-1",
    "/item/test/9999/image?in=0/items.parquet",
    "/item/__class__/0/image?in=0/items.parquet",
    "/static/..%2fapp.py",
    "/static/%2e%2e/app.py",
    "/job/..%2f..%2fsecret",
    "/compare?run=0/runs/first&run=0/runs/leaving",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_paths_never_leave_the_folders(page, path):
    answer = page.get(path)
    assert answer.status_code in (400, 404)
    assert "root:" not in answer.text
    assert ">secret<" not in answer.text


def test_settings_and_data_may_not_name_paths_outside(project):
    places = Places([project])
    places.check_words(f"manifest:{project}/table.csv?size=16")
    places.check_words("digits?train=10 glyphs:codicon timm:resnet18 a.b/c 1e-3")
    for words in (
        "manifest:/etc/passwd",
        "imagefolder:../..",
        "~/x",
        "run:/nowhere",
        f"manifest:{project}/../secret.txt",
        "a=\\x",
    ):
        with pytest.raises(OutsideError):
            places.check_words(words)
    for slug, more in {"clip": {"data": "manifest:/etc/passwd"}, "simclr": {"settings": "encoder=hf:/etc"}}.items():
        page = served(project)
        answer = page.post("/train", data={"form_token": page.form, "system": slug, "name": "x", **more})
        assert answer.status_code == 400
        assert "outside the folders" in answer.text or "no such file" in answer.text
        assert page.site.jobs.all() == []


def test_uploads_are_bounded_by_size(page, monkeypatch):
    monkeypatch.setattr(room, "UPLOAD", 1000)
    monkeypatch.setattr(room, "BODY", 500)
    own = {"x-form-token": page.form}
    files = {"file": ("a.png", b"x" * 2000, "image/png")}
    assert page.post("/search", data={"form_token": page.form}, files=files).status_code == 413

    def chunks():  # without an announced length
        for _ in range(50):
            yield b"x" * 100

    kind = {"content-type": "application/x-www-form-urlencoded"}
    assert page.post("/search", content=chunks(), headers=own | kind).status_code == 413
    assert page.post("/stop", content=b"x" * 600, headers=own | kind).status_code == 413
    assert page.post("/stop", content=b"", headers=own | kind | {"content-length": "-1"}).status_code == 413


class Trap:
    """An object whose pickle would raise the alarm when it is loaded."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_uploads_are_bounded_by_type_and_no_pickle_is_loaded(page):
    array = io.BytesIO()
    np.save(array, np.array([Trap()], object), allow_pickle=True)
    for content in (
        pickle.dumps(Trap()),
        array.getvalue(),
        b"#EXTM3U\nfile:///etc/passwd",
        b"<svg/>",
        b"%PDF-1.7",
        b"",
    ):
        with pytest.raises(DataError, match="no picture"):
            kind_of(content)
        answer = page.post("/search", data={"form_token": page.form}, files={"file": ("a.png", content, "image/png")})
        assert answer.status_code == 400
    # A picture in name and first bytes only, and one that would fill the memory.
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    for content in (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, bomb.getvalue(), b"RIFF\0\0\0\0WAVE" + b"\0" * 50):
        answer = page.post("/search", data={"form_token": page.form}, files={"file": ("a", content)})
        assert answer.status_code == 400
        assert 'role="alert"' in answer.text


def test_words_of_a_search_never_name_a_file(page, project):
    picture = project / "items" / "red0.png"
    answer = page.post("/search", data={"form_token": page.form, "words": str(picture), "modality": "image"})
    assert answer.status_code == 200  # words, which the run's tokenizer reads
    long = page.post("/search", data={"form_token": page.form, "words": "x" * 3000})
    assert (long.status_code, "at most 2,000 characters" in long.text) == (400, True)
    assert "&lt;" in page.post("/search", data={"form_token": page.form, "words": "<script>alert(1)</script>"}).text


def test_no_module_of_the_room_reads_pickles():
    from counterpoint import serve

    for file in (path for path in serve.__path__ for path in __import__("pathlib").Path(path).glob("*.py")):
        text = file.read_text()
        assert not any(word in text for word in ("import pickle", "torch.load", "allow_pickle", "shell=True", "eval("))


def test_the_command_refuses_what_it_cannot_serve(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    for words, expected in {
        ("nowhere",): "is not a folder",
        (".", "--port", "70000"): "--port must be 0 to 65535",
        (".", "--token", "short"): "at least 16",
        (".", "--out", "/"): "outside the folders",
        (".", "--port", str(taken.getsockname()[1])): "choose another with --port",
        (".", "--host", "no.such.host.invalid"): "cannot listen on",
    }.items():
        assert cli.main(["serve", *words]) == 2
        assert expected in capsys.readouterr().err
    taken.close()
    free = bound("127.0.0.1", 0)
    assert free.getsockname()[0] == "127.0.0.1"
    free.close()
