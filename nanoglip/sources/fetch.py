"""Fetch the pictures of a list of URLs with img2dataset, behind a guard: `python data.py fetch`.

img2dataset reads the list, resizes, packs and runs the workers. Its download of a URL is replaced
by Guard: http and https only, public addresses only (checked at each connection, hence after each
redirect), an honest user agent, opt-outs in every form, limits on bytes and pixels, one deadline
for a URL with its redirects and retries, and no torn picture.

Writes to DIR: 00000.tar, 00000.parquet (a row for each URL, with its status), 00000_stats.json
(written last: a shard without it is fetched again), list-0.parquet, and fetch.json.
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
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from email.message import Message
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote, urljoin, urlsplit

import idna
import tyro
from PIL import Image

from glip import InputError
from nanoglip import files
from nanoglip.cli import check_numbers, counted
from nanoglip.machine import cores
from nanoglip.sources import pictures
from nanoglip.sources.shards import end_with_parent, error_line, finished_shards

# --- What may be used -----------------------------------------------------------------------------

BODY_CAP = 2**25  # bytes of a response's body
OURS = {"*", "nanoglip", "img2dataset"}  # crawlers whose opt-outs concern us
OPT_OUTS = {"noai", "noimageai", "noml", "noindex", "noimageindex", "none"}
DIRECTIVES = OPT_OUTS | {  # what may follow the name of a crawler
    "all", "index", "follow", "nofollow", "noarchive", "nocache", "nosnippet", "notranslate",
    "noodp", "indexifembedded", "max-snippet", "max-image-preview", "max-video-preview",
    "unavailable_after", "archive",
}  # fmt: skip
AGENT = "nanoGLIP/1.0 (image-text research; img2dataset 1.47.0{})"
WEB = re.compile(r"(?is)(https?://(?:[^/?#@]*@)?)([^/?#:]*)(.*)")  # up to the host, host, rest
# Networks that are not public, which ipaddress does not know in all versions.
CLOSED = [*map(ipaddress.ip_network, ("192.88.99.0/24", "3fff::/20", "5f00::/16", "fec0::/10"))]
CHECKS_AT_ONCE = threading.Semaphore(4)  # pictures being decoded: each may take 256 MB


class Refused(Exception):
    """A URL that is not used, with the reason; `again`: whether a later try may succeed."""

    def __init__(self, reason: str, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again


def is_public(address: str) -> bool:
    """Whether an IP address is public, and also the IPv4 address that it may contain."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if found.version == 6:
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if found in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.ip_address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    closed = found.is_multicast or found.is_reserved or any(found in net for net in CLOSED)
    return found.is_global and not closed


