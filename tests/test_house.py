"""The house: formatting, who imports whom, dependencies, knobs, and the names that docs mention."""

import ast
import glob
import os
import re
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT

import configurator
from nanosafe.tools import download

TRAINERS = ("train_sft.py", "train_pref.py", "train_ppo_lag.py", "nanosafe/phf/train.py")
RUN_TIME = {"torch", "numpy", "sentencepiece", "safetensors", "tqdm"}
OWN = {"nanosafe", "configurator", "config", *(name[:-3] for name in TRAINERS[:3]), "sample"}
OPTIONAL = {"wandb", "matplotlib", "pycodestyle", "detoxify", "readline"}  # inside functions only
MEASURING = {"transformers", "trl", "datasets"}  # what nanosafe.bench measures beside


def find_python_files(*patterns):
    """Paths below the repository's root."""
    found = set()
    for pattern in patterns:
        found.update(glob.glob(pattern, root_dir=ROOT, recursive=True))
    return sorted(found)


PACKAGE = find_python_files("nanosafe/**/*.py")
SCRIPTS = find_python_files("*.py")
PREPARE = find_python_files("data/*/prepare.py")
RECIPES = find_python_files("config/**/*.py")
PRODUCT = [*SCRIPTS, *PACKAGE, *PREPARE, *RECIPES]


