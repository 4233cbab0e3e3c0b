"""A script's globals + config files + flags -> one checked configuration.

    learning_rate = 1e-5  # peak learning rate, after warm-up
    config = configure(globals())

    $ torchrun --nproc_per_node=8 train_ppo_lag.py config/beaver_7b/ppo_lag.py --kl_coef=0.02

A knob is a global that the script assigns above its call of configure(): a bool, int, float or str,
in lower case, with a comment behind it. Config files are Python files of assignments to knobs.
Defaults < files from left to right < flags. The default's type decides how a value is read."""

import ast
import difflib
import json
import os
import sys
import textwrap

TYPES, INFINITY = (bool, int, float, str), float("inf")


def configure(script, *shared):
    """Set the knobs in `script` (a module's globals()) from sys.argv; returns them, a dict. The
    knobs of `shared`, other modules' globals, are the script's as well.
    Stops with one line (SystemExit) on an unknown name, a wrong type or a missing file."""
    knobs, config, origin = {}, {}, {}
    for module in (script, *shared):
        comments = read_knobs(module)
        knobs.update(comments)
        config.update((name, module[name]) for name in comments)
    given = [arg for arg in sys.argv[1:] if arg not in ("-h", "--help")]
    files = [arg for arg in given if not arg.startswith("--")]
    for arg in given:
        if arg in files and not arg.endswith(".py"):
            stop(f"{arg!r} is neither a config file (*.py) nor a flag (--key=value)")
        if arg not in files and "=" not in arg:
            stop(f"{arg}: flags are written --key=value")
    flags = dict(arg[2:].split("=", 1) for arg in given if arg not in files)
    for file in files:
        beside = os.path.join(os.path.dirname(os.path.abspath(script["__file__"])), file)
        path = next(filter(os.path.isfile, (file, beside)), None)  # here, or beside the script
        if not path:
            stop(f"config file {file!r} does not exist")
        for name, value in run_file(path).items():
            config[name], origin[name] = check(name, value, config, where=file), file
    for name, text in flags.items():
        config[name], origin[name] = parse(name, text, config), "flag"
    if len(given) < len(sys.argv) - 1:
        print(help_text(script, knobs, config))
        sys.exit()
    script.update(config)
    if os.environ.get("RANK", "0") == "0":
        width = max(map(len, origin), default=0)
        for name in origin:
            print(f"{name:<{width}} = {config[name]!r}  ({origin[name]})")
        rest = ", ".join(f"{name}={config[name]!r}" for name in config if name not in origin)
        print(textwrap.fill("as by default: " + rest, 100, subsequent_indent="    "), flush=True)
    return config


def save(config, path):
    """Write `config` to `path` as a config file that configure() reads back to the same values."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(f"{name} = {value!r}\n" for name, value in config.items())
    os.replace(path + ".tmp", path)


def read_knobs(script):
    """{name: comment} of the knobs: what the source assigns at module level before configure()."""
    with open(script["__file__"], encoding="utf-8") as f:
        source = f.read()
    lines, knobs = source.splitlines(), {}
    for node in ast.parse(source).body:
        if calls_configure(node):
            break
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        name = getattr(target, "id", "_")
        if name.startswith("_") or name != name.lower():
            continue
        if type(script[name]) not in TYPES:
            stop(f"knob {name!r} has the default {script[name]!r}: no bool, int, float or str")
        knobs[name] = lines[node.end_lineno - 1][node.end_col_offset :].strip().lstrip("# ")
    return knobs


def calls_configure(node):
    calls = (n.func for n in ast.walk(node) if isinstance(n, ast.Call))
    return any(getattr(f, "id", getattr(f, "attr", "")) == "configure" for f in calls)


def run_file(path):
    """The assignments of a config file, run in a namespace of its own: it cannot read knobs."""
    space = {"__file__": path, "__name__": "config"}
    with open(path, encoding="utf-8") as f:
        source = f.read()
    try:
        exec(compile(source, path, "exec"), space)
    except NameError as error:
        stop(
            f"{path}: {error}; a config file holds constants, derived values belong in the "
            "script after configure()"
        )
    except SyntaxError as error:
        stop(f"{path}, line {error.lineno}: {error.msg}")
    return {
        name: value
        for name, value in space.items()
        if not name.startswith("_") and type(value) is not type(os)
    }  # no module


def check(name, value, config, where):
    """A value from a config file: for a knob that exists, of its default's type (or an int)."""
    want = kind_of(name, config, where)
    if want is float and type(value) is int:
        value = float(value)
    if want is int and type(value) is float and value.is_integer():
        value = int(value)  # 1e5
    if type(value) is not want or want is float and not abs(value) < INFINITY:
        stop(f"{where}: {name} must be {want.__name__}, given {value!r}")
    return value


def parse(name, text, config):
    """A value from a flag, read as the type of the knob's default."""
    want = kind_of(name, config, "flag")
    if want is str:
        return text
    kinds = {bool: "true, false, 1 or 0", int: "a whole number", float: "a number"}
    try:
        if want is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        value = int(text) if text.lstrip("+-").isdecimal() else float(text)  # 1e5 is whole, too
        if abs(value) < INFINITY and want(value) == value:
            return want(value)
    except (KeyError, ValueError, OverflowError):
        pass
    stop(f"--{name}={' '.join(text.split())}: {name} takes {kinds[want]}")


def kind_of(name, config, where):
    if name not in config:
        near = difflib.get_close_matches(name, config, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "; -h lists all knobs"
        stop(f"{where}: unknown knob {name!r}{hint}")
    return type(config[name])


def help_text(script, knobs, config):
    shown = {name: f"{name} = {json.dumps(config[name])}" for name in knobs}
    width = max(map(len, shown.values()))
    return "\n".join(
        [
            (script.get("__doc__") or "").strip(),
            "",
            "Knobs (defaults < config files from left to right < --key=value), as they stand:",
            *(f"  {shown[name]:<{width}}  {comment}" for name, comment in knobs.items()),
        ]
    )


def stop(message):
    raise SystemExit("error: " + " ".join(message.splitlines()))
