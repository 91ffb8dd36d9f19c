"""Fetching: img2dataset under guard, against a server on loopback that does everything wrong."""

import http.server
import io
import json
import math
import os
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from email.message import Message
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import data
import evaluate
import train
from glip import InputError
from nanoglip.config import parse
from nanoglip.sources import fetch, shards
from tests.test_shards import left_by_kill, make_shards

pytestmark = pytest.mark.slow  # it trains, kills or fetches

ROOT = Path(__file__).parent.parent
needs_img2dataset = pytest.mark.skipif(
    find_spec("imghdr") is None, reason="img2dataset does not import on Python 3.13"
)


@lru_cache
def picture(form="JPEG", size=(40, 30)):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def bomb():
    """A PNG of 30,000 x 30,000 black pixels, written without ever having them."""
    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    rows = zlib.compressobj()
    packed = b"".join(rows.compress(bytes(1 + 30_000)) for _ in range(30_000)) + rows.flush()
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


OPTED_OUT = [  # every form of X-Robots-Tag that concerns us
    ["noai"], ["noindex, noai"], ["max-image-preview: large, noai"], ["img2dataset: noai"],
    ["unavailable_after: 25 Jun 2030 15:00:00 PST, noimageai"], ["all", "noimageai"], ["NOAI"],
    ["otherbot: nofollow", "nanoglip: noai"], ["noml"], ["none"], ["*: noindex"],
    ["otherbot: noindex, img2dataset: noai"], ["noai; noindex"], ["noarchive noai"],
    ["unavailable_after: Wed, 25 Jun 2030 15:00:00 GMT, noai"], ["max-foo: 3, noai"],
    ["unavailable_after: Friday, 25-Jun-30 15:00:00 UTC, noimageai"], ["nanoglip/1.0: noai"],
    ["nofollow, max-snippet: -1, noindex"], ['"noai"'], ["'noindex','noai'"], ["noai=1"],
    ['img2dataset: "noai"'], ["noai: true"],
]  # fmt: skip
ALLOWED = [["all"], ["otherbot: noai"], ["max-image-preview: large"], ["nofollow"], ["noarchive"],
           ["otherbot: noindex, noai"], ["unavailable_after: 25 Jun 2030 15:00:00 PST"],
           ["max-snippet: 20, max-video-preview: 3"], ["otherbot/2.1: none"]]  # fmt: skip


class Web(http.server.BaseHTTPRequestHandler):
    """The Internet, small."""

    protocol_version = "HTTP/1.1"
    asked, flaky = [], set()

    def do_GET(self):
        self.asked.append((self.path, self.headers.get("User-Agent")))
        name, _, number = self.path.partition("?")[0].strip("/").partition("/")
        getattr(self, f"send_{name}", self.send_missing)(number)

    def answer(self, content, status=200, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def send_good(self, number):
        form = ("JPEG", "PNG", "WEBP")[int(number) % 3]
        self.answer(picture(form, (300, 400) if int(number) < 6 else (40, 30)))

    def send_missing(self, number):
        self.answer(b"no", 404)

    def send_html(self, number):
        self.answer(b"<html>hello</html>")

    def send_torn(self, number):
        self.answer(picture()[:-40])

    def send_short(self, number):
        content = picture()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:100])
        self.close_connection = True

    def send_slow(self, number):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(100):  # each byte in time, all of them never
            self.wfile.write(b"x")
            time.sleep(0.2)

    def send_trickle(self, number):
        for _ in range(100):
            self.wfile.write(b"H")
            time.sleep(0.2)

    def send_huge(self, number):
        self.send_response(200)
        self.end_headers()
        for _ in range(40):
            self.wfile.write(bytes(2**20))
        self.close_connection = True

    def send_claims(self, number):
        self.send_response(200)
        self.send_header("Content-Length", str(2**40))
        self.end_headers()

    def send_abroad(self, number):
        self.answer(b"", 302, Location="/good/2?\u00e4".encode().decode("latin-1"))

    def send_nowhere(self, number):
        self.answer(b"", 302)

    def send_garbage(self, number):
        self.wfile.write(b"\0\xff" * 100 + b"\r\n\r\n")
        self.close_connection = True

    def send_hangs_up(self, number):
        self.close_connection = True

    def send_bomb(self, number):
        self.answer(BOMB)

    def send_to(self, target):
        self.answer(b"", 302, Location=target.replace("COLON", ":"))

    def send_fat(self, number):
        """A redirect with a body without end, which nobody has to read."""
        self.send_response(302)
        self.send_header("Location", "/good/1")
        self.send_header("Content-Length", str(2**40))
        self.end_headers()
        for _ in range(1000):
            self.wfile.write(bytes(2**20))

    def send_closed(self, number):
        self.answer(b"", 302, Location="/good/1", X_Robots_Tag="noai")

    def send_optout(self, number):
        self.send_tagged(OPTED_OUT[int(number)])

    def send_allowed(self, number):
        self.send_tagged(ALLOWED[int(number)])

    def send_tagged(self, tags):
        content = picture()
        self.send_response(200)
        for tag in tags:
            self.send_header("X-Robots-Tag", tag)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def send_tdm(self, number):
        self.answer(picture(), TDM_Reservation="1")

    def send_usage(self, number):
        self.answer(picture(), Content_Usage="search=y, train-ai=n")

    def send_flaky(self, number):
        if number in self.flaky:
            return self.send_good("0")
        self.flaky.add(number)
        return self.answer(b"later", 503)

    def send_dead(self, number):
        if DEAD:
            return self.answer(b"gone", 410)
        return self.send_good("1")

    def log_message(self, *words):
        pass


