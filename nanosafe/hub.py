"""Models by name: ORG/NAME or ORG/NAME@REVISION of the Hugging Face hub, in its standard cache.

find_model() returns the folder of a model that is named so, and downloads what is missing there:
config, tokenizer, chat templates and weights; never code, and never a second format of the weights.
The cache is laid out as huggingface_hub does, so that transformers finds the same files:

    models--ORG--NAME/refs/REVISION             the commit that a branch or a tag stood for
    models--ORG--NAME/snapshots/COMMIT/FILE     a relative link to ../../blobs/CHECKSUM
    models--ORG--NAME/blobs/CHECKSUM            a file
    .locks/models--ORG--NAME/CHECKSUM.lock      held while that file is downloaded

Of the processes that want a model at once, such as the ranks of a node, one downloads it, and the
others wait for a lock and then find it there."""

import fcntl
import hashlib
import os
import re
import shutil
import time
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import quote

from tqdm import tqdm

from nanosafe import transfer
from nanosafe.errors import one_line_errors, stop
from nanosafe.printing import print_once
from nanosafe.storage import atomic_write, flush_to_disk, make_folder, read_json

NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./+-]*))?", re.ASCII)
NOT_IN_NAMES = re.compile(r"\.\.|--|[.-]/|[.-]$")
NOT_IN_REVISIONS = re.compile(r"\.\.|//|/$")
LONGEST_NAME = 96  # characters
COMMIT = re.compile("[0-9a-f]{40}")
SHA1 = re.compile("[0-9a-f]{40}")
SHA256 = re.compile("[0-9a-f]{64}")