def opted_out(headers: Message) -> bool:
    """Whether response headers forbid our use: X-Robots-Tag, TDM-Reservation or Content-Usage.

    In X-Robots-Tag a name, a colon and a directive address one crawler from there on; other colons
    belong to values. In doubt it is an opt-out: of TDM-Reservation's values only 0 is not.
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
    usage, reservation = (re.sub(r"[\s\"']", "", ",".join(headers.get_all(name, [])).lower())
                          for name in ("Content-Usage", "TDM-Reservation"))  # fmt: skip
    if {"train-ai=n", "bots=n"} & set(re.split("[,;]", usage)):
        return True
    return any(value.partition(";")[0] != "0" for value in reservation.split(",") if value)


def ascii_url(url: str) -> str:
    """A URL in ASCII: an international host by IDNA, the rest percent-encoded. Raises Refused."""
    found = WEB.match(url.strip())
    if not found:
        raise Refused("not http or https")
    start, host, rest = found.groups()
    try:
        host = host if host.isascii() else idna.encode(host, uts46=True).decode()
    except UnicodeError:
        raise Refused("unknown host") from None
    return quote(start + host + rest, "%/:=&?~#+!$,;'@()*[]", errors="surrogateescape")


def check_picture(content: bytes) -> None:
    """Raise Refused for bytes that are no picture, too large a one, or a torn one."""
    try:
        pictures.check_scans(content)
        with Image.open(io.BytesIO(content), formats=pictures.FORMATS) as image, CHECKS_AT_ONCE:
            pictures.check_pixels(*image.size)
            image.draft("RGB", (64, 64))  # a JPEG is read whole and decoded at an eighth
            image.load()
    except Exception as error:  # Pillow raises many kinds for hostile bytes
        reasons = {"BadPicture": str(error), "DecompressionBombError": pictures.TOO_LARGE,
                   "UnidentifiedImageError": "not a picture"}  # fmt: skip
        raise Refused(reasons.get(type(error).__name__, "torn picture")) from None


# --- Connections ----------------------------------------------------------------------------------

TLS = ssl.create_default_context()  # reads the certificates, once in a process
Row = tuple[int, str]  # (key, URL), or (number of a shard, file of its list)


@dataclass(frozen=True)
class Guard:
    """img2dataset's download of a URL, under our rules."""

    timeout: float  # seconds for a URL in all: connections, redirects, body, retries
    retries: int
    contact: str
    allowed: frozenset[str]  # HOST:PORTs that may have a private address

    def download(self, row: Row, **settings: object) -> tuple[int, io.BytesIO | None, str | None]:
        """(key, url) -> (key, stream, error); img2dataset's own `settings` are ignored."""
        key, url = row
        end = time.monotonic() + self.timeout
        for turn in range(self.retries + 1):
            try:
                return key, io.BytesIO(self.picture(url or "", end)), None
            except Refused as refused:
                reason, pause = str(refused), 0.25 * 2**turn
                if not refused.again or time.monotonic() + pause >= end:
                    break
                time.sleep(pause)
        return key, None, reason

    def picture(self, url: str, end: float) -> bytes:
        """The content of a URL, a whole picture, before the clock shows `end`. Raises Refused."""
        connections, found = Connections(end, self.allowed), Future()
        agent = AGENT.format(f"; {self.contact}" if self.contact else "")

        def work() -> None:
            try:
                found.set_result(connections.follow(url, agent))
            except Exception as error:
                found.set_exception(error)

        # In a thread that can be left behind: getaddrinfo cannot be interrupted.
        threading.Thread(target=work, daemon=True).start()
        try:
            content = found.result(max(0.0, end - time.monotonic()))
        except Refused:
            raise
        except TimeoutError:
            raise Refused("timed out", again=True) from None
        except Exception as error:  # a hostile server can make http.client and ssl raise many
            again = isinstance(error, OSError | http.client.HTTPException)
            raise Refused(type(error).__name__, again) from None
        finally:
            connections.close()
        check_picture(content)
        return content


