"""The house: formatting, who imports whom, dependencies, knobs, docstrings, and docs that point."""

import ast
import fnmatch
import glob
import os
import re
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT

import configurator
from nanosafe.ranges import RANGES, check_ranges
from nanosafe.tools import download

TRAINERS = ("train_sft.py", "train_pref.py", "train_ppo_lag.py", "nanosafe/phf/train.py")
RUN_TIME = {"torch", "numpy", "sentencepiece", "safetensors", "tqdm", "jinja2"}
OWN = {
    "nanosafe",
    "configurator",
    "config",
    "sample",
    "train_sft",
    "train_pref",
    "train_ppo_lag",
}
# Imported inside functions only.
OPTIONAL = {"wandb", "matplotlib", "pycodestyle", "detoxify", "readline", "pyarrow"}
MEASURING = {"transformers", "trl", "datasets"}  # what the benchmark compares with


def find_files(*patterns):
    """The files that match, as paths below the repository's root."""
    found = set()
    for pattern in patterns:
        found.update(glob.glob(pattern, root_dir=ROOT, recursive=True))
    return sorted(found)


PACKAGE = find_files("nanosafe/**/*.py")
SCRIPTS = find_files("*.py")
PREPARE = find_files("data/*/prepare.py")
RECIPES = find_files("config/**/*.py")
PRODUCT = [*SCRIPTS, *PACKAGE, *PREPARE, *RECIPES]
TESTS = find_files("tests/*.py")
PAGES = find_files("*.md", "docs/**/*.md", "data/**/*.md")


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


def imports_at_the_top_of(path):
    """Every dotted name that a file imports outside functions and classes."""
    names = set()
    for node in parse(path).body:
        names.update(imported_names(node))
    return names


def roots_of(names):
    """The packages that dotted names begin with."""
    return {name.split(".")[0] for name in names}


def file_of(name):
    """The product's file that a dotted name is, or is defined in; None for other packages."""
    while name:
        stem = name.replace(".", "/")
        for path in (f"{stem}.py", f"{stem}/__init__.py"):
            if os.path.isfile(os.path.join(ROOT, path)):
                return path
        name = name.rpartition(".")[0]
    return None


def own_imports(path):
    """The product's files that a file imports."""
    files = set()
    for name in imports_of(path):
        if roots_of([name]) <= OWN:
            files.add(file_of(name))
    return files - {None, path}


# ---- formatting ----