DEAD = [True]
BOMB = bomb()


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *words):  # clients leave in the middle: that is what is tested
        pass


@pytest.fixture(scope="module")
def web():
    server = Server(("127.0.0.1", 0), Web)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def private():
    """A service that nobody outside may reach; it notes who did."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.01)
    yield listener
    with pytest.raises(TimeoutError):
        listener.accept()
    listener.close()


def write_tsv(path, rows, url_first=True):
    lines = ["\t".join(row if url_first else row[::-1]) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


# --- the guard alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("tags", OPTED_OUT + ALLOWED, ids=str)
def test_opt_outs_in_every_form(tags):
    headers = Message()
    for tag in tags:
        headers["X-Robots-Tag"] = tag
    assert fetch.opted_out(headers) == (tags in OPTED_OUT)


@pytest.mark.parametrize(("name", "value", "out"), [
    ("TDM-Reservation", "1", True), ("tdm-reservation", "0", False),
    ("TDM-Reservation", "1, 1", True), ("TDM-Reservation", '"1"', True),
    ("TDM-Reservation", "1; policy=x", True), ("TDM-Reservation", "0, 1", True),
    ("TDM-Reservation", "true", True), ("TDM-Reservation", '"0"; policy=x', False),
    ("Content-Usage", 'train-ai="n"', True), ("Content-Usage", "train-ai = n", True),
    ("Content-Usage", "train-ai=n", True), ("Content-Usage", "search=n", False),
    ("Content-Usage", "Search=y,Train-AI=n;p=1", True), ("Content-Usage", "train-ai=y", False),
])  # fmt: skip
def test_opt_outs_in_other_headers(name, value, out):
    headers = Message()
    headers[name] = value
    assert fetch.opted_out(headers) == out


@pytest.mark.parametrize(("url", "asked"), [
    ("HTTP://example.org/a b.jpg", "HTTP://example.org/a%20b.jpg"),
    (" http://b\u00fccher.example:80/\u00e4?q=\u00f6#x", "http://xn--bcher-kva.example:80/%C3%A4?q=%C3%B6#x"),
    ("https://me:pw@fa\u00df.de/@x", "https://me:pw@xn--fa-hia.de/@x"),
    ("http://\u4f8b\u3048.\u30c6\u30b9\u30c8", "http://xn--r8jz45g.xn--zckzah"),
    ("http://[::1]:8/x", "http://[::1]:8/x"), ("http://x.example/?u=http://\u00e4.de/",
                                              "http://x.example/?u=http://%C3%A4.de/"),
])  # fmt: skip
def test_international_urls_are_asked_for_in_ascii(url, asked):
    assert fetch.ascii_url(url) == asked


@pytest.mark.parametrize(("address", "public"), [
    ("8.8.8.8", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False),
    ("169.254.169.254", False), ("192.168.0.1", False), ("100.64.0.1", False), ("0.0.0.0", False),
    ("224.0.0.1", False), ("255.255.255.255", False), ("::1", False), ("fe80::1%eth0", False),
    ("fd00::1", False), ("::ffff:10.0.0.1", False), ("64:ff9b::a00:1", False),
    ("2002:a00:1::", False), ("fec0::1", False), ("3fff::1", False), ("192.88.99.1", False),
    ("::ffff:8.8.8.8", True), ("64:ff9b::808:808", True),
])  # fmt: skip
def test_private_addresses_in_every_form(address, public):
    assert fetch.is_public(address) == public


def reason(web, url, seconds=2.0):
    guard = fetch.Guard(seconds, 0, "me@example.org", frozenset([web]))
    return guard.download((0, url))[2]


def test_what_is_refused_and_why(web, private):
    port = private.getsockname()[1]
    cases = (
        (f"http://{web}/missing", "HTTP 404"), (f"http://{web}/html", "not a picture"),
        (f"http://{web}/torn", "torn picture"), (f"http://{web}/short", "cut short"),
        (f"http://{web}/slow", "timed out"), (f"http://{web}/trickle", "timed out"),
        (f"http://{web}/closed", "opted out"), (f"http://{web}/huge", "over 33,554,432 bytes"),
        (f"http://{web}/claims", "over 33,554,432 bytes"),
        (f"http://{web}/bomb", "over 67,108,864 pixels, or none"),
        (f"http://{web}/tdm", "opted out"), (f"http://{web}/usage", "opted out"),
        (f"http://127.0.0.1:{port}/", "private address"),
        (f"http://localhost:{port}/", "private address"),
        (f"http://[::1]:{port}/", "private address"),
        (f"http://{web}@127.0.0.1:{port}/", "private address"),
        (f"http://{web}/to/httpCOLON//127.0.0.1:{port}/", "private address"),
        (f"http://{web}/to/fileCOLON///etc/passwd", "not http or https"),
        (f"http://{web}/to/ftpCOLON//127.0.0.1:{port}/", "not http or https"),
        ("http://\u2460\u2461\u2466.0.0.1/x.jpg", "private address"),  # 127 in circles
        ("http://a\uff0fb.\u00e4.invalid/", "unknown host"),
        ("file:///etc/passwd", "not http or https"), ("ftp://a.org/x.jpg", "not http or https"),
        ("", "not http or https"), (None, "not http or https"), ("http://", "unknown host"),
        ("http://nosuch.invalid/x.jpg", "unknown host"), ("http://[bad", "ValueError"),
        (f"http://{web}/to/http", "too many redirects"), (f"http://{web}/nowhere", "HTTP 302"),
        (f"http://{web}/garbage", "BadStatusLine"),
        (f"http://{web}/hangs_up", "RemoteDisconnected"),
        (f"http://{web}/good/1?a=b c#d", None), (f"HTTP://{web}/good/1", None),
        (f"http://me:pw@{web}/good/1", None), (f"http://{web}/fat", None),
        (f"http://{web}/abroad", None),
    )  # fmt: skip
    begun = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(partial(reason, web), [url for url, _ in cases]))
    assert time.monotonic() - begun < 6  # each has two seconds
    for (url, why), answer in zip(cases, found, strict=True):
        assert answer == why, url
    agents = {agent for path, agent in Web.asked if path.startswith("/good/1")}
    assert agents == {"nanoGLIP/1.0 (image-text research; img2dataset 1.47.0; me@example.org)"}
    assert {"/good/1", "/good/1?a=b%20c", "/good/2?%C3%A4"} <= {path for path, _ in Web.asked}


def test_one_deadline_is_for_all_tries(web):
    guard, begun = fetch.Guard(1.0, 5, "", frozenset([web])), time.monotonic()
    assert guard.download((0, f"http://{web}/slow"))[2] == "timed out"
    assert time.monotonic() - begun < 2
    assert guard.download((0, f"http://{web}/flaky/a"))[2] is None  # the second try
    with socket.create_server(("127.0.0.1", 0)) as full:  # answers nobody
        host = f"127.0.0.1:{full.getsockname()[1]}"
        begun = time.monotonic()
        assert reason(host, f"http://{host}/", 0.5) == "timed out"
        assert time.monotonic() - begun < 2


def test_a_host_that_is_looked_up_for_long_is_left(web, monkeypatch):
    """The look-up cannot be interrupted; nothing is asked for when it ends after all."""
    answered, known = threading.Event(), socket.getaddrinfo

    def slow(*words, **settings):
        answered.wait(5)
        return known(*words, **settings)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    begun, before = time.monotonic(), len(Web.asked)
    guard = fetch.Guard(0.2, 0, "", frozenset([web]))
    assert guard.download((0, f"http://{web}/good/1"))[2] == "timed out"
    assert time.monotonic() - begun < 1
    answered.set()
    time.sleep(0.3)
    assert len(Web.asked) == before


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate")
def test_https_is_guarded_alike(private, tmp_path, monkeypatch):
    """Certificates are checked, and the deadline, opt-outs and redirects count behind TLS too."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server = Server(("127.0.0.1", 0), Web)
    server.daemon_threads = True
    server.socket = context.wrap_socket(server.socket, True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    web, closed = f"localhost:{server.server_port}", f"127.0.0.1:{private.getsockname()[1]}"
    assert reason(web, f"https://{web}/good/1") == "SSLCertVerificationError"
    trusting = ssl.create_default_context(cafile=tmp_path / "cert.pem")
    monkeypatch.setattr(fetch, "TLS", trusting)
    assert reason(web, f"https://{web}/good/1") is None
    for name, why in (("optout/0", "opted out"), ("slow", "timed out"),
                      (f"to/httpsCOLON//{closed}/", "private address")):  # fmt: skip
        assert reason(web, f"https://{web}/{name}", 1.0) == why
    server.shutdown()
    with socket.create_server(("127.0.0.1", 0)) as mute:  # never shakes hands
        host = f"127.0.0.1:{mute.getsockname()[1]}"
        assert reason(host, f"https://{host}/", 0.5) == "timed out"


# --- the command --------------------------------------------------------------------------------


def all_rows(web, port):
    """A list with everything in it: (URL, caption) and whether it is got."""
    rows = [((f"http://{web}/good/{n}", f'a "good" picture {n}'), True) for n in range(9)]
    rows += [((f"http://{web}/allowed/{n}", "allowed"), True) for n in range(len(ALLOWED))]
    rows += [((f"http://{web}/optout/{n}", "no"), False) for n in range(len(OPTED_OUT))]
    rows += [((f"http://{web}/{name}", name), False) for name in
             ("missing", "html", "torn", "short", "slow", "bomb", "tdm")]  # fmt: skip
    rows += [((f"http://{web}/to/httpCOLON//127.0.0.1:{port}/", "private"), False)]
    rows += [((f"http://127.0.0.1:{port}/x.jpg", "private"), False)]
    rows += [((f"http://{web}/dead/{n}", f"dead {n}"), False) for n in range(3)]
    return rows


@needs_img2dataset
def test_full_circle(web, private, tmp_path, capsys):
    """List, fetch with the real img2dataset, index, train, evaluate, as the README does."""
    rows = all_rows(web, private.getsockname()[1])
    rows += [((f"http://{web}/good/{n}", f"more of picture {n}"), True) for n in range(9, 60)]
    path = write_tsv(tmp_path / "list.tsv", [row for row, _ in rows], url_first=False)
    path.write_text(path.read_text() + "no URL\nno caption\t\n\thttp://a.org/b.jpg\n")
    out, got = tmp_path / "cc3m", sum(good for _, good in rows)
    config = fetch.FetchConfig(
        "cc3m", path, out, processes=1, threads=16, timeout=4.0, retries=1, shard_size=50,
        allow_host=(web,),
    )  # fmt: skip
    assert fetch.fetch(config)["got"] == got
    printed = capsys.readouterr().out
    assert f"expected {len(rows)} pairs, got {got} ({got / len(rows):.1%})" in printed
    for why, count in (("opted out", len(OPTED_OUT) + 1), ("private address", 2), ("HTTP 410", 3),
                       ("timed out", 1), ("rows without a URL", 2),
                       ("rows without a caption", 1)):  # fmt: skip
        assert f"{count:>10,}  {why}\n" in printed, printed
    assert "not for redistribution" in printed
    assert not (out / "_tmp").exists() and not list(tmp_path.rglob("wandb*"))
    # Ratio kept, no border, no enlarging.
    with tarfile.open(out / "00000.tar") as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                image = Image.open(io.BytesIO(tar.extractfile(member).read()))
                assert min(image.size) == 256 or image.size == (30, 40)
    # What failed, once more, into shards of its own.
    DEAD.clear()
    done = fetch.fetch(replace(config, retry_failed=True, timeout=2.0))
    DEAD.append(True)
    assert done["got"] == got + 3 and done["reasons"]["opted out"] == len(OPTED_OUT) + 1
    import pyarrow.parquet as pq

    second = pq.read_table(out / f"{-(-len(rows) // 50):05}.parquet").to_pylist()
    assert len(second) == len(rows) - got - len(OPTED_OUT) - 1
    assert not any("optout" in row["url"] or "good" in row["url"] for row in second)
    capsys.readouterr()
    data.index(data.IndexConfig(str(out), 1))
    assert f"{got + 3} pairs" in capsys.readouterr().out
    source = shards.Shards(str(out), 16)
    assert len(source) == got + 3
    assert 'a " good " picture 3' in source.texts(range(len(source)))
    train.train(parse([
        "--data", str(out), "--out", str(tmp_path / "run"), "--steps", "3", "--batch-size", "16",
        "--tune-batch-size", "16", "--workers", "0", "--model", "ViT-nano-8", "--image-size", "16",
    ]))  # fmt: skip
    assert re.search(r"an epoch is 4 steps of 16 = 64, \d+ left over", capsys.readouterr().out)
    evaluate.run_evaluation(evaluate.EvaluateConfig(str(tmp_path / "run")))
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["counts"]["held-out pictures"] == len(source.held)
    assert results["config"]["data"] == "cc3m"


@needs_img2dataset
def test_a_killed_fetch_resumes(web, tmp_path):
    """kill -9 of the command alone: its workers end too, and the next start fetches what is left.

    While it is at work, a second one is refused. A shard whose tar is deleted is fetched again.
    """
    rows = [(f"http://{web}/good/{n}?{n}", f"picture number {n}") for n in range(15)]
    rows[0] = (rows[0][0].replace("http", "HTTP"), rows[0][1])
    rows[11] = (f"http://{web}/slow/11", "holds the third shard")
    path = write_tsv(tmp_path / "list.tsv", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a BOM
    out = tmp_path / "out"
    again = fetch.FetchConfig(
        "cc12m", path, out, shard_size=5, processes=1, threads=8, timeout=1.0, allow_host=(web,)
    )
    process = subprocess.Popen(
        [sys.executable, "data.py", "fetch", "cc12m", "--list", path, "--out", out, "--shard-size",
         "5", "--threads", "8", "--processes", "1", "--timeout", "60", "--allow-host", web],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    limit = time.monotonic() + 120
    while not (out / "00002.tar").exists() and time.monotonic() < limit:
        time.sleep(0.01)
    with pytest.raises(InputError, match=f"process {process.pid} .*is fetching into it"):
        fetch.fetch(again)
    assert not left_by_kill(process)
    assert shards.finished_shards(out).keys() == {"00000", "00001"}
    other = write_tsv(tmp_path / "other.tsv", rows[:9])
    with pytest.raises(InputError, match="is of another list"):
        fetch.fetch(replace(again, list=other))
    (out / "notes_stats.json").write_text('{"successes": 7}')  # another program's
    (out / "00002_stats.json").write_text('{"successes": "7"')  # torn
    (out / "00001.tar").unlink()
    first = (out / "00000.tar").stat().st_mtime_ns
    done = fetch.fetch(again)
    assert (done["expected"], done["got"], done["reasons"]) == (15, 14, {"timed out": 1})
    assert (out / "00000.tar").stat().st_mtime_ns == first
    shards.build(str(out), 1)
    source = shards.Shards(str(out), 16)
    texts = [text.replace(" ", "") for text in source.texts(range(len(source)))]
    assert sorted(texts) == sorted(f"picturenumber{n}" for n in range(15) if n != 11)
    before = {p: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    assert fetch.fetch(again) == done  # nothing to do
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    # What is damaged is told with its name, and nothing is fetched or written over.
    (out / "00002.parquet").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"00002.parquet cannot be read .* remove 00002.tar"):
        fetch.fetch(replace(again, retry_failed=True))
    plan = json.loads((out / "fetch.json").read_text())
    for content in ("{", "[]", "{}", json.dumps(plan | {"rounds": [{"start": "0"}]})):
        (out / "fetch.json").write_text(content)
        with pytest.raises(InputError, match=r"fetch.json is damaged"):
            fetch.fetch(again)
        assert (out / "fetch.json").read_text() == content


@pytest.mark.parametrize("name", ["cc3m", "cc12m"])
def test_a_list_is_read_in_either_order(name, tmp_path):
    rows = [("http://a.org/1 2.jpg", '"one  two'), ("HTTPS://a.org/\xe9", "see http://b.org")]
    for url_first in (True, False):
        path = write_tsv(tmp_path / "list.tsv", rows, url_first)
        fetch.check_list(path, name)
        assert list(fetch.pairs_of(path, name)) == [(rows[0][0], '"one two'), rows[1]]
    url_first = name == "cc12m"  # where a caption may be one
    path = write_tsv(tmp_path / "list.tsv", [("http://a.org/1.jpg", "http://b.org")], url_first)
    assert list(fetch.pairs_of(path, name)) == [("http://a.org/1.jpg", "http://b.org")]


def test_python_without_img2dataset_is_told(tmp_path, monkeypatch):
    path = write_tsv(tmp_path / "list.tsv", [("http://example.org/a.jpg", "a")])
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"img2dataset needs Python 3\.12 or older"):
        fetch.fetch(fetch.FetchConfig("cc12m", path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@needs_img2dataset
def test_bad_lists_are_told(tmp_path):
    config = fetch.FetchConfig
    for name, content, words in (
        ("none.tsv", None, "cannot be read"),
        ("void.tsv", "", "in 0 of its first 0 rows"),
        ("words.tsv", "a\tb\n" * 9, "in 0 of its first 9 rows; .* a TSV with URL, then caption"),
        ("urls.tsv", "http://example.org/a.jpg\n" * 5, "in 0 of its first 5 rows"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=words):
            fetch.fetch(config("cc12m", tmp_path / name, tmp_path / "out"))
    os.mkfifo(tmp_path / "pipe.tsv")
    with pytest.raises(InputError, match=r"pipe.tsv: cannot be read \(not a regular file\)"):
        fetch.fetch(config("cc12m", tmp_path / "pipe.tsv", tmp_path / "out"))
    good = write_tsv(tmp_path / "good.tsv", [("http://example.org/a.jpg", "a")])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/0.tar").write_bytes(b"")
    with pytest.raises(InputError, match="not of a fetch"):
        fetch.fetch(config("cc12m", good, tmp_path / "full"))
    for flag, value in (
        ("timeout", 0.0), ("timeout", math.nan), ("timeout", math.inf),
        ("contact", "me\n@example.org"), ("contact", "\u043c\u0435@example.org"), ("threads", -1),
        ("processes", -1), ("retries", -1), ("shard_size", 0),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"--{flag.replace('_', '-')} "):
            fetch.fetch(config("cc12m", good, tmp_path / "x", **{flag: value}))
    assert not (tmp_path / "x").exists()


def test_the_command_line_tells(tmp_path, monkeypatch, capsys):
    for words, told in (([], "fetch cc3m|cc12m"), (["index", tmp_path / "no"], "no such folder"),
                        (["index", tmp_path], "no finished .tar shard")):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            data.main()
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and told in err and "Traceback" not in err


# --- the snapshot -------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """A stand-in of the hub: one repository of tars, and a connection that breaks once."""

    protocol_version = "HTTP/1.1"
    files, breaks, sent = {}, [], []
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/pixparse/cc3m-wds/tree/"):
            rows = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40}
                    for n, c in self.files.items()]  # fmt: skip
            return self.answer(json.dumps(rows).encode(), body)
        if path.startswith("/api/datasets/pixparse/cc3m-wds"):
            siblings = [{"rfilename": name} for name in self.files]
            about = {"id": "pixparse/cc3m-wds", "sha": self.commit, "siblings": siblings,
                     "private": False, "tags": [], "downloads": 0}  # fmt: skip
            return self.answer(json.dumps(about).encode(), body)
        content = self.files.get(path.rpartition("/")[2])
        if content is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        return self.answer(content, body, path.rpartition("/")[2])

    def answer(self, content, body, name=None):
        first, asked = 0, self.headers.get("Range", "")
        if name and asked.startswith("bytes="):
            first = int(asked[6:].partition("-")[0])
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("Content-Type", "application/json" if not name else "application/x-tar")
        if name:
            self.send_header("ETag", f'"{name}-{len(content)}"')
            self.send_header("X-Repo-Commit", self.commit)
            self.send_header("Accept-Ranges", "bytes")
            if first:
                total = len(content)
                self.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
        self.end_headers()
        if body and name and name in self.breaks:
            self.breaks.remove(name)
            self.wfile.write(content[first : len(content) // 2])
            self.close_connection = True
        elif body:
            self.sent.append((name, len(content) - first))
            self.wfile.write(content[first:])

    def log_message(self, *words):
        pass


def test_a_snapshot_is_brought_and_counted(tmp_path):
    published = make_shards(tmp_path / "published", 3, 20)
    Hub.files = {f"cc3m-train-{p.stem}.tar": p.read_bytes() for p in published.glob("*.tar")}
    Hub.files |= {"cc3m-validation-0000.tar": b"not asked for", "README.md": b"words"}
    Hub.breaks = ["cc3m-train-00001.tar"]
    server = Server(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    code = (
        "import sys, data\n"
        "from pathlib import Path\n"
        "for name in ('cc3m', 'cc3m', 'cc12m'):\n"
        "    try:\n"
        "        data.snapshot(data.SnapshotConfig(name, Path(sys.argv[1]) / name, 1))\n"
        "    except data.InputError as error:\n"
        "        print(f'refused {name}: {error}')\n"
        "sys.argv = ['data.py', 'snapshot', 'cc12m', '--out', sys.argv[2]]\n"
        "data.main()\n"
    )
    out = tmp_path / "cc3m"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, tmp_path / "published"],  # where shards are already
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "resumes" in done.stderr.splitlines()[-1], done.stderr[-3000:]
    assert done.stderr.splitlines()[-1].startswith("data.py: pixparse/cc12m-wds: ")
    first, *_, last = done.stdout.splitlines()
    # The broken connection may end the first: the same command resumes.
    assert not first.startswith("refused") or "resumes" in first
    assert last.startswith("refused cc12m: pixparse/cc12m-wds: ") and "resumes" in last
    assert sorted(p.name for p in out.glob("*.tar")) == [
        f"cc3m-train-0000{n}.tar" for n in range(3)
    ]
    assert all(p.read_bytes() == Hub.files[p.name] for p in out.glob("*.tar"))
    assert "cc3m: 60 of 2,905,954 published pairs" in done.stdout
    assert "state it beside every result" in done.stdout
    assert len(data.load(str(out), 16)[0]) == 60
    server.shutdown()


def test_a_picture_with_much_text_beside_it_is_no_torn_one():
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("Comment", "text " * 2**19, zip=True)
    Image.new("RGB", (64, 64), "teal").save(file, "PNG", pnginfo=info)
    fetch.check_picture(file.getvalue())
    with pytest.raises(fetch.Refused, match="torn picture"):
        fetch.check_picture(file.getvalue()[:-60])
