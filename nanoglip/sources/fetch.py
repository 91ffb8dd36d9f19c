"""Fetch the pictures of a list of URLs with img2dataset, guarded: `python data.py fetch`.

img2dataset reads, resizes, packs and distributes; what it does to a URL is replaced by Guard:
http(s) only, public addresses only (checked where the connection is made, so after every
redirect), an honest user agent, opt-outs honoured in every form, caps on bytes and pixels, one
deadline for all of a URL, and no picture that is not whole. Its workers are spawned and see nothing
that is changed in the parent; the guard is a part of the Downloader that is sent to them.

Writes to DIR: 00000.tar, 00000.parquet (a row for each URL, with its status), 00000_stats.json
(last: a shard without it is unfinished and made anew), list-0.parquet, and fetch.json.
"""

import contextlib
import http.client
import importlib.util
import io
import ipaddress
import json
import math
import os
import re
import shutil
import socket
import ssl
import sys
import threading
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Literal

import idna
import img2dataset.downloader
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from img2dataset import distributor
from img2dataset.reader import Reader
from img2dataset.resizer import Resizer
from img2dataset.writer import WebDatasetSampleWriter
from PIL import Image

from glip import InputError
from nanoglip.cli import check_numbers
from nanoglip.files import locked, open_regular, write_bytes, write_safely
from nanoglip.sources import pictures
from nanoglip.sources.pictures import (
    FORMATS,
    LICENCE,
    TOO_LARGE,
    BadPicture,
    check_pixels,
    check_scans,
)
from nanoglip.sources.shards import end_with_parent, printable_error, whole_stats

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # img2dataset's dependencies call home: not from here,

os.environ["WANDB_MODE"] = "disabled"  # nor from the workers, which inherit this

os.environ["WANDB_ERROR_REPORTING"] = "false"

os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # Spark would take any python3

if importlib.util.find_spec("imghdr") is None:
    raise InputError("img2dataset needs Python 3.12 or older: fetch with one, train with any")

# --- The guard: what may be asked for, and what may come in ---------------------------------------

BODY_CAP = 2**25  # bytes of a picture as it is served

OURS = {"*", "nanoglip", "img2dataset"}  # names under which opt-outs concern us

OPT_OUTS = {"noai", "noimageai", "noml", "noindex", "noimageindex", "none"}

DIRECTIVES = OPT_OUTS | {  # what may stand behind the name of a crawler
    "all", "index", "follow", "nofollow", "noarchive", "nocache", "nosnippet", "notranslate",
    "noodp", "indexifembedded", "max-snippet", "max-image-preview", "max-video-preview",
    "unavailable_after", "archive",
}  # fmt: skip

AGENT = "nanoGLIP/1.0 (image-text research; img2dataset 1.47.0{})"

WEB = re.compile(r"(?is)(https?://(?:[^/?#@]*@)?)([^/?#:]*)(.*)")  # until its host, host, rest


CLOSED = [ipaddress.ip_network(x) for x in ("192.88.99.0/24", "3fff::/20", "5f00::/16")]

CHECKS_AT_ONCE = threading.Semaphore(4)  # pictures that are decoded: each may take 256 MB


