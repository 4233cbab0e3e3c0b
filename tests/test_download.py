"""Downloads from a local server that breaks off, ignores ranges or sends damaged files; conversion
of raw rows; JSON lists that are read item by item."""

import hashlib
import http.server
import io
import json
import os
import threading
import tracemalloc

import pytest
from conftest import ROOT, run
from judge_server import QuietServer

from nanosafe.data import reader
from nanosafe.tools import download
from nanosafe.tools.download import Release


def make_body():
    """A jsonl file in Alpaca's layout."""
    lines = []
    for i in range(5000):
        row = {"instruction": f"i{i}", "input": "", "output": f"o{i}"}
        lines.append(json.dumps(row) + "\n")
    return "".join(lines).encode()


BODY = make_body()
PUBLISHED = [
    "README.md",
    "harmless-base/train.jsonl",
    "helpful-base/train.jsonl",
    "packed/train.jsonl.xz",
]


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves BODY, and the list of PUBLISHED files."""

    broken_transfers = 0  # so many break off half-way
    knows_ranges = True
    requests = []  # (path, range)

    def do_GET(self):
        requested_range = self.headers.get("Range")
        Handler.requests.append((self.path, requested_range))
        if "/api/" in self.path:
            files = [{"rfilename": name} for name in PUBLISHED]
            return self.answer(200, json.dumps({"siblings": files}).encode())
        if "missing" in self.path:
            return self.answer(404, b"no")
        start = 0
        if requested_range and Handler.knows_ranges:
            start = int(requested_range.removeprefix("bytes=").removesuffix("-"))
        if start >= len(BODY):
            return self.answer(416, b"nothing follows")
        body = BODY[start:]
        sent = body
        if Handler.broken_transfers:
            Handler.broken_transfers -= 1
            sent = body[: len(body) // 2]
        self.answer(206 if start else 200, sent, length=len(body))

    def answer(self, status, body, length=None):
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """The address of a running server, which is the hub's as well."""
    httpd = QuietServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    Handler.broken_transfers = 0
    Handler.knows_ranges = True
    Handler.requests = []
    url = f"http://127.0.0.1:{httpd.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", url)
    yield url
    httpd.shutdown()


def content_of(path):
    with open(path, "rb") as f:
        return f.read()


# ---- one file ----


def test_a_broken_download_is_continued(server, tmp_path):
    Handler.broken_transfers = 2
    digest = hashlib.sha256(BODY).hexdigest()
    path = download.download_file(server + "/file", str(tmp_path / "a" / "file"), digest)
    assert content_of(path) == BODY
    assert os.listdir(tmp_path / "a") == ["file"]
    ranges = [requested_range for _, requested_range in Handler.requests]
    assert ranges[1:] == [f"bytes={len(BODY) // 2}-", f"bytes={len(BODY) * 3 // 4}-"]
    download.download_file(server + "/file", path)
    assert len(Handler.requests) == 3  # a file that is there is not downloaded again


def test_a_server_without_ranges_starts_over(server, tmp_path):
    Handler.broken_transfers = 1
    Handler.knows_ranges = False
    path = download.download_file(server + "/file", str(tmp_path / "file"))
    assert content_of(path) == BODY


def test_a_partial_file_that_cannot_be_continued_is_downloaded_again(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"x" * len(BODY))
    path = download.download_file(server + "/file", str(tmp_path / "file"))
    assert content_of(path) == BODY


def test_a_damaged_file_is_refused_and_removed(server, tmp_path):
    with pytest.raises(SystemExit, match="SHA-256 is .*damaged or has changed"):
        download.download_file(server + "/file", str(tmp_path / "file"), "0" * 64)
    assert not os.listdir(tmp_path)


def test_a_missing_file_is_requested_once(server, tmp_path):
    with pytest.raises(SystemExit, match="404"):
        download.download_file(server + "/missing", str(tmp_path / "file"))
    assert len(Handler.requests) == 1


# ---- a release ----


def test_the_files_of_a_release_are_chosen_from_its_repository(server, tmp_path):
    release = Release("some/repo", "^harmless-base/")
    (path,) = download.download_release(release, str(tmp_path))
    assert os.path.relpath(path, tmp_path) == "some/repo/main/harmless-base/train.jsonl"
    assert content_of(path) == BODY
    url, _ = Handler.requests[1]
    assert url == "/datasets/some/repo/resolve/main/harmless-base/train.jsonl"


