"""Requests to the Hugging Face hub, and downloads that continue where they broke off.

The hub is at https://huggingface.co, or at the mirror in HF_ENDPOINT. The user's token goes to it
and to no other host. Redirects are followed by hand, because urllib sends a token on to the host
that a redirect leads to, and because the hub says a file's size and checksum on the redirect."""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import NamedTuple

from nanosafe.errors import one_line_errors, stop

ATTEMPTS = 5  # at a file, in a row at which nothing of it arrives
ATTEMPTS_TO_ASK = 3  # a question
PAUSE = 1.0  # seconds before the second attempt; doubled before each further one
LONGEST_PAUSE = 300.0  # seconds, whatever a server asks for in Retry-After
ANSWER_TIMEOUT = 10  # seconds without an answer to a question
BODY_TIMEOUT = 30  # seconds in which nothing of a file arrives
MOST_REDIRECTS = 10
MOST_JSON = 2**26  # bytes of an answer in JSON
BLOCK = 2**18  # bytes of a file, read at a time
REDIRECTS = (301, 302, 303, 307, 308)
RETRIED = (408, 416, 429, 500, 502, 503, 504)  # statuses that may be others a moment later
FAILURES = (OSError, http.client.HTTPException)  # what a request raises; HTTPError is an OSError
TRUE = ("1", "ON", "YES", "TRUE")


class NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments):
        return None


OPENER = urllib.request.build_opener(NoRedirects)


# ---- the environment ----


def hub_address():
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def is_set(name):
    """Whether a variable of the environment says yes."""
    return os.environ.get(name, "").upper() in TRUE


def is_offline():
    return is_set("HF_HUB_OFFLINE") or is_set("TRANSFORMERS_OFFLINE")


def hub_home():
    """The folder of the hub's files on this machine: HF_HOME, or ~/.cache/huggingface."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(caches, "huggingface")
    return os.path.expanduser(os.path.expandvars(home))


def read_token():
    """The user's token for the hub, or "" where there is none."""
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or ""
    if not token and not is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        path = os.environ.get("HF_TOKEN_PATH") or os.path.join(hub_home(), "token")
        path = os.path.expanduser(path)
        if os.path.isfile(path):
            with one_line_errors(path), open(path, encoding="utf-8") as f:
                token = f.read()
    token = token.replace("\r", "").replace("\n", "").strip()
    if not (token.isascii() and token.isprintable()):
        stop("the token in HF_TOKEN, or in the hub's token file, holds what no token has")
    return token


# ---- requests ----


def request(url, method="GET", start=0):
    """The answer to a request, after its redirects; raises one of FAILURES.

    start  the first byte of the file that is wanted

    The answer to HEAD is the one that tells a file's size and checksum. Of a large file that is a
    redirect to another host."""
    for _ in range(MOST_REDIRECTS):
        try:
            return open_address(url, method, start)
        except urllib.error.HTTPError as answer:
            location = answer.headers.get("Location")
            if answer.code not in REDIRECTS or not location:
                raise
            target = join_addresses(url, location)
            is_foreign = not same_host(target, url)
            has_checksum = "X-Linked-ETag" in answer.headers
            if method == "HEAD" and (is_foreign or has_checksum):
                return answer
            answer.close()
            url = target
    raise OSError(f"more than {MOST_REDIRECTS} redirects")


def open_address(url, method, start):
    """The answer of one server. The token goes with it if that server is the hub."""
    if not url.startswith(("https://", "http://")):  # urllib would open file:// as well
        raise OSError(f"{url[:200]!r} is no web address")
    headers = {
        "User-Agent": "nanosafe",
        "Accept-Encoding": "identity",  # gzip would hide a file's size
    }
    if start:
        headers["Range"] = f"bytes={start}-"
    token = read_token()
    timeout = BODY_TIMEOUT if method == "GET" else ANSWER_TIMEOUT
    try:
        if token and same_host(url, hub_address()):
            headers["Authorization"] = f"Bearer {token}"
        question = urllib.request.Request(url, headers=headers, method=method)
        return OPENER.open(question, timeout=timeout)
    except ValueError as error:  # a port that is no number, a host that is no name
        raise OSError(f"{url[:200]!r} is no web address: {error}") from error


def join_addresses(url, location):
    """The address that a redirect leads to."""
    try:
        return urllib.parse.urljoin(url, location)
    except ValueError as error:
        raise OSError(f"a redirect to {location[:200]!r}, which is no web address") from error