class Connections:
    """The connections of one URL, to public addresses only, until the clock shows `end`."""

    def __init__(self, end: float, allowed: frozenset[str]) -> None:
        self.end, self.allowed, self.sockets = end, allowed, []

    def close(self) -> None:
        """Close all, and interrupt a thread that reads from one."""
        for connection in self.sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def connect(self, host: str, port: int, secure: bool) -> socket.socket:
        """A connection to a public address of a host, or to an allowed HOST:PORT."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise Refused("unknown host") from None
        if f"{host}:{port}" not in self.allowed and not all(is_public(x[4][0]) for x in found):
            raise Refused("private address")
        for *_, (address, *_) in found:
            with contextlib.suppress(OSError):
                seconds = max(0.0, self.end - time.monotonic())
                sock = socket.create_connection((address, port), seconds)
                break
        else:
            raise Refused("cannot connect", again=True)
        if secure:
            sock = TLS.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
        self.sockets.append(sock)
        if secure:
            sock.do_handshake()
        return sock

    def request(self, url: str, agent: str) -> http.client.HTTPResponse:
        """The response to a GET. No proxy is used: it would hide the address."""
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        host, port = parts.hostname or "", parts.port or (443 if secure else 80)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Host": parts.netloc.rpartition("@")[2], "User-Agent": agent}
        connection = http.client.HTTPConnection(host, port)
        connection.sock = self.connect(host, port, secure)
        connection.request("GET", target, headers=headers | {"Connection": "close"})
        return connection.getresponse()

    def follow(self, url: str, agent: str) -> bytes:
        """The body behind a URL and its redirects, none of which opts out. Raises Refused."""
        for _ in range(11):
            url = ascii_url(url)
            response = self.request(url, agent)
            redirected = response.status in (301, 302, 303, 307, 308)
            location = response.headers.get("Location") if redirected else None
            if not (location or 200 <= response.status < 300):
                again = response.status in (408, 425, 429) or response.status >= 500
                raise Refused(f"HTTP {response.status}", again)
            if opted_out(response.headers):
                raise Refused("opted out")
            if not location:
                return read_body(response)
            url = urljoin(url, location.encode("latin-1").decode(errors="surrogateescape"))
        raise Refused("too many redirects")


def read_body(response: http.client.HTTPResponse) -> bytes:
    """A response's body, at most BODY_CAP bytes. Raises Refused."""
    size, content = response.length or 0, bytearray()  # 0: unknown
    while max(size, len(content)) <= BODY_CAP and (chunk := response.read1(2**16)):
        content += chunk
    if max(size, len(content)) > BODY_CAP:
        raise Refused(f"over {BODY_CAP:,} bytes")
    if len(content) < size:
        raise Refused("cut short", again=True)
    return bytes(content)


def download_shard(guard: Guard, downloader: Callable, row: Row) -> tuple[bool, Row]:
    """The outcome of img2dataset's Downloader for a shard, in a spawned worker."""
    import img2dataset.downloader

    end_with_parent()
    img2dataset.downloader.download_image_with_retry = guard.download  # no setting replaces it
    return downloader(row)


# --- The list -------------------------------------------------------------------------------------

COLUMNS = {"cc3m": "caption, then URL", "cc12m": "URL, then caption"}