WEIGHT_FILES = (  # of a model folder; the first that exists is read
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")  # the first counts
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json")
SHARD = re.compile(r"\w[\w.-]*\.(safetensors|bin)", re.ASCII)
OTHER_FORMATS = (".gguf", ".pth", ".onnx", ".bin", ".safetensors")
SMALL_FILES = (  # in this order, so that where config.json is, the others are
    "generation_config.json",
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "adapter_config.json",
    "config.json",
)
TEMPLATE = re.compile(r"additional_chat_templates/\w[\w.-]*\.jinja", re.ASCII)
SPACE_TO_SPARE = 2**27  # bytes that stay free on the cache's disk
LOOK_EVERY = 0.1  # seconds between two looks at a lock
QUIET_WAIT = 10.0  # seconds of waiting for a lock before a message

PROCESS_BEGAN = time.time()
found = {}  # (path, with weights) -> the folder that find_model() has returned
commits = {}  # Model -> the commit that this process has begun with


class Model(NamedTuple):
    name: str  # ORG/NAME
    revision: str


class RemoteFile(NamedTuple):
    name: str  # its path in the repository
    url: str
    size: int  # bytes
    checksum: str  # SHA-256, or git's SHA-1 of a small file


def find_model(path, weights=True):
    """The folder of a model: `path` as it is, or where the model of that name is in the cache.

    A path that exists, or that cannot be a name of the hub, is returned as it is. What is missing
    in the cache is downloaded first; stops with one line where that fails.

    weights  False: config, tokenizer and templates are enough"""
    path = os.fspath(path)
    model = parse_name(path)
    if model is None or os.path.exists(path):
        return path
    if (path, weights) not in found:
        folder = find_snapshot(model, weights)
        if (path, not weights) not in found:
            print_once(f"{path}: {folder}")  # which names the commit
        found[path, weights] = folder
    return found[path, weights]


def parse_name(path):
    """The Model that a text names; None where it cannot be a name of the hub."""
    match = NAME.fullmatch(path)
    if not match:
        return None
    model = Model(match[1], match[2] or "main")
    if NOT_IN_NAMES.search(model.name) or NOT_IN_REVISIONS.search(model.revision):
        return None
    return model if len(model.name) <= LONGEST_NAME else None


def find_snapshot(model, weights):
    """The folder of a Model in the cache, complete."""
    if transfer.is_offline():
        return find_offline(model, weights)
    with locked(lock_path(model, "nanosafe")):
        commit = find_commit_asked_for(model)
        if commit and not find_missing(snapshot_folder(model, commit), weights):
            return snapshot_folder(model, commit)
        return update_snapshot(model, weights)


# ---- the cache ----


def cache_folder():
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return os.path.expanduser(os.path.expandvars(os.environ[name]))
    return os.path.join(transfer.hub_home(), "hub")


def repository_folder(model):
    return os.path.join(cache_folder(), "models--" + model.name.replace("/", "--"))


def snapshot_folder(model, commit):
    return os.path.join(repository_folder(model), "snapshots", commit)


def ref_path(model):
    return os.path.join(repository_folder(model), "refs", model.revision)


def lock_path(model, name):
    folder = os.path.basename(repository_folder(model))
    return os.path.join(cache_folder(), ".locks", folder, name + ".lock")


def read_cached_commit(model):
    """The commit that a revision is, or was when the hub was asked last; "" where none is known."""
    if COMMIT.fullmatch(model.revision):
        return model.revision
    path = ref_path(model)
    if not os.path.isfile(path):
        return ""
    with one_line_errors(path), open(path, encoding="utf-8") as f:
        commit = f.read().strip()
    return commit if COMMIT.fullmatch(commit) else ""


def find_commit_asked_for(model):
    """The commit of a revision where the hub need not be asked for it; "" where it must be.

    A commit stays what it is. A branch is asked for once: by this process, or by another rank since
    this process began, which shows in the time of the file in refs."""
    if model in commits:
        return commits[model]
    path = ref_path(model)
    is_fresh = os.path.isfile(path) and os.path.getmtime(path) >= PROCESS_BEGAN
    if is_fresh or COMMIT.fullmatch(model.revision):
        return read_cached_commit(model)
    return ""


def find_missing(snapshot, weights):
    """The name of a file that a snapshot lacks; "" where it has what is needed.

    The cache may hold a part of a model: what another program asked for, or has got so far."""

    def lacks(*names):
        return not any(os.path.isfile(os.path.join(snapshot, name)) for name in names)

    if not weights:
        if lacks("config.json"):
            return "config.json"
        return TOKENIZER_FILES[0] if lacks(*TOKENIZER_FILES) else ""
    if not lacks("adapter_config.json") and not lacks(*ADAPTER_FILES):
        return ""
    if lacks("config.json"):
        return "config.json"
    for name in WEIGHT_FILES:
        if not lacks(name):
            absent = [file for file in list_weight_files(snapshot, name) if lacks(file)]
            return absent[0] if absent else ""
    return WEIGHT_FILES[0]


def find_offline(model, weights):
    """The folder of a Model in the cache, without a request; stops where it is not there."""
    commit = read_cached_commit(model)
    snapshot = snapshot_folder(model, commit)
    if not commit or not os.path.isdir(snapshot):
        stop(
            f"there is no folder {model.name!r}, and no such model (revision {model.revision}) in "
            f"the cache {cache_folder()!r}; HF_HUB_OFFLINE forbids to download it"
        )
    missing = find_missing(snapshot, weights)
    if missing and weights:  # without a tokenizer, its reader says so
        stop(
            f"{model.name!r} is not complete in the cache: {os.path.join(snapshot, missing)!r} is "
            "missing, and HF_HUB_OFFLINE forbids to download it"
        )
    return snapshot


@contextmanager
def locked(path):
    """Hold a lock file while the block runs. The operating system gives it up with the process.

    A cache that may only be read, or a file system without locks, goes without."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(path, "a")
    except OSError:
        file = None
    if file is None:
        yield
        return
    with file:
        wait_for_lock(file, path)
        yield


def wait_for_lock(file, path):
    """Take the lock of an open file, and say after a while that another process has it."""
    deadline = time.monotonic() + QUIET_WAIT
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(LOOK_EVERY)
        except OSError:  # a file system without locks
            return
        if time.monotonic() > deadline:
            deadline = float("inf")
            print_once(f"another process downloads the same model: waiting for {path!r}")


# ---- what is published, and what of it is wanted ----


def update_snapshot(model, weights):
    """Ask the hub for a Model's commit, and download what the cache lacks of it.

    Where the hub does not answer, the cached commit is taken, with a message."""
    cached = find_cached_snapshot(model, weights)
    revision = find_commit_asked_for(model) or model.revision
    try:
        attempts = 1 if cached else transfer.ATTEMPTS_TO_ASK
        listing = transfer.list_repository("models", model.name, revision, attempts)
    except transfer.FAILURES as error:
        reason = explain_refusal(error, model)
        if not cached:
            stop(reason)
        say(f"{reason}. What the cache has of it is used: {cached}")
        mark_as_asked(model)
        return cached
    if not COMMIT.fullmatch(listing.commit):
        stop(f"{transfer.hub_address()} says no commit of {model.name!r}: {listing.commit[:80]!r}")
    if listing.name != model.name:
        say(f"{model.name} is called {listing.name} on the hub now")
    commits[model] = listing.commit
    download_snapshot(model, listing, weights)
    write_ref(model, listing.commit)
    return snapshot_folder(model, listing.commit)


def find_cached_snapshot(model, weights):
    """The folder of what the cache has of a revision; "" where that is not complete."""
    commit = read_cached_commit(model)
    snapshot = snapshot_folder(model, commit)
    return "" if not commit or find_missing(snapshot, weights) else snapshot


def write_ref(model, commit):
    """Note in the cache that a branch or a tag is a commit, and that it was asked for now."""
    if COMMIT.fullmatch(model.revision):
        return
    if read_cached_commit(model) == commit:
        mark_as_asked(model)
        return
    path = ref_path(model)
    make_folder(os.path.dirname(path))
    with atomic_write(path, encoding="utf-8") as f:
        f.write(commit)


def mark_as_asked(model):
    """Note that the hub was asked for a revision now, so that the other ranks need not ask."""
    commits[model] = read_cached_commit(model)
    try:
        os.utime(ref_path(model))
    except OSError:  # a cache that may only be read
        pass


def download_snapshot(model, listing, weights):
    """Download those files of a Listing that are wanted, and that the cache lacks."""
    published = set(listing.files)
    names = sorted(name for name in published if TEMPLATE.fullmatch(name))
    names += [name for name in SMALL_FILES if name in published]
    if weights:
        names += choose_weight_files(model, listing, published)
    snapshot = snapshot_folder(model, listing.commit)
    missing = [name for name in names if not os.path.isfile(os.path.join(snapshot, name))]
    download_files(model, listing.commit, missing)


def choose_weight_files(model, listing, published):
    """The names of the files of weights: one format, and an adapter's. An index is downloaded."""
    names = [name for name in ADAPTER_FILES if name in published][:1]
    for name in WEIGHT_FILES:
        if name not in published:
            continue
        names.append(name)
        if name.endswith(".json"):
            snapshot = snapshot_folder(model, listing.commit)
            if not os.path.isfile(os.path.join(snapshot, name)):
                download_files(model, listing.commit, [name])
            names += list_weight_files(snapshot, name)
        break
    if not names:
        others = sorted(name for name in published if name.endswith(OTHER_FORMATS))
        stop(
            f"{model.name!r} has no weights that nanosafe reads ({', '.join(WEIGHT_FILES)}); "
            f"it has {', '.join(others[:3]) or 'none at all'}"
        )
    for name in names:  # a stranger's index may name anything
        is_plain = SHARD.fullmatch(name) or name in WEIGHT_FILES
        if name not in published or not is_plain:
            stop(f"{model.name!r} has no file of weights {name!r}, which its index names")
    return names


def list_weight_files(folder, name):
    """The files that hold the weights of a folder, where `name` is one of WEIGHT_FILES there."""
    if not name.endswith(".index.json"):
        return [name]
    return sorted(set(read_weight_map(folder, name).values()))


def read_weight_map(folder, name):
    """{tensor: file} of an index of weights, which is not empty."""
    with one_line_errors(folder):
        weight_map = read_json(folder, name).get("weight_map", {})
    if not isinstance(weight_map, dict):
        stop(f"{folder!r}: the weight_map in {name} is not an object")
    for file in weight_map.values():
        if not isinstance(file, str):
            stop(f"{folder!r}: the weight_map in {name} names {file!r}, which is not a file")
    if not weight_map:
        stop(f"no weights in {folder!r}: the weight_map in {name} is empty")
    return weight_map


# ---- files ----


def download_files(model, commit, names):
    """Download files of a commit into the cache, with one progress bar."""
    if not names:
        return
    files = [ask_for_file(model, commit, name) for name in names]
    check_space(model, files)
    total = sum(file.size for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc=model.name) as bar:
        for file in files:
            download_file(model, commit, file, bar)


def ask_for_file(model, commit, name):
    """The RemoteFile of a path in a repository: its size and its checksum, as the hub says them."""
    url = f"{transfer.hub_address()}/{model.name}/resolve/{commit}/{quote(name)}"
    try:
        headers, _ = transfer.ask(url, "HEAD")
    except transfer.FAILURES as error:
        stop(explain_refusal(error, model, name))
    etag = headers.get("X-Linked-ETag") or headers.get("ETag", "")
    checksum = etag.removeprefix("W/").strip('"')
    size = transfer.read_number(headers, "X-Linked-Size")
    if size is None:
        size = transfer.read_number(headers, "Content-Length")
    if size is None or not (SHA1.fullmatch(checksum) or SHA256.fullmatch(checksum)):
        stop(f"{url} comes without its size or its checksum (ETag {etag[:80]!r}): not downloaded")
    return RemoteFile(name, url, size, checksum)


def check_space(model, files):
    """Stop unless the disk of the cache has room for what is missing of files."""
    blobs = os.path.join(repository_folder(model), "blobs")
    make_folder(blobs)
    needed = 0
    for file in files:
        blob = os.path.join(blobs, file.checksum)
        have = max(transfer.size_of(blob), transfer.size_of(blob + ".incomplete"))
        needed += max(0, file.size - have)
    free = shutil.disk_usage(blobs).free
    if needed and needed + SPACE_TO_SPARE > free:
        stop(
            f"{model.name!r} needs {needed / 1e9:.2f} GB, and the disk of the cache "
            f"{cache_folder()!r} has {free / 1e9:.2f} GB free: make room, or set HF_HUB_CACHE to "
            "a folder on another disk"
        )


def download_file(model, commit, file, bar):
    """Download a file to blobs, unless it is there, and give it its name in the snapshot.

    What has arrived is kept in CHECKSUM.incomplete, and continued by the next download."""
    blob = os.path.join(repository_folder(model), "blobs", file.checksum)
    partial = blob + ".incomplete"
    with locked(lock_path(model, file.checksum)):
        is_new = transfer.size_of(blob) != file.size or not os.path.exists(blob)
        if is_new:
            receive(model, file, partial, bar)
            check_content(file, partial)
            flush_to_disk(partial)
            os.replace(partial, blob)
        else:
            bar.update(file.size)
        target = os.path.join(snapshot_folder(model, commit), file.name)
        place_blob(blob, target, is_new)


def receive(model, file, partial, bar):
    try:
        transfer.receive_file(file.url, partial, bar, file.size)
    except transfer.FAILURES as error:
        reason = explain_refusal(error, model, file.name)
        if transfer.size_of(partial):
            reason += f"; the next attempt goes on from what has arrived, in {partial!r}"
        stop(reason)


def check_content(file, partial):
    """Stop, and remove what was received, unless it has the checksum that the hub says."""
    if SHA256.fullmatch(file.checksum):
        digest = transfer.hash_file(partial, hashlib.sha256())
    else:  # git's: of a header and the content
        header = f"blob {file.size}\0".encode()
        digest = transfer.hash_file(partial, hashlib.sha1(header, usedforsecurity=False))
    if digest != file.checksum:
        os.remove(partial)
        stop(
            f"{file.url}: the checksum is {digest}, not {file.checksum} as the hub says: it "
            "arrived damaged and was removed, so start again"
        )


def place_blob(blob, target, is_new):
    """Give a blob its name in a snapshot: by a relative link, or the file itself without links.

    is_new  whether it was downloaded now, so that no other snapshot has a link to it"""
    make_folder(os.path.dirname(target))
    if os.path.lexists(target):  # a link to a blob that is gone
        os.remove(target)
    with one_line_errors(target, "written"):
        if not transfer.is_set("HF_HUB_DISABLE_SYMLINKS"):
            try:
                os.symlink(os.path.relpath(blob, os.path.dirname(target)), target)
                return
            except OSError:  # a file system without links
                pass
        if not is_new:
            shutil.copyfile(blob, target + ".tmp")
            blob = target + ".tmp"
        os.replace(blob, target)


# ---- messages ----


def say(text):
    """Print a line above progress bars, on whichever rank it is that downloads."""
    tqdm.write(text)


def explain_refusal(error, model, file=""):
    """What went wrong with a request for a model, or for a file of it, and what to do."""
    hub = transfer.hub_address()
    headers = getattr(error, "headers", None) or {}
    status = getattr(error, "code", None)
    kind = headers.get("X-Error-Code", "")
    words = " ".join(headers.get("X-Error-Message", "").split())[:200]
    if status is None:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        what = f"{file} of {model.name!r}" if file else f"the model {model.name!r}"
        where = "" if file else "; there is no folder of that name either (HF_ENDPOINT: a mirror)"
        return f"{what} cannot be had from {hub} ({reason}){where}"
    if kind == "GatedRepo":
        licence = f"{hub}/{model.name}"
        if transfer.read_token() and status != 401:
            return (
                f"{model.name!r} is gated, and the account of the token has no access: accept its "
                f"licence at {licence}, or wait for its authors"
            )
        return (
            f"{model.name!r} is gated: accept its licence at {licence}, and set HF_TOKEN to a "
            "token of that account"
        )
    if kind == "RevisionNotFound":
        return f"{model.name!r} has no revision {model.revision!r} at {hub}"
    if kind == "EntryNotFound":
        return f"{model.name!r} has no file {file!r} at {hub}"
    if status in (401, 404):
        hint = "check HF_TOKEN" if transfer.read_token() else "if it is private, set HF_TOKEN"
        return (
            f"no model {model.name!r} at {hub} ({words or status}; {hint}), and a folder of that "
            "name is not there either"
        )
    if status == 403:
        return f"no access to {model.name!r} at {hub}: {words or 'forbidden'}"
    return f"{hub} answered {status} for {model.name!r}: {words or error}"