def test_a_release_without_the_expected_files_is_refused(server, tmp_path):
    with pytest.raises(SystemExit, match="none of the files expected"):
        download.download_release(Release("some/repo", "^other/"), str(tmp_path))


def test_compressed_files_are_downloaded_as_they_are(server, tmp_path):
    release = Release("some/repo", "^packed/", revision="v0")
    paths = download.download_release(release, str(tmp_path))
    assert paths == [f"{tmp_path}/some/repo/v0/packed/train.jsonl.xz"]
    assert content_of(paths[0]) == BODY


def test_the_parquet_files_of_a_release_are_chosen_by_their_names(monkeypatch):
    published = ["data/test_prefs-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"]
    monkeypatch.setattr(download, "list_repository", lambda *arguments: published)
    assert download.choose_files(Release("some/repo", "_prefs")) == published[:1]


def test_a_raw_folder_without_readable_files_is_refused(tmp_path):
    (tmp_path / "x.xlsx").write_bytes(b"PK")
    with pytest.raises(SystemExit, match="--raw=.*no .jsonl, .json, .csv or .parquet file"):
        download.find_raw_files(str(tmp_path))
    with pytest.raises(SystemExit, match="--raw="):
        download.find_raw_files(str(tmp_path / "missing"))


def test_a_prepare_script_downloads(server, tmp_path):
    """Alpaca's file, at a local address, from a server that breaks off once."""
    with open(os.path.join(ROOT, "data", "alpaca", "prepare.py")) as f:
        text = f.read()
    address = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
    assert address in text
    script = tmp_path / "prepare.py"
    script.write_text(text.replace(address, server + "/alpaca_data.jsonl"))
    Handler.broken_transfers = 1
    run(script, f"--out={tmp_path}/out")
    with open(tmp_path / "out" / "train.jsonl") as f:
        assert len(f.readlines()) == 5000


# ---- conversion ----


def test_conversion_counts_what_it_drops(tmp_path, capsys):
    raw = tmp_path / "train.jsonl"
    raw.write_text('{"a": 1}\nbroken\n{"b": 2}\n{"a": -1}\n')

    def to_record(row):
        if row["a"] < 0:
            raise ValueError("negative")
        return {"input": str(row["a"])}

    download.convert([str(raw)], to_record, str(tmp_path / "out"))
    assert (tmp_path / "out" / "train.jsonl").read_text() == '{"input": "1"}\n'
    printed = capsys.readouterr().out
    assert "4 rows read, 1 kept" in printed
    assert "dropped 1 (not a JSON object)" in printed
    assert "(field 'a' is missing)" in printed
    assert "(negative)" in printed


# ---- JSON lists ----


class SlowFile(io.StringIO):
    """A text file of which each read() returns at most `size` characters."""

    def __init__(self, text, size):
        super().__init__(text)
        self.size = size

    def read(self, n=-1):
        return super().read(min(n, self.size))


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1}, {"b": [1, "]"]}]',
        "[]",
        ' [ {"a": "x"} ,\n{"b": "\\u4f60 \\" ,"}\n]\n',
        '[1, 23, "s"]',
    ],
)
@pytest.mark.parametrize("size", [1, 7, 2**16])
def test_a_json_list_is_read_item_by_item(text, size):
    expected = list(enumerate(json.loads(text), start=1))
    assert list(reader.read_json_list(SlowFile(text, size), "x")) == expected


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"a": 1}', "is not a list of rows"),
        ("", "breaks off"),
        ('[{"a": 1}, {"b', "breaks off"),
        ("[1", "breaks off"),
    ],
)
def test_a_broken_json_list_is_refused(text, words):
    with pytest.raises(SystemExit, match=words):
        list(reader.read_json_list(io.StringIO(text), "x"))


def test_a_large_json_list_is_not_in_memory_whole(tmp_path):
    path = tmp_path / "large.json"
    rows = [{"i": i, "text": "x" * 1000} for i in range(20000)]
    path.write_text(json.dumps(rows))
    tracemalloc.start()
    total = 0
    with open(path) as f:
        for _, row in reader.read_json_list(f, str(path)):
            total += row["i"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == sum(range(20000))
    assert peak < path.stat().st_size
