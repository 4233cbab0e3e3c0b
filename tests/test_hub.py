"""Models by name: downloads from a server that behaves like the hub, and the cache that they fill,
which the real huggingface_hub reads and fills as well."""

import errno
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, run
from hub_server import Hub, checksum
from in_process import run_in_process

from nanosafe import checkpoint, hub, inference, parallel, tokenizer, transfer
from nanosafe.checkpoint import run_state
from nanosafe.hub import find_model
from nanosafe.tools import plan

NAME = "org-public/Tiny-Model"
WEIGHTS = bytes(range(256)) * 3000
FILES = {
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "README.md": b"# Tiny\n",
    "config.json": b'{"model_type": "llama"}\n',
    "generation_config.json": b'{"eos_token_id": 2}\n',
    "tokenizer.json": b'{"model": {}}\n',
    "tokenizer_config.json": b"{}\n",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"the same in a second format",
    "modeling_tiny.py": b"raise SystemExit('code from a repository was run')\n",
    "original/consolidated.00.pth": b"the same in a third format",
    "tiny.Q4_1.gguf": b"the same in a fourth format",
    "onnx/model.onnx": b"the same in a fifth format",
}
WANTED = [
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]
SHARDS = {
    "config.json": b"{}",
    "tokenizer.model": b"a tokenizer",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-2.safetensors"}}
    ).encode(),
    "model-00001-of-00002.safetensors": b"first",
    "model-2.safetensors": b"second",
    "model-3.safetensors": b"no index names it",
    "pytorch_model.bin.index.json": b"{}",
    "pytorch_model-00001-of-00001.bin": b"a second format",
}
VARIABLES = """HF_TOKEN HUGGING_FACE_HUB_TOKEN HF_TOKEN_PATH HF_HUB_DISABLE_IMPLICIT_TOKEN
    HF_HUB_CACHE HUGGINGFACE_HUB_CACHE XDG_CACHE_HOME HF_HUB_OFFLINE TRANSFORMERS_OFFLINE
    HF_HUB_DISABLE_SYMLINKS""".split()


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub with one model, and an empty cache in tmp_path/home/hub."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    running = Hub()
    monkeypatch.setenv("HF_ENDPOINT", running.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(transfer, "PAUSE", 0.0)
    monkeypatch.chdir(tmp_path)
    forget()
    running.commit = running.publish(NAME, FILES)
    yield running
    running.shutdown()
    running.server_close()
    forget()


def forget():
    """Forget what this process has found, as a new process would have to find it."""
    hub.found.clear()
    hub.commits.clear()


def start_new_process(monkeypatch):
    """As if the files in the cache were from before this process began."""
    forget()
    monkeypatch.setattr(hub, "PROCESS_BEGAN", time.time() + 60)


def content_of(path):
    with open(path, "rb") as f:
        return f.read()


def files_below(folder):
    """{path below a folder: what a link there names, or None for a file}."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            link = os.readlink(path) if os.path.islink(path) else None
            found[os.path.relpath(path, folder)] = link
    return found


def cache_of(tmp_path, name=NAME):
    return tmp_path / "home" / "hub" / ("models--" + name.replace("/", "--"))


def stop_message(name=NAME, **options):
    """The one line with which find_model() stops."""
    with pytest.raises(SystemExit) as stopped:
        find_model(name, **options)
    message = stopped.value.code
    assert message.startswith("error: ") and "\n" not in message
    return message


# ---- names ----


@pytest.mark.parametrize(
    "path",
    [
        "",
        "model",
        "out/sft/model",
        "./model",
        "../model",
        "/org/name",
        "org/name/",
        "~/model",
        "org/na me",
        "org/..",
        "org/a..b",
        "org/a--b",
        "-org/name",
        "org/name.",
        "org/name@",
        "org/name@../../x",
        "org/name@a//b",
        "org/" + "n" * 97,
        "örg/name",
        "hf://org/name",
        "org/name:f",
    ],
)
def test_what_is_no_name_of_the_hub_is_returned_as_it_is(server, path):
    assert find_model(path) == path
    assert not server.requests


def test_a_name_may_have_a_revision():
    assert hub.parse_name("a/b-c.d_1") == ("a/b-c.d_1", "main")
    assert hub.parse_name("a/b@refs/pr/1") == ("a/b", "refs/pr/1")
    assert hub.parse_name("a/b@v1.0") == ("a/b", "v1.0")


def test_a_folder_that_exists_is_no_name(server, tmp_path):
    (tmp_path / "org-public" / "Tiny-Model").mkdir(parents=True)
    assert find_model(NAME) == NAME
    assert find_model(tmp_path / "org-public") == str(tmp_path / "org-public")
    assert not server.requests


# ---- what is downloaded, and where to ----


def test_only_what_is_needed_is_downloaded(server, tmp_path):
    folder = find_model(NAME)
    assert folder == str(cache_of(tmp_path) / "snapshots" / server.commit)
    assert sorted(files_below(folder)) == WANTED
    for name in WANTED:
        assert content_of(os.path.join(folder, name)) == FILES[name]


def test_the_cache_has_the_layout_of_huggingface_hub(server, tmp_path):
    find_model(NAME)
    cache = files_below(cache_of(tmp_path))
    expected = {os.path.join("refs", "main"): None}
    for name in WANTED:
        blob = checksum(name, FILES[name])
        expected[f"blobs/{blob}"] = None
        up = "../../../" if "/" in name else "../../"
        expected[f"snapshots/{server.commit}/{name}"] = f"{up}blobs/{blob}"
    assert cache == expected
    assert (cache_of(tmp_path) / "refs" / "main").read_text() == server.commit


def test_the_shards_that_the_index_names_are_downloaded(server):
    server.publish("org/sharded", SHARDS)
    folder = find_model("org/sharded")
    assert sorted(os.listdir(folder)) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
    ]


def test_pickled_weights_are_downloaded_where_there_are_no_others(server):
    server.publish("org/old", {"config.json": b"{}", "pytorch_model.bin": b"x", "x.bin": b"y"})
    assert sorted(os.listdir(find_model("org/old"))) == ["config.json", "pytorch_model.bin"]


def test_an_adapter_is_downloaded(server):
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}
    server.publish("org/adapter", {**files, "adapter_model.bin": b"a second format"})
    assert sorted(os.listdir(find_model("org/adapter"))) == sorted(files)
    requests = len(server.requests)
    hub.found.clear()
    find_model("org/adapter")
    assert len(server.requests) == requests


def test_a_tokenizer_needs_no_weights(server):
    folder = find_model(NAME, weights=False)
    assert sorted(files_below(folder)) == [name for name in WANTED if "safetensors" not in name]
    requests = len(server.requests)
    find_model(NAME)
    assert server.seen()[requests:] == [
        f"/api/models/{NAME}/revision/{server.commit}",
        f"/{NAME}/resolve/{server.commit}/model.safetensors",
        f"/{NAME}/resolve/{server.commit}/model.safetensors",
        f"/storage/{NAME}/{server.commit}/model.safetensors",
    ]


@pytest.mark.parametrize("name", WANTED)
def test_an_interrupted_commit_is_completed(server, monkeypatch, name):
    """Whichever file it broke off at: what comes before it is not taken for the whole."""
    server.pieces[name] = b"x" * len(FILES[name])
    path = f"{NAME}@{server.commit}"
    stop_message(path, weights=name == "model.safetensors")
    server.pieces.clear()
    start_new_process(monkeypatch)
    folder = find_model(path, weights=False)
    assert set(WANTED) - {"model.safetensors"} <= files_below(folder).keys()
    assert sorted(files_below(find_model(path))) == WANTED


def test_a_revision_with_a_slash(server, tmp_path):
    commit = server.publish(NAME, {**FILES, "config.json": b"{}"}, branch="refs/pr/1")
    folder = find_model(NAME + "@refs/pr/1")
    assert os.path.basename(folder) == commit
    assert (cache_of(tmp_path) / "refs" / "refs" / "pr" / "1").read_text() == commit
    assert server.seen()[0].endswith("/revision/refs%2Fpr%2F1")


@pytest.mark.parametrize(
    "variables, cache",
    [
        ({"HF_HUB_CACHE": "a", "HUGGINGFACE_HUB_CACHE": "b"}, "a"),
        ({"HUGGINGFACE_HUB_CACHE": "b"}, "b"),
        ({"HF_HOME": "c", "XDG_CACHE_HOME": "d"}, "c/hub"),
        ({"HF_HOME": "", "XDG_CACHE_HOME": "d"}, "d/huggingface/hub"),
        ({"HF_HOME": ""}, "~/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_environment_says(server, monkeypatch, variables, cache):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hub.cache_folder() == os.path.expanduser(cache)


def test_two_revisions_share_their_files(server):
    first = find_model(NAME)
    changed = server.publish(NAME, {**FILES, "config.json": b"{}"}, branch="next")
    requests = len(server.requests)
    second = find_model(NAME + "@next")
    assert os.path.basename(second) == changed
    assert [p for p in server.seen("GET")[requests:] if "storage" in p] == []
    both = [
        os.path.realpath(os.path.join(folder, "model.safetensors")) for folder in (first, second)
    ]
    assert both[0] == both[1]


@pytest.mark.parametrize("reason", ["variable", "file system"])
def test_without_links_the_files_stand_in_the_snapshot(server, monkeypatch, tmp_path, reason):
    def refuse(*arguments):
        raise OSError(errno.EPERM, "no links here")

    if reason == "variable":
        monkeypatch.setenv("HF_HUB_DISABLE_SYMLINKS", "1")
    else:
        monkeypatch.setattr(os, "symlink", refuse)
    folder = find_model(NAME)
    assert files_below(folder) == dict.fromkeys(WANTED)
    assert content_of(os.path.join(folder, "model.safetensors")) == WEIGHTS
    assert os.listdir(cache_of(tmp_path) / "blobs") == []


def test_a_link_to_a_file_that_is_gone_is_replaced(server):
    folder = find_model(NAME)
    path = os.path.join(folder, "model.safetensors")
    os.remove(os.path.realpath(path))
    forget()
    assert find_model(NAME) == folder
    assert content_of(path) == WEIGHTS


# ---- requests ----


def test_a_name_costs_no_second_request(server):
    find_model(NAME)
    requests = len(server.requests)
    find_model(NAME)
    find_model(NAME, weights=False)
    assert len(server.requests) == requests


def test_a_complete_model_costs_one_request_for_its_commit(server, monkeypatch):
    folder = find_model(NAME)
    start_new_process(monkeypatch)
    requests = len(server.requests)
    assert find_model(NAME) == folder
    assert server.seen()[requests:] == [f"/api/models/{NAME}/revision/main"]


def test_a_moved_branch_is_followed(server, monkeypatch):
    first = find_model(NAME)
    moved = server.publish(NAME, {**FILES, "config.json": b"{}"})
    start_new_process(monkeypatch)
    second = find_model(NAME)
    assert os.path.basename(second) == moved
    assert os.path.isfile(os.path.join(first, "config.json"))


def test_a_branch_that_moves_while_a_process_runs_is_not_followed(server):
    first = find_model(NAME, weights=False)
    server.publish(NAME, {**FILES, "config.json": b"{}"})
    assert find_model(NAME) == first


def test_a_commit_that_is_complete_costs_no_request(server, monkeypatch):
    folder = find_model(f"{NAME}@{server.commit}")
    assert os.path.basename(folder) == server.commit
    start_new_process(monkeypatch)
    requests = len(server.requests)
    assert find_model(f"{NAME}@{server.commit}") == folder
    assert len(server.requests) == requests


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_no_request_is_made(server, monkeypatch, variable):
    folder = find_model(NAME)
    monkeypatch.setenv(variable, "1")
    start_new_process(monkeypatch)
    requests = len(server.requests)
    assert find_model(NAME) == folder
    assert find_model(NAME, weights=False) == folder
    message = stop_message("org/other")
    assert "no folder 'org/other'" in message and "HF_HUB_OFFLINE" in message
    assert len(server.requests) == requests


def test_offline_an_incomplete_model_is_refused(server, monkeypatch):
    server.publish("org/sharded", SHARDS)
    folder = find_model("org/sharded")
    os.remove(os.path.join(folder, "model-2.safetensors"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    forget()
    message = stop_message("org/sharded")
    assert "not complete in the cache" in message and "model-2.safetensors' is missing" in message


def test_without_network_the_cached_model_is_used(server, monkeypatch, capsys):
    folder = find_model(NAME)
    start_new_process(monkeypatch)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    capsys.readouterr()
    assert find_model(NAME) == folder
    printed = capsys.readouterr().out
    assert "cannot be had from http://127.0.0.1:9" in printed and folder in printed
    assert printed.splitlines()[1:] == [f"{NAME}: {folder}"]


def test_without_network_and_cache_it_stops(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = stop_message()
    assert "Connection refused" in message and "no folder of that name" in message


def test_another_ranks_question_counts(server, monkeypatch):
    find_model(NAME)
    forget()  # a rank that began when the first did, and waited for its download
    requests = len(server.requests)
    find_model(NAME)
    find_model(NAME, weights=False)
    assert len(server.requests) == requests


# ---- tokens ----


@pytest.mark.parametrize("place", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "file", "home"])
def test_the_token_goes_to_the_hub_and_to_no_other_host(server, monkeypatch, tmp_path, place):
    server.gated.add(NAME)
    server.members.add("hf_secret")
    if place in ("file", "home"):
        path = tmp_path / "home" / "token" if place == "home" else tmp_path / "token"
        path.parent.mkdir(exist_ok=True)
        path.write_text("hf_secret\n")
        if place == "file":
            monkeypatch.setenv("HF_TOKEN_PATH", str(path))
    else:
        monkeypatch.setenv(place, " hf_secret\n")
    server.renamed["old/name"] = NAME
    find_model("old/name")  # the hub's own redirects keep the token
    hosts = {"hub": 0, "storage": 0}
    for _, host, _, headers in server.requests:
        if host.startswith("127.0.0.1"):
            hosts["hub"] += 1
            assert headers["authorization"] == "Bearer hf_secret"
        else:
            hosts["storage"] += 1
            assert "authorization" not in headers
    assert hosts["hub"] > 10 and hosts["storage"] == 1


def test_the_tokens_file_may_be_left_alone(server, monkeypatch, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text("hf_secret")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    find_model(NAME, weights=False)
    assert not any("authorization" in headers for *_, headers in server.requests)


def test_a_token_that_is_none_is_refused(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_ä\x07")
    assert "HF_TOKEN" in stop_message()


# ---- errors ----


def test_a_gated_model_says_what_to_do(server, monkeypatch):
    server.gated.add(NAME)
    message = stop_message()
    assert f"accept its licence at {server.url}/{NAME}" in message and "HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "the account of the token has no access" in stop_message()


def test_a_model_that_does_not_exist(server, monkeypatch):
    message = stop_message("org/none")
    assert "no model 'org/none'" in message
    assert "if it is private, set HF_TOKEN" in message
    assert "a folder of that name is not there either" in message
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert "check HF_TOKEN" in stop_message("org/none")


def test_a_revision_that_does_not_exist(server):
    assert "has no revision 'v9'" in stop_message(NAME + "@v9")


def test_a_renamed_model_is_found_under_its_old_name(server, tmp_path, capsys):
    server.renamed["old/name"] = NAME
    folder = find_model("old/name")
    assert folder == str(cache_of(tmp_path, "old/name") / "snapshots" / server.commit)
    assert content_of(os.path.join(folder, "model.safetensors")) == WEIGHTS
    assert f"old/name is called {NAME} on the hub now\n" in capsys.readouterr().out


def test_a_model_without_weights(server):
    server.publish("org/gguf", {"config.json": b"{}", "x.Q4.gguf": b"x"})
    message = stop_message("org/gguf")
    assert "no weights that nanosafe reads" in message and "x.Q4.gguf" in message


def test_a_full_disk_is_noticed_before_the_download(server, monkeypatch):
    usage = hub.shutil.disk_usage(".")._replace(free=2**27)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage)
    message = stop_message()
    assert "free: make room, or set HF_HUB_CACHE" in message
    assert server.seen("GET") == [f"/api/models/{NAME}/revision/main"]


def test_a_disk_that_fills_while_it_downloads_is_one_line(server, monkeypatch):
    class FullFile:
        def __enter__(self):
            return self

        def __exit__(self, *arguments):
            return None

        def write(self, block):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transfer, "open_partial", lambda path, have: FullFile())
    assert "cannot be written: OSError: [Errno 28]" in stop_message()


@pytest.mark.parametrize(
    "index, words",
    [
        ({"weight_map": {"a": "../../x.safetensors"}}, "has no file of weights '../../x"),
        ({"weight_map": {"a": "evil.py"}}, "has no file of weights 'evil.py'"),
        ({"weight_map": {"a": "gone.safetensors"}}, "has no file of weights 'gone.safetensors'"),
        ({"weight_map": {"a": 3}}, "not a file"),
        ({"weight_map": []}, "not an object"),
        ([], "no JSON object"),
    ],
)
def test_a_hostile_index_downloads_nothing(server, index, words):
    files = {"config.json": b"{}", "evil.py": b"", "../../x.safetensors": b""}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    server.publish("org/hostile", files)
    assert words in stop_message("org/hostile")


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>",
        b"[]",
        b'{"siblings": 3}',
        b'{"sha": 3, "siblings": []}',
        b'{"sha": "../..", "siblings": []}',
        b'{"sha": "' + b"0" * 40 + b'", "siblings": [{"rfilename": ["x"]}]}',
        b"[" * 100_000,
    ],
)
def test_an_answer_that_is_no_listing_is_one_line(server, monkeypatch, answer):
    monkeypatch.setattr(transfer, "ask", lambda *arguments, **options: ({}, answer))
    message = stop_message()
    assert "no list of files" in message or "no commit" in message


@pytest.mark.parametrize("address", ["hub.example", "file:///etc", "http://[", "http://a:b"])
def test_an_endpoint_that_is_no_address_is_one_line(server, monkeypatch, address):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert address in stop_message()


@pytest.mark.parametrize(
    "target, words",
    [
        ("file:///etc/passwd", "no web address"),
        ("http://[", "no web address"),
        ("//127.0.0.1:x/", "port"),
        ("/api/models/old/name/revision/main", "more than 10 redirects"),
    ],
)
def test_a_redirect_that_leads_nowhere_is_one_line(server, target, words):
    server.locations["old/name"] = target
    assert words in stop_message("old/name")


# ---- busy servers, and transfers that break off ----


def test_a_busy_hub_is_asked_again(server):
    server.busy = [(429, "0"), (503, "")]
    find_model(NAME)
    assert len(server.seen("GET", "/revision/main")) == 3


def test_the_pause_is_what_the_hub_asks_for(server, monkeypatch):
    pauses = []
    monkeypatch.setattr(transfer, "PAUSE", 2.0)
    monkeypatch.setattr(transfer.time, "sleep", pauses.append)
    server.busy = [(429, "7"), (503, "")]
    find_model(NAME)
    assert pauses == [7.0, 4.0]
    server.busy = [(429, "86400"), (429, "in a while")]
    find_model(NAME + "@" + server.publish(NAME, SHARDS))
    assert pauses[2:] == [transfer.LONGEST_PAUSE, 4.0]


def test_a_hub_that_stays_busy_is_one_line(server):
    server.busy = [(503, "0")] * 9
    assert "answered 503" in stop_message()
    assert len(server.requests) == transfer.ATTEMPTS_TO_ASK


def test_a_broken_transfer_is_continued(server):
    server.breaks = 9
    folder = find_model(NAME)
    for name in WANTED:
        assert content_of(os.path.join(folder, name)) == FILES[name]
    assert server.breaks == 0
    assert any("range" in headers for *_, headers in server.requests)


def test_an_interrupted_download_is_continued_by_the_next(server, tmp_path):
    server.stops_at = half = len(WEIGHTS) // 2
    message = stop_message()
    assert f"{half} of {len(WEIGHTS)} bytes arrived" in message
    assert "the next attempt goes on from what has arrived" in message
    blob = checksum("model.safetensors", WEIGHTS)
    partial = cache_of(tmp_path) / "blobs" / f"{blob}.incomplete"
    assert partial.read_bytes() == WEIGHTS[:half]
    assert repr(str(partial)) in message
    server.stops_at = None
    requests = len(server.requests)
    folder = find_model(NAME)
    assert content_of(os.path.join(folder, "model.safetensors")) == WEIGHTS
    ranges = [headers.get("range") for *_, headers in server.requests[requests:]]
    assert ranges.count(f"bytes={half}-") == 2  # at the hub, and where it redirects to
    assert not partial.exists()


def test_a_server_without_ranges_starts_over(server):
    server.knows_ranges = False
    server.breaks = 1
    folder = find_model(NAME)
    server.breaks = 0
    assert sorted(files_below(folder)) == WANTED
    for name in WANTED:
        assert content_of(os.path.join(folder, name)) == FILES[name]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file_is_refused_and_removed(server, tmp_path, name):
    server.pieces[name] = b"x" * len(FILES[name])
    message = stop_message()
    assert "the checksum is" in message and "start again" in message
    kept = os.listdir(cache_of(tmp_path) / "blobs")
    assert not [blob for blob in kept if blob.startswith(checksum(name, FILES[name]))]
    server.pieces.clear()
    assert content_of(os.path.join(find_model(NAME), name)) == FILES[name]


def test_a_file_that_is_longer_than_announced_is_refused(server):
    server.pieces["model.safetensors"] = WEIGHTS + b"more"
    assert "bytes arrived" in stop_message()


def test_a_file_without_a_checksum_is_refused(server, monkeypatch):
    headers = {"ETag": '"../../evil"', "Content-Length": "3"}
    real = transfer.ask

    def ask(url, method="GET", **options):
        return (headers, b"") if method == "HEAD" else real(url, method, **options)

    monkeypatch.setattr(transfer, "ask", ask)
    assert "without its size or its checksum" in stop_message()


# ---- a cache that others use as well ----


def run_huggingface_hub(code, server, tmp_path, offline, cache="home"):
    """What a program prints that has imported huggingface_hub; nanosafe's process keeps clear."""
    environment = {**os.environ, "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1"}
    environment["HF_HOME"] = str(tmp_path / cache)
    environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    command = [sys.executable, "-c", "from huggingface_hub import *\n" + code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_huggingface_hub_finds_what_was_downloaded(server, tmp_path):
    pytest.importorskip("huggingface_hub")
    folder = find_model(NAME)
    code = f"""
print(snapshot_download("{NAME}", local_files_only=True))
print(try_to_load_from_cache("{NAME}", "model.safetensors"))
print(hf_hub_download("{NAME}", "additional_chat_templates/tool_use.jinja"))
print(len(scan_cache_dir().warnings), scan_cache_dir().size_on_disk)
"""
    size = sum(len(FILES[name]) for name in WANTED)
    assert run_huggingface_hub(code, server, tmp_path, offline=True).splitlines() == [
        folder,
        f"{folder}/model.safetensors",
        f"{folder}/additional_chat_templates/tool_use.jinja",
        f"0 {size}",
    ]


def test_what_huggingface_hub_downloaded_is_found(server, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    code = f'print(snapshot_download("{NAME}", allow_patterns={WANTED}))'
    theirs = run_huggingface_hub(code, server, tmp_path, offline=False)
    requests = len(server.requests)
    monkeypatch.setattr(hub, "PROCESS_BEGAN", time.time() + 60)
    assert find_model(NAME) == theirs
    assert server.seen()[requests:] == [f"/api/models/{NAME}/revision/main"]
    ours = files_below(cache_of(tmp_path))

    # And an empty cache that nanosafe fills has the same files and links.
    monkeypatch.setenv("HF_HOME", str(tmp_path / "second"))
    forget()
    find_model(NAME)
    second = files_below(tmp_path / "second" / "hub" / cache_of(tmp_path).name)
    assert second == {path: link for path, link in ours.items() if not path.startswith("trees")}


def test_a_part_that_huggingface_hub_downloaded_is_completed(server, tmp_path):
    pytest.importorskip("huggingface_hub")
    code = f'hf_hub_download("{NAME}", "model.safetensors")'
    run_huggingface_hub(code, server, tmp_path, offline=False)
    folder = find_model(NAME)
    assert sorted(files_below(folder)) == WANTED
    assert server.seen("GET", ".safetensors") == [
        f"/storage/{NAME}/{server.commit}/model.safetensors"  # theirs
    ]


def test_a_recorded_cache_is_found(server, monkeypatch):
    """The cache that huggingface_hub 2.4 made, and the list of its files and links."""
    spec = os.path.join(os.path.dirname(ROOT), "shared", "spec", "models")
    if not os.path.isdir(spec):
        pytest.skip("the recorded cache is not beside the repository")
    with open(os.path.join(spec, "hub_requests.json")) as f:
        recorded = json.load(f)
    commit = recorded["commit"]
    snapshot = os.path.join("hub", "models--org-public--Tiny-Model", "snapshots", commit)
    files = {}
    for parent, _, names in os.walk(os.path.join(spec, "hub_cache", snapshot)):
        for name in names:
            path = os.path.join(parent, name)
            relative = os.path.relpath(path, os.path.join(spec, "hub_cache", snapshot))
            files[relative] = content_of(path)
    server.models[NAME] = {commit: {**files, "modeling_tiny.py": b""}}
    server.refs[NAME, "main"] = commit
    folder = find_model(NAME)
    ours = files_below(os.path.dirname(os.path.dirname(folder)))
    theirs = {}
    begin = "hub/models--org-public--Tiny-Model/"
    for path, link in recorded["tree"]:
        relative = path.removeprefix(begin)
        if relative != path and relative.startswith(("blobs", "refs", "snapshots")):
            if not relative.endswith(".incomplete"):
                theirs[relative] = link if isinstance(link, str) else None
    assert ours == theirs

    monkeypatch.setenv("HF_HUB_CACHE", os.path.join(spec, "hub_cache", "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    forget()
    assert find_model(NAME) == os.path.join(spec, "hub_cache", snapshot)


def test_a_cache_that_may_only_be_read_is_used(server, monkeypatch, tmp_path):
    folder = find_model(NAME)
    start_new_process(monkeypatch)

    def refuse(*arguments, **options):
        raise PermissionError(errno.EROFS, "Read-only file system")

    for name in ("makedirs", "utime", "replace", "symlink"):
        monkeypatch.setattr(os, name, refuse)
    assert find_model(NAME) == folder


def test_two_processes_download_once(server, tmp_path):
    script = tmp_path / "find.py"
    script.write_text(
        "from nanosafe import parallel\n"
        "from nanosafe.hub import find_model\n"
        "parallel.init('cpu')\n"
        f"print(find_model({NAME!r}), flush=True)\n"
        "parallel.close()\n"
    )
    server.breaks = 5
    done = run(script, ranks=2)
    folder = find_model(NAME)
    assert sorted(done.stdout.splitlines()) == [folder, folder, f"{NAME}: {folder}"]
    assert len(server.seen("GET", "/revision/main")) == 1
    assert len(server.seen("HEAD")) == len(WANTED)
    assert "another process downloads" not in done.stdout


def test_whoever_waits_for_a_lock_says_so(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub, "QUIET_WAIT", 0.0)
    path = str(tmp_path / "locks" / "x.lock")
    order = []

    def wait():
        with hub.locked(path):
            order.append("second")

    with hub.locked(path):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert f"another process downloads the same model: waiting for {path!r}" in (
        capsys.readouterr().out
    )


# ---- from a name to a model ----


@pytest.fixture
def toy_name(server, world):
    """The name of a model that opens, with its tokenizer."""
    files = {}
    for name in os.listdir(world / "policy"):
        files[name] = content_of(world / "policy" / name)
    server.publish("org/toy", files)
    return "org/toy"


def test_a_name_opens_wherever_a_folder_does(toy_name, world, server):
    tok = tokenizer.load(toy_name)
    assert not server.seen(ending=".safetensors")
    assert tok.fingerprint == tokenizer.load(world / "policy").fingerprint
    model = checkpoint.load(toy_name)
    expected = checkpoint.load(world / "policy").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name])
    assert checkpoint.count_parameters(toy_name) == checkpoint.count_parameters(world / "policy")
    with pytest.raises(SystemExit, match="is a policy: it has no score head"):
        checkpoint.check_score_model(toy_name, "reward")
    assert run_state.fingerprint(toy_name) == run_state.fingerprint(str(world / "policy"))
    alone = parallel.World(0, 1, torch.device("cpu"), True)
    folder = find_model(toy_name)
    assert inference.fingerprint_model(model, toy_name, alone) == (
        inference.fingerprint_model(model, folder, alone)
    )


@pytest.mark.slow
def test_transformers_finds_the_model_without_network(toy_name, world, server, tmp_path):
    find_model(toy_name)
    requests = len(server.requests)
    code = f"""
import torch
from transformers import AutoModelForCausalLM
theirs = AutoModelForCausalLM.from_pretrained("{toy_name}").state_dict()
ours = AutoModelForCausalLM.from_pretrained("{world / "policy"}").state_dict()
print(all(torch.equal(theirs[name], ours[name]) for name in ours))
"""
    assert run_huggingface_hub(code, server, tmp_path, offline=True) == "True"
    assert len(server.requests) == requests


def test_a_name_is_answered_from(toy_name, monkeypatch, capsys):
    flags = [f"--model={toy_name}", "--prompt=hi", "--max_new_tokens=4", "--device=cpu"]
    run_in_process("sample.py", *flags, monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.slow
def test_a_name_is_trained_from_on_two_ranks_and_resumed(toy_name, world, server, tmp_path):
    flags = [
        f"--init_from={toy_name}",
        f"--data={world}/data/sft/train.jsonl:40/-1",
        f"--out_dir={tmp_path}/out",
        "--batch_size=8",
        "--save_interval=1",
        "--lr_schedule=constant",
        "--max_len=200",
    ]
    run("train_sft.py", *flags, "--max_steps=1", ranks=2)
    files = server.models[toy_name][server.refs[toy_name, "main"]]
    assert len(server.seen("GET", "/revision/main")) == 1
    received = server.seen("GET", ".model") + server.seen("GET", ".safetensors")
    assert len(received) == 4  # each of the two large files at the hub, and where they are stored

    # The branch moves, and the model stays: the run may go on.
    server.publish(toy_name, {**files, "README.md": b"now with a licence"})
    run("train_sft.py", *flags, "--max_steps=2", "--resume=True")
    assert server.seen("GET", ".model") + server.seen("GET", ".safetensors") == received

    # Other weights under the same name are refused.
    changed = bytearray(files["model.safetensors"])
    changed[-1] ^= 1
    server.publish(toy_name, {**files, "model.safetensors": bytes(changed)})
    done = run("train_sft.py", *flags, "--max_steps=3", "--resume=True", check=False)
    assert done.returncode and "the same name with other contents" in done.stderr


def test_a_name_is_converted(toy_name, tmp_path):
    run("-m", "nanosafe.checkpoint", toy_name, tmp_path / "copy")
    copy = checkpoint.load(tmp_path / "copy").state_dict()
    for name, tensor in checkpoint.load(toy_name).state_dict().items():
        assert torch.equal(tensor, copy[name])


def test_a_name_is_planned_with_its_own_shape(toy_name, world, server):
    config = plan.read_shape({"init_from": toy_name, "shape": ""})
    assert config.hidden_size == 32
    assert not server.seen(ending=".safetensors")
    assert plan.find_shape_in("org/Model-1.7B") == ""
    assert plan.find_shape_in("org/Model-7B-chat") == "7b"