@cache
def source(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        return f.read()


@cache
def parse(path):
    return ast.parse(source(path))


def imported_names(node):
    """The dotted names that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def imports_of(path):
    """Every dotted name that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(parse(path)):
        names.update(imported_names(node))
    return names


def file_of(name):
    """The file of the package that a dotted name is, or is defined in; None for other packages."""
    while name:
        for path in (name.replace(".", "/") + ".py", name.replace(".", "/") + "/__init__.py"):
            if os.path.isfile(os.path.join(ROOT, path)):
                return path
        name = name.rpartition(".")[0]
    return None


def own_imports(path):
    """The product's files that a file imports."""
    files = {file_of(name) for name in imports_of(path) if name.split(".")[0] in OWN}
    return files - {None, path}


# ---- formatting ----


def test_everything_is_formatted_by_ruff():
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--check", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_lines_have_a_hundred_columns():
    pages = glob.glob("*.md", root_dir=ROOT) + glob.glob(
        "d*/**/*.md", root_dir=ROOT, recursive=True
    )
    for path in (*PRODUCT, *find_python_files("tests/*.py"), *pages):
        fenced = False
        for number, line in enumerate(source(path).splitlines(), start=1):
            fenced ^= line.startswith("```")
            table_or_code = path.endswith(".md") and (fenced or line.startswith(("|", "!", "    ")))
            if not table_or_code and "http" not in line:
                assert len(line) <= 100, f"{path}:{number}"


# ---- imports ----


def test_no_file_imports_in_a_circle():
    waiting = {path: own_imports(path) for path in PRODUCT}
    while waiting:
        free = [path for path, needs in waiting.items() if not needs & waiting.keys()]
        assert free, f"a circle among {sorted(waiting)}"
        for path in free:
            del waiting[path]


def test_own_modules_are_imported_at_the_top():
    for path in PRODUCT:
        at_the_top = set()
        for node in parse(path).body:
            at_the_top.update(imported_names(node))
        for name in imports_of(path) - at_the_top:
            assert name.split(".")[0] not in OWN, f"{path} imports {name} inside a function"


# A room, and the rooms that it may import, besides itself and the small files at the bottom.
ROOMS = {
    "nanosafe/tokenizer": "",
    "nanosafe/data": "tokenizer",
    "nanosafe/checkpoint": "tokenizer model",
    "nanosafe/eval": "tokenizer data checkpoint inference model rollout tools",
    "nanosafe/phf": "tokenizer data checkpoint inference model rollout losses optim monitor",
}
BOTTOM = {"errors", "storage", "printing", "parallel", "watchdog"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_below_it(room):
    allowed = BOTTOM | set(ROOMS[room].split()) | {os.path.basename(room)}
    for path in PACKAGE:
        if path.startswith(room + "/"):
            for other in own_imports(path) - {"configurator.py"}:
                name = other.split("/")[1].removesuffix(".py")
                assert name in allowed, f"{path} imports {other}"


@pytest.mark.parametrize("name", ["losses", "rl", "logprobs", "attention"])
def test_algebra_and_kernels_need_torch_only(name):
    roots = {imported.split(".")[0] for imported in imports_of(f"nanosafe/{name}.py")}
    assert roots <= {"torch", *sys.stdlib_module_names}


def test_one_file_knows_processes_and_one_knows_kernels():
    for path in PRODUCT:
        name = os.path.basename(path)
        if name not in ("parallel.py", "dry_run.py"):  # the dry run replaces the process group
            names = imports_of(path)
            assert not any(n.startswith("torch.distributed") for n in names), path
        if name != "attention.py":
            assert not re.search(r"scaled_dot_product_attention|varlen_attn", source(path)), path


@pytest.mark.parametrize("path", PRODUCT)
def test_only_the_declared_packages_are_imported(path):
    known = RUN_TIME | OWN | set(sys.stdlib_module_names)
    roots = {name.split(".")[0] for name in imports_of(path)}
    optional = OPTIONAL | (MEASURING if "workload" in path else set())
    assert roots <= known | optional
    at_the_top = set()
    for node in parse(path).body:
        at_the_top.update(name.split(".")[0] for name in imported_names(node))
    assert at_the_top <= known
    if path == "configurator.py":
        assert roots <= set(sys.stdlib_module_names)


def test_scripts_are_imported_by_nobody():
    for path in PACKAGE:
        assert not any(name.startswith(("train_", "sample")) for name in imports_of(path)), path


# ---- knobs ----


def knobs_of(path):
    """{name: default} of a script's knobs, without running it."""
    knobs = {}
    for node in parse(path).body:
        if configurator.calls_configure(node):
            return knobs
        if isinstance(node, ast.Assign) and node.targets[0].id == node.targets[0].id.lower():
            knobs[node.targets[0].id] = ast.literal_eval(node.value)
    return {}


CONFIGURED = [path for path in PRODUCT if "configure(globals()" in source(path)]
CONFIGURED = [path for path in CONFIGURED if path != "configurator.py"]


@pytest.mark.parametrize("path", CONFIGURED)
def test_every_knob_has_a_comment_and_is_read(path):
    head, call, body = source(path).partition("configure(globals()")
    for name in knobs_of(path):
        assert re.search(rf"^{name} = .*  # \S", head, re.M), f"{path}: {name} has no comment"
        assert re.search(rf"\b{name}\b", body), f"{path}: nothing reads {name}"
    if path in PREPARE:
        assert body.startswith(", vars(download))")
        assert re.search(r"download\.prepare\(__file__, \w+, config\b", body)


def test_every_shared_knob_of_the_prepare_scripts_has_a_comment_and_is_read():
    text = source("nanosafe/tools/download.py")
    shared = configurator.read_knobs({**vars(download), "__file__": download.__file__})
    assert set(shared) == {"raw", "holdout", "out", "tokenizer"}
    for name in shared:
        assert re.search(rf"^{name} = .*  # \S", text, re.M), f"{name} has no comment"
        assert f'config["{name}"]' in text, f"nothing reads {name}"


def script_of(recipe):
    """The script that a recipe is for."""
    name = os.path.basename(recipe).removesuffix(".py")
    if name == "phf" or "/phf/" in recipe:
        return "nanosafe/phf/train.py"
    if name in ("sft", "rft"):
        return "train_sft.py"
    if name in ("reward", "cost", "rm", "dpo", "ipo", "rrhf"):
        return "train_pref.py"
    return "train_ppo_lag.py"


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_set_knobs_that_exist_to_values_of_their_type(recipe):
    knobs = knobs_of(script_of(recipe))
    values = configurator.run_file(os.path.join(ROOT, recipe))
    assert values
    for name, value in values.items():
        configurator.check(name, value, knobs, recipe)


@pytest.mark.parametrize("path", TRAINERS)
def test_common_knobs_have_common_names(path):
    common = """out_dir resume seed epochs max_steps batch_size max_tokens max_len grad_clip
        save_interval log_interval device dtype parallel offload use_compile"""
    assert set(common.split()) <= knobs_of(path).keys()


# ---- words ----


def test_public_modules_and_losses_say_what_they_do():
    for path in PACKAGE:
        assert os.path.basename(path) == "__init__.py" or ast.get_docstring(parse(path)), path
    for path in ("nanosafe/losses.py", "nanosafe/rl.py"):
        for node in parse(path).body:
            if isinstance(node, ast.FunctionDef):
                assert ast.get_docstring(node), f"{path}: {node.name}"


def names_in(path):
    """Every name that a Python file defines or assigns, at any depth, and its knobs."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


@pytest.mark.parametrize("page", glob.glob("docs/*.md", root_dir=ROOT) + ["README.md"])
def test_files_and_names_that_a_page_mentions_exist(page):
    """`rl.py gae` in a page is a file of the product, and a name in it; `rl.py` alone is a file."""
    for path, name in re.findall(r"`([\w/]+\.py)(?: (\w+))?`", source(page)):
        ours = [p for p in PRODUCT if p == path or p.endswith("/" + path)]
        theirs = path.startswith("tests/") and os.path.isfile(os.path.join(ROOT, path))
        assert ours or theirs, f"{page}: {path} does not exist"
        if name:
            assert any(name in names_in(p) for p in ours), f"{page}: no {name} in {path}"


def test_the_top_level_holds_nothing_more():
    allowed = """nanosafe train_sft.py train_pref.py train_ppo_lag.py sample.py configurator.py data
        tests README.md config docs pyproject.toml LICENSE .gitignore .git-blame-ignore-revs .ci"""
    if os.path.isdir(os.path.join(ROOT, ".git")):
        tracked = os.popen(f"git -C {ROOT} ls-files").read().split()
        assert {path.split("/")[0] for path in tracked} <= set(allowed.split())
