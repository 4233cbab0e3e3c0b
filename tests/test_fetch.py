"""Downloads against a local server that breaks off, refuses ranges, damages files; conversion."""

import hashlib
import http.server
import io
import json
import os
import threading
import tracemalloc

import pytest
from conftest import ROOT, run

from nanosafe.data import reader
from nanosafe.tools import download

BODY = b"".join(
    json.dumps({"instruction": f"i{i}", "input": "", "output": f"o{i}"}).encode() + b"\n"
    for i in range(5000)
)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves BODY; breaks off the first `breaks` transfers half-way; knows ranges unless told not to."""

    breaks, ranges, requests = 0, True, []

    def do_GET(self):
        cls = type(self)
        cls.requests.append((self.path, self.headers.get("Range")))
        if "/api/" in self.path:
            names = ["README.md", "harmless-base/train.jsonl", "helpful-base/train.jsonl"]
            body = json.dumps({"siblings": [{"rfilename": name} for name in names]}).encode()
            return self.answer(200, body)
        if "missing" in self.path:
            return self.answer(404, b"no")
        start = (
            int(self.headers["Range"].split("=")[1][:-1])
            if self.headers.get("Range") and cls.ranges
            else 0
        )
        body = BODY[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if cls.breaks:
            cls.breaks -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    Handler.breaks, Handler.ranges, Handler.requests = 0, True, []
    url = f"http://127.0.0.1:{httpd.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", url)
    yield url
    httpd.shutdown()


def test_a_broken_download_is_continued(server, tmp_path):
    Handler.breaks = 2
    path = download.download(
        server + "/file", str(tmp_path / "a" / "file"), hashlib.sha256(BODY).hexdigest()
    )
    assert open(path, "rb").read() == BODY and os.listdir(tmp_path / "a") == ["file"]
    assert [r for _, r in Handler.requests][1:] == [
        f"bytes={len(BODY) // 2}-",
        f"bytes={len(BODY) * 3 // 4}-",
    ]
    download.download(server + "/file", path)
    assert len(Handler.requests) == 3  # what is there is not fetched again


def test_a_server_without_ranges_starts_over(server, tmp_path):
    Handler.breaks, Handler.ranges = 1, False
    assert open(download.download(server + "/file", str(tmp_path / "file")), "rb").read() == BODY


def test_damage_and_absence_stop_with_one_line(server, tmp_path):
    with pytest.raises(SystemExit, match="SHA-256 is .*damaged or has changed"):
        download.download(server + "/file", str(tmp_path / "file"), "0" * 64)
    assert not os.listdir(tmp_path)
    with pytest.raises(SystemExit, match="404"):
        download.download(server + "/missing", str(tmp_path / "file"))
    assert len(Handler.requests) == 2  # a 404 is not tried again


def test_files_are_listed_and_picked(server, tmp_path):
    paths = download.raw_files(
        "", "some/repo", str(tmp_path), lambda name: name.startswith("harmless-base/")
    )
    assert [os.path.relpath(p, tmp_path) for p in paths] == ["raw/main/harmless-base/train.jsonl"]
    assert Handler.requests[1][0] == "/datasets/some/repo/resolve/main/harmless-base/train.jsonl"
    with pytest.raises(SystemExit, match="none of the files expected"):
        download.raw_files("", "some/repo", str(tmp_path), lambda name: False)
    with pytest.raises(SystemExit, match="--raw="):
        download.raw_files(str(tmp_path / "empty"), None, None, None)


def test_conversion_counts_what_it_drops(tmp_path, capsys):
    raw = tmp_path / "train.jsonl"
    raw.write_text('{"a": 1}\nbroken\n{"b": 2}\n{"a": -1}\n')

    def to_record(row):
        if row["a"] < 0:
            raise ValueError("negative")
        return {"input": str(row["a"])}

    download.convert([str(raw)], to_record, str(tmp_path / "out"))
    said = capsys.readouterr().out
    assert (
        tmp_path / "out" / "train.jsonl"
    ).read_text() == '{"input": "1"}\n' and "4 rows read, 1 kept" in said
    assert (
        "dropped 1 (no JSON object)" in said
        and "(field 'a' is missing)" in said
        and "(negative)" in said
    )


def test_a_prepare_script_downloads(server, tmp_path):
    """alpaca's file from a server that breaks off once: the script's URL is put on the local server."""
    text = open(os.path.join(ROOT, "data", "alpaca", "prepare.py")).read()
    script = tmp_path / "prepare.py"
    script.write_text(
        text.replace(
            "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json",
            server + "/alpaca.jsonl",
        ).replace("alpaca_data.json", "alpaca_data.jsonl")
    )
    Handler.breaks = 1
    run(script, f"--out={tmp_path}/out")
    assert sum(1 for _ in open(tmp_path / "out" / "train.jsonl")) == 5000


def test_a_repository_with_parquet_only_says_how_to_convert_it(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "list_files", lambda *a: ["data/train-00000-of-00001.parquet"])
    with pytest.raises(SystemExit, match="parquet files only.*read_parquet.*--raw=FOLDER"):
        download.raw_files("", "some/repo", str(tmp_path), lambda name: name.endswith(".jsonl"))
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(SystemExit, match="parquet is converted with.*read_parquet"):
        download.raw_files(str(tmp_path), None, None, None)


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
    class Slow(io.StringIO):
        def read(self, n=-1):
            return super().read(min(n, size))

    assert list(reader.json_items(Slow(text), "x")) == json.loads(text)


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"a": 1}', "is no list of rows"),
        ("", "breaks off"),
        ('[{"a": 1}, {"b', "breaks off"),
        ("[1", "breaks off"),
    ],
)
def test_a_broken_json_list_is_refused(text, words):
    with pytest.raises(SystemExit, match=words):
        list(reader.json_items(io.StringIO(text), "x"))


def test_a_large_json_list_is_not_in_memory_whole(tmp_path):
    path = tmp_path / "large.json"
    path.write_text(json.dumps([{"i": i, "text": "x" * 1000} for i in range(20000)]))
    tracemalloc.start()
    assert sum(row["i"] for row in reader.json_items(open(path), str(path))) == sum(range(20000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size