def test_everything_is_formatted_by_ruff():
    command = [sys.executable, "-m", "ruff", "format", "--check", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def wrapped_lines(path):
    """(number, text) of a file's lines, without code, tables and pictures in pages."""
    is_page = path.endswith(".md")
    in_code = False
    for number, line in enumerate(source(path).splitlines(), start=1):
        if is_page and line.startswith("```"):
            in_code = not in_code
        may_be_long = is_page and (in_code or line.startswith(("|", "!", "    ")))
        if not may_be_long:
            yield number, line


@pytest.mark.parametrize("path", [*PRODUCT, *TESTS, *PAGES])
def test_lines_have_at_most_100_columns(path):
    for number, line in wrapped_lines(path):
        assert len(line) <= 100 or "http" in line, f"{path}:{number}"


# ---- imports ----


def test_no_file_imports_in_a_circle():
    """Files whose imports are all removed are removed, until none is left or there is a circle."""
    left = {path: own_imports(path) for path in PRODUCT}
    while left:
        free = [path for path, needed in left.items() if not needed & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for path in free:
            del left[path]


@pytest.mark.parametrize("path", PRODUCT)
def test_own_modules_are_imported_at_the_top(path):
    inside_functions = imports_of(path) - imports_at_the_top_of(path)
    assert not roots_of(inside_functions) & OWN, f"{path} imports {sorted(inside_functions)}"


@pytest.mark.parametrize("path", [*SCRIPTS, *PREPARE])
def test_a_script_imports_nanosafe_before_torch(path):
    """nanosafe/__init__.py sets how OpenMP waits, which is read as torch is loaded."""
    roots = []
    for node in parse(path).body:
        roots += [name.split(".")[0] for name in imported_names(node)]
    if "torch" in roots:
        assert "nanosafe" in roots[: roots.index("torch")]


# A room, and the rooms that it may import, besides itself and BOTTOM.
ROOMS = {
    "nanosafe/tokenizer": "",
    "nanosafe/data": "tokenizer",
    "nanosafe/checkpoint": "tokenizer model lora",
    "nanosafe/eval": "tokenizer data checkpoint inference model rollout rl tools",
    "nanosafe/phf": "tokenizer data checkpoint inference model rollout losses optim monitor",
}
BOTTOM = {
    "errors",
    "storage",
    "transfer",
    "hub",
    "printing",
    "parallel",
    "ranges",
    "adapter_base",
    "watchdog",
}  # small files for everybody


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_below_it(room):
    allowed = {os.path.basename(room), *BOTTOM, *ROOMS[room].split()}
    for path in find_files(f"{room}/**/*.py"):
        for other in own_imports(path) - {"configurator.py"}:
            name = other.split("/")[1].removesuffix(".py")
            assert name in allowed, f"{path} imports {other}"


@pytest.mark.parametrize("name", ["losses", "rl", "logprobs", "attention"])
def test_algebra_and_kernels_need_torch_only(name):
    roots = roots_of(imports_of(f"nanosafe/{name}.py"))
    assert roots <= {"torch", *sys.stdlib_module_names}


def test_only_parallel_imports_torch_distributed():
    """The dry run does too: it replaces the process group."""
    for path in PRODUCT:
        if os.path.basename(path) not in ("parallel.py", "dry_run.py"):
            for name in imports_of(path):
                assert not name.startswith("torch.distributed"), path


def test_only_attention_names_a_kernel():
    for path in PRODUCT:
        # The dry run gives a CPU's fake tensors a GPU's kernel.
        if os.path.basename(path) not in ("attention.py", "dry_run.py"):
            assert not re.search("scaled_dot_product_attention|varlen_attn", source(path)), path


@pytest.mark.parametrize("path", PRODUCT)
def test_only_the_declared_packages_are_imported(path):
    allowed = RUN_TIME | OWN | OPTIONAL | set(sys.stdlib_module_names)
    if "workload" in path:
        allowed |= MEASURING
    assert roots_of(imports_of(path)) <= allowed


@pytest.mark.parametrize("path", PRODUCT)
def test_optional_packages_are_imported_inside_functions(path):
    allowed = RUN_TIME | OWN | set(sys.stdlib_module_names)
    assert roots_of(imports_at_the_top_of(path)) <= allowed


def test_the_configurator_needs_the_standard_library_only():
    assert roots_of(imports_of("configurator.py")) <= set(sys.stdlib_module_names)


def test_the_package_imports_no_script():
    for path in PACKAGE:
        for name in imports_of(path):
            assert not name.startswith(("train_", "sample")), path


# ---- knobs ----


def knobs_of(path):
    """{name: default} of a script's knobs, without running it."""
    knobs = {}
    for node in parse(path).body:
        if configurator.calls_configure(node):
            return knobs
        if isinstance(node, ast.Assign):
            name = node.targets[0].id
            if name == name.lower():
                knobs[name] = ast.literal_eval(node.value)
    return {}


def has_comment(name, text):
    """Whether a knob's line in a script's text ends with a comment."""
    return re.search(rf"^{name} = .*  # \S", text, re.MULTILINE)


def find_configured_scripts():
    """The product's files that call configure(globals(), ..)."""
    paths = []
    for path in PRODUCT:
        if path != "configurator.py" and "configure(globals()" in source(path):
            paths.append(path)
    return paths


CONFIGURED = find_configured_scripts()


@pytest.mark.parametrize("path", CONFIGURED)
def test_every_knob_has_a_comment_and_is_read(path):
    head, _, body = source(path).partition("configure(globals()")
    for name in knobs_of(path):
        assert has_comment(name, head), f"{path}: {name} has no comment"
        assert re.search(rf"\b{name}\b", body), f"{path}: nothing reads {name}"


def numbers_of(path):
    """{name: default} of the knobs of a script that take a number."""
    knobs = knobs_of(path)
    return {name: value for name, value in knobs.items() if type(value) in (int, float)}


# The dry run is called by tests and by the planner, and takes sizes that no trainer takes.
WITH_NUMBERS = [p for p in CONFIGURED if numbers_of(p) and os.path.basename(p) != "dry_run.py"]


@pytest.mark.parametrize("path", WITH_NUMBERS)
def test_every_number_that_a_knob_takes_has_a_range_that_is_checked(path):
    for name, value in numbers_of(path).items():
        assert name in RANGES, f"{path}: {name} has no range"
        assert RANGES[name].contains(value), f"{path}: {name}"
    _, _, body = source(path).partition("configure(globals())")
    assert "check_ranges(" in body, path


def test_no_range_is_of_a_knob_that_is_gone():
    names = {"holdout"}  # of the prepare scripts
    for path in WITH_NUMBERS:
        names.update(numbers_of(path))
    assert RANGES.keys() == names


def test_every_knob_that_names_a_folder_is_known_as_a_path():
    for path in CONFIGURED:
        for name, value in knobs_of(path).items():
            comment = re.search(rf"^{name} = .*?  # (.*)", source(path), re.MULTILINE)[1]
            if isinstance(value, str) and re.search(r"folder\b(?! does)", comment):
                assert name in configurator.PATHS, f"{path}: {name}"


@pytest.mark.parametrize("path", [path for path in CONFIGURED if path in PREPARE])
def test_a_prepare_script_passes_its_configuration_on(path):
    _, _, body = source(path).partition("configure(globals()")
    assert body.startswith(", vars(download))")
    assert re.search(r"download\.prepare\(__file__, \w+, config\b", body)


def test_every_shared_knob_of_the_prepare_scripts_has_a_comment_and_is_read():
    text = source("nanosafe/tools/download.py")
    shared = configurator.read_knobs({**vars(download), "__file__": download.__file__})
    assert set(shared) == {"raw", "holdout", "out", "tokenizer"}
    for name in shared:
        assert has_comment(name, text), f"{name} has no comment"
        assert f'config["{name}"]' in text, f"nothing reads {name}"


POLICIES_FROM_PAIRS = "dpo ipo simpo orpo kto safedpo bso bfpo modpo sacpo rrhf".split()


def script_of(recipe):
    """The script that a recipe is for."""
    name = os.path.basename(recipe).removesuffix(".py")
    if name == "phf" or "/phf/" in recipe:
        return "nanosafe/phf/train.py"
    if name in ("sft", "rft"):
        return "train_sft.py"
    if name in ("reward", "cost", "rm", "judge", "lora", *POLICIES_FROM_PAIRS):
        return "train_pref.py"
    return "train_ppo_lag.py"


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_set_knobs_that_exist_to_values_of_their_type(recipe):
    knobs = knobs_of(script_of(recipe))
    values = configurator.run_file(os.path.join(ROOT, recipe))
    assert values
    for name, value in values.items():
        configurator.check(name, value, knobs, recipe)
    check_ranges(values)


@pytest.mark.parametrize("path", TRAINERS)
def test_common_knobs_have_common_names(path):
    common = """out_dir resume seed epochs max_steps batch_size max_tokens max_len grad_clip
        save_interval log_interval device dtype parallel offload use_compile"""
    assert set(common.split()) <= knobs_of(path).keys()


# ---- docstrings, and what the docs point at ----


def test_every_module_has_a_docstring():
    for path in PACKAGE:
        if os.path.basename(path) != "__init__.py":
            assert ast.get_docstring(parse(path)), path


@pytest.mark.parametrize("path", ["nanosafe/losses.py", "nanosafe/rl.py"])
def test_every_function_of_the_algebra_has_a_docstring(path):
    for node in parse(path).body:
        if isinstance(node, ast.FunctionDef):
            assert ast.get_docstring(node), f"{path}: {node.name}"


def names_in(path):
    """Every name that a Python file defines or assigns, at any depth: its knobs are among them."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


@pytest.mark.parametrize("page", find_files("docs/*.md", "README.md"))
def test_files_and_names_that_a_page_mentions_exist(page):
    """`rl.py gae` in a page is a file of the product, and a name in it; `rl.py` alone is a file."""
    for path, name in re.findall(r"`([\w/]+\.py)(?: (\w+))?`", source(page)):
        candidates = [p for p in PRODUCT if p == path or p.endswith("/" + path)]
        assert candidates or path in TESTS, f"{page}: {path} does not exist"
        if name:
            names = set()
            for candidate in candidates:
                names.update(names_in(candidate))
            assert name in names, f"{page}: no {name} in {path}"


def test_the_top_level_holds_nothing_more():
    allowed = """nanosafe train_sft.py train_pref.py train_ppo_lag.py sample.py configurator.py data
        tests README.md config docs pyproject.toml LICENSE .gitignore .git-blame-ignore-revs .ci"""
    if os.path.isdir(os.path.join(ROOT, ".git")):
        tracked = os.popen(f"git -C {ROOT} ls-files").read().split()
        at_the_top = {path.split("/")[0] for path in tracked}
        assert at_the_top <= set(allowed.split())


def test_an_installed_package_has_the_files_beside_the_code():
    """Templates, pages and problems are named by a pattern of pyproject.toml, seen from the package
    that they belong to."""
    (patterns,) = re.findall(r'^"\*" = \[(.*)\]$', source("pyproject.toml"), re.M)
    patterns = re.findall(r'"([^"]+)"', patterns)
    files = []
    for path in find_files("nanosafe/**/*.*"):
        if not path.endswith((".py", ".pyc")):
            files.append(path)
    assert len(files) >= 5
    for path in files:
        package = os.path.dirname(path)
        while not os.path.exists(os.path.join(ROOT, package, "__init__.py")):
            package = os.path.dirname(package)
        inside = os.path.relpath(path, package)
        assert any(fnmatch.fnmatch(inside, pattern) for pattern in patterns), path