class Refused(Exception):
    """A URL that is not fetched, for the reason that it tells; `again` if it may work later."""

    def __init__(self, reason: str, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again


def is_public(address: str) -> bool:
    """Whether an IP address is in the open Internet, also where it wraps another one."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if found.version == 6:
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if found in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.ip_address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    closed = (
        found.is_private, found.is_loopback, found.is_link_local, found.is_multicast,
        found.is_reserved, found.is_unspecified, getattr(found, "is_site_local", False),
        *(found in net for net in CLOSED if net.version == found.version),
    )  # fmt: skip
    return found.is_global and not any(closed)


def opted_out(headers: Message) -> bool:
    """Whether response headers ask not to be used: X-Robots-Tag in all its forms, TDM's, AIPREF's.

    A name, a colon and a directive aim at one crawler from there on; other colons stand in values.
    In doubt it is an opt-out: of TDM-Reservation's values only 0 is not.
    """
    for header in headers.get_all("X-Robots-Tag", []):
        agent = "*"
        for piece in re.split("[,;]", re.sub("[\"']", "", header.lower())):
            name, colon, rest = piece.partition(":")
            directive = re.split(r"[\s:]+", f"{rest} ".lstrip())[0]
            if colon and name.strip() not in DIRECTIVES and directive in DIRECTIVES:
                agent, piece = name.strip().partition("/")[0], rest
            if agent in OURS and OPT_OUTS & set(re.findall(r"[\w-]+", piece)):
                return True
    usage, tdm = (re.sub(r"[\s\"']", "", ",".join(headers.get_all(name, [])).lower())
                  for name in ("Content-Usage", "TDM-Reservation"))  # fmt: skip
    if {"train-ai=n", "bots=n"} & set(re.split("[,;]", usage)):
        return True
    return any(value.partition(";")[0] != "0" for value in tdm.split(",") if value)


def ascii_url(url: str) -> str:
    """A URL as it is asked for: an international host by IDNA, the rest percent-encoded."""
    found = WEB.match(url.strip())
    if not found:
        raise Refused("not http or https")
    start, host, rest = found.groups()
    try:
        host = host if host.isascii() else idna.encode(host, uts46=True).decode()
    except UnicodeError:
        raise Refused("unknown host") from None
    return urllib.parse.quote(start + host + rest, safe="%/:=&?~#+!$,;'@()*[]")


class Watch:
    """Connections of one URL, all cut when its time is over."""

    def __init__(self, seconds: float, allowed: frozenset[str]) -> None:
        self.allowed, self.sockets, self.over = allowed, [], False
        self.end = time.monotonic() + seconds
        self.timer = threading.Timer(seconds, self.cut)
        self.timer.daemon = True
        self.timer.start()

    def cut(self) -> None:
        self.over = True
        for open_socket in self.sockets:
            try:
                open_socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def addresses(self, host: str, port: int) -> list[tuple]:
        """Look a host up, for no longer than there is time: a resolver cannot be interrupted."""
        found = []

        def look_up() -> None:
            with contextlib.suppress(OSError, UnicodeError):
                found.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))

        thread = threading.Thread(target=look_up, daemon=True)
        thread.start()
        thread.join(max(0.0, self.end - time.monotonic()))
        if thread.is_alive() or self.over:
            raise Refused("timed out", again=True)
        if not found:
            raise Refused("unknown host")
        return found

    def connect(self, host: str, port: int) -> socket.socket:
        """Connect to a public address of a host, or to an allowed HOST:PORT."""
        found = self.addresses(host, port)
        if f"{host}:{port}" not in self.allowed and not all(is_public(x[4][0]) for x in found):
            raise Refused("private address")
        for family, kind, protocol, _, address in found:
            connection = socket.socket(family, kind, protocol)
            connection.settimeout(max(0.01, self.end - time.monotonic()))
            self.sockets.append(connection)
            if self.over:
                raise Refused("timed out", again=True)
            try:
                connection.connect(address)
            except OSError:
                connection.close()
                continue
            return connection
        raise Refused("cannot connect", again=True)


class Plain(http.client.HTTPConnection):
    """http:// through a watch."""

    def __init__(self, *args: object, watch: Watch, **settings: object) -> None:
        super().__init__(*args, **settings)
        self.watch = watch

    def connect(self) -> None:
        self.sock = self.watch.connect(self.host, self.port)


class Secure(http.client.HTTPSConnection):
    """https:// through a watch."""

    def __init__(self, *args: object, watch: Watch, **settings: object) -> None:
        super().__init__(*args, **settings)
        self.watch = watch

    def connect(self) -> None:
        raw = self.watch.connect(self.host, self.port)
        self.sock = self._context.wrap_socket(
            raw, server_hostname=self.host, do_handshake_on_connect=False
        )
        self.watch.sockets.append(self.sock)
        self.sock.do_handshake()


class Through(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """urllib's handler of both, with watched connections. Proxies are not used: they would hide
    whom we talk to."""

    def __init__(self, watch: Watch) -> None:
        urllib.request.HTTPSHandler.__init__(self, context=tls())
        self.watch = watch

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(Plain, watch=self.watch), request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(Secure, watch=self.watch), request, context=self._context)


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows, but reads nothing of a redirect's body, and honours its opt-outs."""

    def http_error_302(
        self, request: object, response: object, code: int, message: str, headers: Message
    ) -> object:
        response.close()
        if opted_out(headers):
            raise Refused("opted out")
        return super().http_error_302(request, response, code, message, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


@lru_cache
def tls() -> ssl.SSLContext:
    """One for a process: to read the certificates anew for each URL would take days."""
    return ssl.create_default_context()


@dataclass(frozen=True)
class Guard:
    """What may be done with a URL, and how long."""

    timeout: float  # seconds for all of a URL: connections, redirects, body
    retries: int
    contact: str
    allowed: frozenset[str]  # HOST:PORTs that may have a private address

    def download(
        self, row: tuple[int, str], **settings: object
    ) -> tuple[int, io.BytesIO | None, str | None]:
        """img2dataset's (key, url) -> (key, stream, error); `settings` are its own, ours count."""
        key, url = row
        end = time.monotonic() + self.timeout
        for turn in range(self.retries + 1):
            try:
                return key, io.BytesIO(self.fetched(url, end - time.monotonic())), None
            except Refused as refused:
                reason, pause = str(refused), 0.25 * 2**turn
                if not refused.again or time.monotonic() + pause >= end:
                    break
                time.sleep(pause)
        return key, None, reason

    def fetched(self, url: str, seconds: float) -> bytes:
        """A URL's picture, whole and of bearable size. Raises Refused."""
        url, watch = ascii_url(url or ""), Watch(seconds, self.allowed)
        try:
            content = self.body(url, watch)
        except Refused:
            raise
        except urllib.error.HTTPError as error:
            again = error.code in (408, 425, 429) or error.code >= 500
            raise Refused(f"HTTP {error.code}", again) from None
        except Exception as error:  # whatever a hostile server can make http.client or ssl raise
            if watch.over:
                raise Refused("timed out", again=True) from None
            inner = getattr(error, "reason", error)
            again = isinstance(inner, OSError | http.client.HTTPException)
            raise Refused(type(inner if again else error).__name__, again) from None
        finally:
            watch.timer.cancel()
            for open_socket in watch.sockets:
                open_socket.close()
        check_picture(content)
        return content

    def body(self, url: str, watch: Watch) -> bytes:
        """Follow redirects, honour opt-outs, read at most BODY_CAP bytes."""
        opener = urllib.request.OpenerDirector()
        for handler in (
            Through(watch), urllib.request.HTTPDefaultErrorHandler(),
            Redirects(), urllib.request.HTTPErrorProcessor(),
            urllib.request.UnknownHandler(),
        ):  # fmt: skip
            opener.add_handler(handler)
        contact = f"; {self.contact}" * bool(self.contact)
        request = urllib.request.Request(url, headers={"User-Agent": AGENT.format(contact)})
        with opener.open(request, timeout=self.timeout) as response:
            if opted_out(response.headers):
                raise Refused("opted out")
            length = response.headers.get("Content-Length", "")
            if length.isdigit() and int(length) > BODY_CAP:
                raise Refused(f"over {BODY_CAP:,} bytes")
            content = bytearray()
            while chunk := response.read1(2**16):
                content += chunk
                if watch.over:
                    raise Refused("timed out", again=True)
                if len(content) > BODY_CAP:
                    raise Refused(f"over {BODY_CAP:,} bytes")
            if watch.over:
                raise Refused("timed out", again=True)
            if length.isdigit() and len(content) < int(length):
                raise Refused("cut short", again=True)
        return bytes(content)


def check_picture(content: bytes) -> None:
    """Refuse what is no picture, a bomb by its header, or torn. Raises Refused."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            check_pixels(*image.size)
            check_scans(content)
            image.draft("RGB", (64, 64))  # all of a JPEG is read, a part of it is computed
            with CHECKS_AT_ONCE:
                image.load()
    except BadPicture as error:
        raise Refused(str(error)) from None
    except Exception as error:  # Pillow raises many kinds for hostile bytes
        plain = pictures.without_texts(content) if "MAX_TEXT" in str(error) else content
        if len(plain) < len(content):
            return check_picture(plain)
        known = {"UnidentifiedImageError": "not a picture", "DecompressionBombError": TOO_LARGE}
        raise Refused(known.get(type(error).__name__, "torn picture")) from None


class GuardedDownloader(img2dataset.downloader.Downloader):
    """img2dataset's work on a shard, in whatever process it is sent to, through a guard."""

    def __init__(self, guard: Guard, **settings: object) -> None:
        super().__init__(**settings)
        self.guard = guard

    def __call__(self, row: tuple[int, str]) -> tuple[bool, tuple[int, str]]:
        end_with_parent()
        img2dataset.downloader.download_image_with_retry = self.guard.download
        return super().__call__(row)


# --- The list -------------------------------------------------------------------------------------

COLUMNS = {"cc3m": "caption, then URL", "cc12m": "URL, then caption"}

LOOKED_AT = 200  # rows from which the columns are told


def lines_of(path: Path) -> Iterator[list[str]]:
    """A TSV's rows; quotes mean nothing in these lists."""
    with open_regular(path) as file:
        for line in io.TextIOWrapper(file, "utf-8-sig", "replace", newline="\n"):
            yield line.rstrip("\r\n").split("\t")


def url_column(path: Path, name: str) -> int:
    """Which of the first two columns holds the URLs. Raises InputError where none or both do."""
    try:
        rows = [row for row, _ in zip(lines_of(path), range(LOOKED_AT), strict=False)]
    except OSError as error:
        raise InputError(f"--list {path}: cannot be read ({error.strerror})") from None
    urls = re.compile(r"\s*https?://\S+\s*", re.IGNORECASE)
    alike = [sum(len(row) > 1 and bool(urls.fullmatch(row[c])) for row in rows) for c in (0, 1)]
    found = [c for c in (0, 1) if alike[c] >= 0.9 * len(rows) > 0]
    if len(found) != 1:
        raise InputError(
            f"--list {path}: of the first {len(rows)} rows, {alike[0]} have a URL in the first "
            f"column and {alike[1]} in the second; {name}'s list is a TSV with {COLUMNS[name]}"
        )
    return found[0]


def write_list(path: Path, rows: Iterator[tuple[str, str]]) -> int:
    """Write (url, caption) rows as parquet, which img2dataset need not guess at; their count."""
    schema, counted = pa.schema([("url", pa.string()), ("caption", pa.string())]), 0

    def fill(file: io.BufferedWriter) -> None:
        nonlocal counted
        with pq.ParquetWriter(file, schema) as writer:
            block = []

            def flush() -> None:
                urls, texts = [list(x) for x in zip(*block, strict=True)] or ([], [])
                writer.write_table(pa.table({"url": urls, "caption": texts}, schema))
                block.clear()

            for row in rows:
                block.append(row)
                counted += 1
                if len(block) == 100_000:
                    flush()
            if block:
                flush()

    write_safely(path, fill)
    return counted


# --- The command ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FetchConfig:
    """Fetch the pictures of a list of URLs into tar shards; a killed fetch goes on where it was."""

    name: Annotated[Literal["cc3m", "cc12m"], tyro.conf.Positional]  # whose list it is
    list: Path  # the official list: a TSV of URLs and captions
    out: Path  # folder of the shards
    retry_failed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # once more, what failed
    processes: int = 0  # (0: as many as there are cores)
    threads: int = 64  # of each process
    timeout: float = 20.0  # seconds for all of a URL
    retries: int = 2  # more tries where a URL may work later
    contact: str = ""  # a mail address or page for the user agent, so that owners can reach you
    distributor: Literal["multiprocessing", "pyspark", "ray"] = "multiprocessing"  # img2dataset's
    shard_size: int = 10_000  # URLs of a shard
    allow_host: tuple[str, ...] = ()  # HOST:PORTs that may have a private address


def fetch(config: FetchConfig) -> dict:
    """Everything that `python data.py fetch` does; returns what it reports."""
    check_numbers(config, ("threads", "timeout", "shard_size"), ("retries", "processes"))
    if config.timeout > threading.TIMEOUT_MAX:
        raise InputError(f"--timeout {config.timeout:g} is longer than a timer can wait: give less")
    if not (config.contact.isascii() and config.contact.isprintable()):
        raise InputError("--contact has to fit into a header: give ASCII letters in one line")
    if config.distributor != "multiprocessing" and not importlib.util.find_spec(config.distributor):
        raise InputError(f"--distributor {config.distributor}: pip install {config.distributor}")
    column = url_column(config.list, config.name)
    with locked(config.out, "fetching into"):
        plan = open_plan(config, column)
        going_on = bool(unfinished(config, plan))  # then what failed is not asked for yet again
        for number in range(len(plan["rounds"])):
            run_round(config, plan, number)
        retrying = going_on and len(plan["rounds"]) > 1
        if config.retry_failed and not retrying and not unfinished(config, plan):
            add_round(config, plan)
            run_round(config, plan, len(plan["rounds"]) - 1)
        return report(config, plan)


def open_plan(config: FetchConfig, column: int) -> dict:
    """The content of fetch.json: which lists are fetched into which shards."""
    path = config.out / "fetch.json"
    with open(config.list, "rb") as file:
        check = zlib.crc32(file.read(2**20))
    about = {"name": config.name, "bytes": config.list.stat().st_size, "crc": check,
             "shard_size": config.shard_size}  # fmt: skip
    if path.is_file():
        try:
            plan = json.loads(path.read_text())
            known, _ = plan["about"], plan["left_out"].items()
            rounds = [(shards_of_round(config, r), r["given_up"].items()) for r in plan["rounds"]]
        except (AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError):
            rounds = []
        if not rounds:
            raise InputError(
                f"{path} is damaged: put a copy of it back, or choose another --out; finished "
                "shards can still be indexed and trained on"
            )
        if known != about:
            raise InputError(
                f"{config.out} holds a fetch of another list, or of another --shard-size: give the "
                "same again, or choose another --out"
            )
        return plan
    if config.out.is_dir() and any(config.out.glob("*.tar")):
        raise InputError(f"{config.out} holds shards that are not of a fetch: choose another --out")
    config.out.mkdir(parents=True, exist_ok=True)
    left_out = Counter()

    def rows() -> Iterator[tuple[str, str]]:
        for row in lines_of(config.list):
            if len(row) < 2 or not WEB.match(row[column].strip()):
                left_out["rows without a URL"] += 1
            elif not row[1 - column].strip():
                left_out["rows without a caption"] += 1
            else:
                yield row[column].strip(), " ".join(row[1 - column].split())

    count = write_list(config.out / "list-0.parquet", rows())
    plan = {"about": about, "rounds": [{"start": 0, "rows": count, "given_up": {}}],
            "left_out": dict(left_out)}  # fmt: skip
    write_bytes(path, json.dumps(plan).encode())
    return plan


def shards_of_round(config: FetchConfig, a_round: dict) -> range:
    """Numbers of the shards that a round writes."""
    start = a_round["start"]
    return range(start, start + math.ceil(a_round["rows"] / config.shard_size))


def finished(config: FetchConfig) -> dict[int, dict]:
    """Number -> statistics of each finished shard; one whose tar was deleted is not."""
    numbers = (re.match("[0-9]{5,9}(?=_stats.json$)", p.name) for p in whole_stats(config.out))
    return {int(n[0]): json.loads((config.out / f"{n[0]}_stats.json").read_text())
            for n in numbers if n and (config.out / f"{n[0]}.tar").is_file()}  # fmt: skip


def unfinished(config: FetchConfig, plan: dict) -> list[int]:
    """Numbers of the shards that are still to be made."""
    done = finished(config)
    return [n for r in plan["rounds"] for n in shards_of_round(config, r) if n not in done]


def add_round(config: FetchConfig, plan: dict) -> None:
    """Plan what the last round failed to fetch once more, into shards of its own.

    Who opted out is not asked again.
    """
    last, given_up = plan["rounds"][-1], Counter(plan["rounds"][-1]["given_up"])

    def rows() -> Iterator[tuple[str, str]]:
        for number in shards_of_round(config, last):
            path, names = config.out / f"{number:05}.parquet", ("url", "caption", "status")
            try:
                table = pq.read_table(path)
                columns = [table[name].to_pylist() for name in (*names, "error_message")]
            except (OSError, LookupError, ValueError) as error:  # pyarrow's are among these
                raise InputError(
                    f"{path} cannot be read ({printable_error(error)}): remove {number:05}.tar, "
                    "and the same command fetches this shard anew"
                ) from None
            for url, caption, status, why in zip(*columns, strict=True):
                if why == "opted out":
                    given_up[why] += 1
                elif status != "success":
                    yield url, caption

    name = config.out / f"list-{len(plan['rounds'])}.parquet"
    count, start = write_list(name, rows()), shards_of_round(config, last).stop
    if not count:
        print("nothing failed that may be asked for again")
        name.unlink()
        return
    plan["rounds"].append({"start": start, "rows": count, "given_up": dict(given_up)})
    write_bytes(config.out / "fetch.json", json.dumps(plan).encode())


def run_round(config: FetchConfig, plan: dict, number: int) -> None:
    """Fetch what a round still lacks."""
    a_round, done = plan["rounds"][number], finished(config)
    if all(n in done for n in shards_of_round(config, a_round)):
        return
    scratch = config.out / "_tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    allowed = frozenset(config.allow_host)
    guard = Guard(config.timeout, config.retries, config.contact, allowed)
    reader = Reader(
        url_list=str(config.out / f"list-{number}.parquet"), input_format="parquet", url_col="url",
        caption_col="caption", verify_hash_col=None, verify_hash_type=None,
        save_additional_columns=None, number_sample_per_shard=config.shard_size,
        done_shards=set(done), tmp_path=str(scratch), start_shard_id=a_round["start"],
    )  # fmt: skip
    # Padding to a square would put white borders where a centred mask does not look.
    resizer = Resizer(
        image_size=256, resize_mode="keep_ratio", resize_only_if_bigger=True,
        upscale_interpolation="lanczos", downscale_interpolation="area", encode_quality=95,
        encode_format="jpg", skip_reencode=False, disable_all_reencoding=False, min_image_size=0,
        max_image_area=float("inf"), max_aspect_ratio=float("inf"), blurrer=None,
    )  # fmt: skip
    downloader = GuardedDownloader(
        guard, sample_writer_class=WebDatasetSampleWriter, resizer=resizer,
        thread_count=config.threads, save_caption=True, extract_exif=False,
        output_folder=str(config.out.resolve()), column_list=reader.column_list,
        timeout=config.timeout, number_sample_per_shard=config.shard_size, oom_shard_count=5,
        compute_hash=None, verify_hash_type=None, encode_format="jpg", retries=0,
        user_agent_token="nanoglip", disallowed_header_directives=sorted(OPT_OUTS),
    )  # fmt: skip
    run = getattr(distributor, f"{config.distributor}_distributor")
    try:
        run(config.processes or os.cpu_count() or 1, downloader, reader, 1000, 1)
    except Exception as error:  # of Spark, of Ray, of the disk
        raise InputError(
            f"--distributor {config.distributor}: {printable_error(error)}; finished shards are "
            "kept: give the same command again to go on"
        ) from None
    shutil.rmtree(scratch, ignore_errors=True)


def report(config: FetchConfig, plan: dict) -> dict:
    """Print and return: expected, got, share, why the rest failed, the licence."""
    done = finished(config)
    missing = unfinished(config, plan)
    last = plan["rounds"][-1]
    expected = plan["rounds"][0]["rows"]
    got = sum(stats["successes"] for stats in done.values())
    reasons = Counter(last["given_up"])
    for number in shards_of_round(config, last):
        reasons.update(done.get(number, {}).get("status_dict", {}))
    del reasons["success"]
    share = got / max(1, expected)
    print(f"{config.name}: expected {expected:,} pairs, got {got:,} ({share:.1%})")
    for why, n in [*plan["left_out"].items(), *reasons.most_common(12)]:
        print(f"  {n:>10,}  {why}")
    print(f"{LICENCE}\nState the share beside every result.")
    if missing:
        raise InputError(
            f"{len(missing)} shards are unfinished, the first is {missing[0]:05}: give the same "
            "command again to go on"
        )
    return {"expected": expected, "got": got, "share": share, "reasons": dict(reasons)}