def same_host(url, other):
    """Whether two addresses have the same scheme, host and port."""
    a = urllib.parse.urlsplit(url)
    b = urllib.parse.urlsplit(other)
    return (a.scheme, a.netloc.lower()) == (b.scheme, b.netloc.lower())


def ask(url, method="GET", attempts=ATTEMPTS_TO_ASK):
    """request(), and again where the server is busy or the connection breaks.

    Returns (headers, body); a body is at most MOST_JSON bytes, and empty for HEAD."""
    failures = 0
    while True:
        try:
            with request(url, method) as answer:
                body = b"" if method == "HEAD" else answer.read(MOST_JSON)
                return answer.headers, body
        except FAILURES as error:
            failures += 1
            if failures >= attempts or not may_pass(error):
                raise
            time.sleep(choose_pause(error, failures))


def may_pass(error):
    """Whether a request that failed may succeed when it is repeated."""
    status = getattr(error, "code", None)  # of an answer from the server
    return status is None or status in RETRIED


def choose_pause(error, failures):
    """Seconds to wait after so many failures: what the server asks for, or longer each time."""
    asked_for = read_number(getattr(error, "headers", {}), "Retry-After")
    if asked_for is None:
        return PAUSE * 2 ** (failures - 1)
    return min(asked_for, LONGEST_PAUSE)


def read_number(headers, name):
    """The whole number in a header; None where there is none."""
    text = headers.get(name, "")
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


class Listing(NamedTuple):
    """What a repository of the hub holds."""

    name: str  # ORG/NAME, today's
    commit: str
    files: list  # paths


def list_repository(kind, name, revision, attempts=ATTEMPTS_TO_ASK):
    """The Listing of a repository; raises one of FAILURES. kind: models | datasets."""
    revision = urllib.parse.quote(revision, safe="")
    url = f"{hub_address()}/api/{kind}/{name}/revision/{revision}"
    _, body = ask(url, attempts=attempts)
    try:
        value = json.loads(body)
        files = [file["rfilename"] for file in value["siblings"]]
        listing = Listing(value.get("id", name), value.get("sha", ""), files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OSError("the answer is no list of files") from error
    if not all(isinstance(text, str) for text in [listing.name, listing.commit, *files]):
        raise OSError("the answer is no list of files")
    return listing


# ---- files ----


def size_of(path):
    """A file's size in bytes; 0 where there is none."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def receive_file(url, partial, bar, size=None):
    """Append what is missing of a file to `partial`; raises one of FAILURES after ATTEMPTS in a row
    at which nothing new arrived.

    bar   a tqdm in bytes, which gets a total where it has none
    size  of the file in bytes, where it is known"""
    begin = bar.n
    most = size_of(partial)
    failures = 0
    while True:
        try:
            receive(url, partial, bar, begin, size)
            return
        except FAILURES as error:
            status = getattr(error, "code", None)
            if status == 416 and os.path.exists(partial):  # nothing follows: it is too long
                os.remove(partial)
            arrived = size_of(partial)
            if arrived > most:
                most = arrived
                failures = 0
                continue
            failures += 1
            if failures == ATTEMPTS or not may_pass(error):
                raise
            time.sleep(choose_pause(error, failures))


def receive(url, partial, bar, begin, size):
    """One attempt of receive_file(). begin: what the bar counted before this file."""
    have = size_of(partial)
    if have and have == size:
        bar.update(begin + have - bar.n)
        return
    with request(url, start=have) as answer:
        if answer.status != 206:
            have = 0  # the server ignores ranges: from the start
        announced = read_number(answer.headers, "Content-Length")
        if size is None and announced is not None:
            size = have + announced
        if bar.total is None:
            bar.total = size
        with open_partial(partial, have) as f:
            while block := answer.read(BLOCK):
                with one_line_errors(partial, "written"):
                    f.write(block)
                have += len(block)
                bar.update(begin + have - bar.n)
                if size is not None and have > size:
                    break
    if size is not None and have > size:
        os.remove(partial)
    if size is not None and have != size:
        raise OSError(f"{have} of {size} bytes arrived")


def open_partial(path, have):
    """A file to append to, or to write anew where nothing of it counts."""
    with one_line_errors(path, "written"):
        return open(path, "ab" if have else "wb")


def hash_file(path, digest):
    """Feed a file to a hash of hashlib; returns it in hexadecimal digits."""
    with one_line_errors(path), open(path, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()