def pairs_of(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """(URL, caption) of each row of a TSV; "" for what it lacks. Quotes have no meaning in it."""
    with files.open_regular(path) as file:
        for line in io.TextIOWrapper(file, "utf-8-sig", "replace", newline="\n"):
            url, caption = (" ".join(x.split()) for x in [*line.split("\t"), ""][:2])
            if not WEB.match(url) or (name == "cc3m" and WEB.match(caption)):
                url, caption = caption, url
            yield (url, caption) if WEB.match(url) else ("", caption or url)


def check_list(path: Path, name: str) -> None:
    """Raise InputError for a list whose first 200 rows are hardly any pairs."""
    try:
        rows = list(islice(pairs_of(path, name), 200))
    except OSError as error:
        raise InputError(f"--list {path}: cannot be read ({error.strerror})") from None
    pairs = sum(bool(url and caption) for url, caption in rows)
    if not rows or pairs < 0.9 * len(rows):
        raise InputError(
            f"--list {path}: a URL and a caption stand in {pairs} of its first "
            f"{counted(len(rows), 'row')}; "
            f"{name}'s list is a TSV with {COLUMNS[name]}"
        )


def write_list(path: Path, rows: Iterator[tuple[str, str]]) -> int:
    """Write (url, caption) rows as parquet, 100,000 at a time; returns their number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("url", pa.string()), ("caption", pa.string())])

    def fill(file: io.BufferedWriter) -> None:
        with pq.ParquetWriter(file, schema) as writer:
            while block := list(islice(rows, 100_000)):
                urls, captions = zip(*block, strict=True)
                writer.write_table(pa.table({"url": urls, "caption": captions}, schema))

    files.write_safely(path, fill)
    return pq.read_metadata(path).num_rows


# --- The command ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FetchConfig:
    """Fetch the pictures of a list of URLs into tar shards; the same command resumes."""

    name: Annotated[Literal["cc3m", "cc12m"], tyro.conf.Positional]  # whose list it is
    list: Path  # the official list: a TSV of URLs and captions
    out: Path  # folder of the shards
    retry_failed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # try again what failed
    processes: int = 0  # that fetch (0: one per core)
    threads: int = 64  # downloads at a time, per process
    timeout: float = 20.0  # seconds for a URL, retries included
    retries: int = 2  # further tries where a URL may work later
    contact: str = ""  # a mail address or page in the user agent, so that owners can reach you
    shard_size: int = 10_000  # URLs per shard
    allow_host: tuple[str, ...] = ()  # HOST:PORTs that may have a private address


def fetch(config: FetchConfig) -> dict:
    """What `python data.py fetch` reports: expected and fetched pairs, and why the rest failed."""
    check_numbers(config, ("threads", "timeout", "shard_size"), ("retries", "processes"))
    if not (config.contact.isascii() and config.contact.isprintable()):
        raise InputError("--contact has to fit into a header: give ASCII letters in one line")
    if importlib.util.find_spec("imghdr") is None:
        raise InputError("img2dataset needs Python 3.12 or older: fetch with one, train with any")
    check_list(config.list, config.name)
    with files.locked(config.out, "fetching into"):
        plan = open_plan(config)
        if config.retry_failed and not unfinished(config, plan):
            add_round(config, plan)
        for number in range(len(plan["rounds"])):
            run_round(config, plan, number)
        return report(config, plan)


def open_plan(config: FetchConfig) -> dict:
    """The content of fetch.json, written at the first start: the lists and their shards."""
    path = config.out / "fetch.json"
    about = files.digest([config.list], f"{config.name} {config.shard_size}")
    if path.is_file():
        try:
            plan = json.loads(path.read_text())
            known, _ = plan["about"], plan["left_out"].items()
            rounds = rounds_of(config, plan)
        except (OSError, *files.FOREIGN):
            rounds = []
        if not rounds:
            raise InputError(f"{path} is damaged: restore a copy, or choose another --out")
        if known != about:
            raise InputError(f"{config.out} is of another list or --shard-size: choose another")
        return plan
    if any(config.out.glob("*.tar")):
        raise InputError(f"{config.out} holds shards that are not of a fetch: choose another --out")
    left_out = Counter()

    def pairs() -> Iterator[tuple[str, str]]:
        for url, caption in pairs_of(config.list, config.name):
            if url and caption:
                yield url, caption
            else:
                left_out["rows without a caption" if url else "rows without a URL"] += 1

    count = write_list(config.out / "list-0.parquet", pairs())
    plan = {"about": about, "rounds": [{"start": 0, "rows": count}], "left_out": left_out}
    files.write_bytes(path, json.dumps(plan).encode())
    return plan


def rounds_of(config: FetchConfig, plan: dict) -> list[range]:
    """Numbers of the shards that each round writes."""
    return [range(r["start"], r["start"] + math.ceil(r["rows"] / config.shard_size))
            for r in plan["rounds"]]  # fmt: skip


def unfinished(config: FetchConfig, plan: dict) -> list[int]:
    """Numbers of the shards that are still to be fetched."""
    done = finished_shards(config.out)
    return [n for numbers in rounds_of(config, plan) for n in numbers if f"{n:05}" not in done]


def add_round(config: FetchConfig, plan: dict) -> None:
    """Plan shards for what failed in the last round, except opt-outs."""
    import pyarrow.parquet as pq

    last = rounds_of(config, plan)[-1]

    def failed() -> Iterator[tuple[str, str]]:
        for number in last:
            path, names = config.out / f"{number:05}.parquet", ["status", "error_message"]
            try:
                rows = pq.read_table(path, columns=["url", "caption", *names]).to_pylist()
            except (OSError, LookupError, ValueError) as error:  # pyarrow's are among these
                again = f"remove {number:05}.tar, and the same command fetches this shard again"
                raise InputError(f"{path} cannot be read ({error_line(error)}): {again}") from None
            yield from ((row["url"], row["caption"]) for row in rows
                        if row["status"] != "success" and row["error_message"] != "opted out")

    count = write_list(config.out / f"list-{len(plan['rounds'])}.parquet", failed())
    plan["rounds"].append({"start": last.stop, "rows": count})
    files.write_bytes(config.out / "fetch.json", json.dumps(plan).encode())


def run_round(config: FetchConfig, plan: dict, number: int) -> None:
    """Fetch the shards that a round still lacks."""
    numbers = rounds_of(config, plan)[number]
    done = {*numbers}.difference(unfinished(config, plan))
    if len(done) == len(numbers):
        return
    # img2dataset's dependencies would send telemetry, in workers too.
    os.environ |= {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled",
                   "WANDB_ERROR_REPORTING": "false"}  # fmt: skip
    from img2dataset.distributor import multiprocessing_distributor
    from img2dataset.downloader import Downloader
    from img2dataset.reader import Reader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    scratch = config.out / "_tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    reader = Reader(  # no hashes, no other columns
        str(config.out / f"list-{number}.parquet"), "parquet", "url", "caption", None, None, None,
        config.shard_size, done, str(scratch), numbers.start,
    )  # fmt: skip
    # No padding to a square: a centred mask would treat a white border as content.
    resizer = Resizer(image_size=256, resize_mode="keep_ratio", resize_only_if_bigger=True)
    downloader = Downloader(
        sample_writer_class=WebDatasetSampleWriter, resizer=resizer, thread_count=config.threads,
        save_caption=True, extract_exif=False, output_folder=str(config.out.resolve()),
        column_list=reader.column_list, timeout=config.timeout, oom_shard_count=5,
        number_sample_per_shard=config.shard_size, compute_hash=None, verify_hash_type=None,
        encode_format="jpg", retries=0, user_agent_token=None, disallowed_header_directives=None,
    )  # fmt: skip
    seconds = min(config.timeout, 1e6)  # a socket cannot wait longer
    allowed = frozenset(map(str.lower, config.allow_host))
    guard = Guard(seconds, config.retries, config.contact, allowed)
    work = partial(download_shard, guard, downloader)
    workers = config.processes or cores()
    try:
        multiprocessing_distributor(workers, work, reader, None, 1)
    except Exception as error:  # of the list, of the disk
        again = "finished shards are kept, and the same command resumes"
        raise InputError(f"{config.out}: {error_line(error)}; {again}") from None
    shutil.rmtree(scratch, ignore_errors=True)


def report(config: FetchConfig, plan: dict) -> dict:
    """What was expected and fetched, and why the rest failed; printed with the licence."""
    done, missing = finished_shards(config.out), unfinished(config, plan)
    expected = plan["rounds"][0]["rows"]
    got = sum(stats["successes"] for stats in done.values())
    reasons = Counter()
    for number in rounds_of(config, plan)[-1]:
        reasons.update(done.get(f"{number:05}", {}).get("status_dict", {}))
    # Opt-outs are not in a later round.
    reasons["opted out"] = sum(x["status_dict"].get("opted out", 0) for x in done.values())
    del reasons["success"]
    reasons, share = +reasons, got / max(1, expected)
    print(f"{config.name}: expected {expected:,} pairs, got {got:,} ({share:.1%})")
    for why, n in [*plan["left_out"].items(), *reasons.most_common(12)]:
        print(f"  {n:>10,}  {why}")
    print(f"{pictures.LICENCE}\nState the share beside every result.")
    if missing:
        told = f"{counted(len(missing), 'shard')} unfinished, the first is {missing[0]:05}"
        raise InputError(f"{told}: the same command resumes")
    return {"expected": expected, "got": got, "share": share, "reasons": dict(reasons)}
