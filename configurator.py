"""A script's globals + config files + flags -> one checked configuration.

    learning_rate = 1e-5  # peak learning rate, after warm-up
    config = configure(globals())

    $ torchrun --nproc_per_node=8 train_ppo_lag.py config/beaver_7b/ppo_lag.py --kl_coef=0.02
    $ python -m nanosafe.bench --device=cuda --quick    # the same as --quick=true

A knob is a global that the script assigns above its call of configure(): a bool, int, float or str,
in lower case, with a comment behind it. A comment line directly above a knob is the heading of the
knobs that follow; -h prints it. Config files are Python files of assignments to knobs.
Defaults < files from left to right < flags. The type of the default decides how a value is read; a
number in LISTS may be a list of them. In a knob that names a file or folder, ~ is the home folder.
"""

import ast
import difflib
import math
import os
import sys
import textwrap
from types import ModuleType
from typing import NamedTuple

BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
TYPES = {bool: "true, false, 1 or 0", int: "a whole number", float: "a number", str: "a text"}
# Knobs that name a file or a folder: where one begins with ~, that is the home folder.
PATHS = {
    "out_dir",
    "out",
    "init_from",
    "tokenizer",
    "model",
    "actor_model",
    "reward_model",
    "cost_model",
    "reward_critic",
    "cost_critic",
    "safety_model",
    "reference",
    "scorer",
    "red",
    "blue",
    "prompts",
    "problems",
    "tasks",
    "raw",
    "folder",
    "demo",
    "sets_folder",
    "rm_bench",
    "assignments",
}


# Knobs of one number that may also be a list of them: 0.0,-1.5 on the command line.
LISTS = {"cost_limit"}


class Knob(NamedTuple):
    default: bool | int | float | str
    comment: str  # what stands behind the assignment
    heading: str  # the comment line directly above the assignment; empty: there is none


class Arguments(NamedTuple):
    files: list[str]
    flags: dict[str, str]  # name -> text; None for a flag without "="
    wants_help: bool


def configure(script, *shared):
    """Set the knobs of a script from the command line, and return them as a dict.

    script  the script's globals(), which receive the values
    shared  globals of other modules, whose knobs are knobs of the script as well
    Stops with one line (SystemExit) on an unknown name, a wrong type or a missing file."""
    modules = [read_knobs(module) for module in (script, *shared)]
    config = {}
    for knobs in modules:
        for name, knob in knobs.items():
            config[name] = knob.default
    arguments = split_arguments(sys.argv[1:])
    origins = {}  # name -> the file that set it, or "flag"
    for file in arguments.files:
        path = find_file(file, script["__file__"])
        for name, value in run_file(path).items():
            config[name] = check(name, value, config, where=file)
            origins[name] = file
    for name, text in arguments.flags.items():
        config[name] = parse(name, text, config)
        origins[name] = "flag"
    for name, value in config.items():
        if name in PATHS and isinstance(value, str):
            config[name] = expand_home(name, value)
    if arguments.wants_help:
        print(format_help(script.get("__doc__"), modules, config))
        sys.exit()
    script.update(config)
    if os.environ.get("RANK", "0") == "0":
        print_config(config, origins)
    return config


def save(config, path):
    """Write `config` to `path` as a config file that configure() reads back to the same values."""
    temporary = path + ".tmp"
    with open(temporary, "w", encoding="utf-8") as f:
        for name, value in config.items():
            f.write(f"{name} = {value!r}\n")
    os.replace(temporary, path)


# ---- the script's source ----


def read_knobs(script):
    """{name: Knob} of what a module's source assigns at its top level before configure()."""
    with open(script["__file__"], encoding="utf-8") as f:
        source = f.read()
    lines = source.splitlines()
    knobs = {}
    for node in ast.parse(source).body:
        if calls_configure(node):
            break
        name = assigned_name(node)
        if name.startswith("_") or name != name.lower():
            continue
        default = script[name]
        if type(default) not in TYPES:
            stop(f"knob {name!r} has the default {default!r}, which is no bool, int, float or str")
        knobs[name] = Knob(default, comment_behind(node, lines), heading_above(node, lines))
    return knobs


def calls_configure(node):
    """Whether a statement calls configure(), by this name or as an attribute of a module."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call):
            function = inner.func
            if isinstance(function, ast.Name) and function.id == "configure":
                return True
            if isinstance(function, ast.Attribute) and function.attr == "configure":
                return True
    return False


def assigned_name(node):
    """The name that a statement assigns; "_" for any other statement."""
    if isinstance(node, ast.Assign):
        target = node.targets[0]
    elif isinstance(node, ast.AnnAssign):
        target = node.target
    else:
        return "_"
    return target.id if isinstance(target, ast.Name) else "_"


def comment_behind(node, lines):
    line = lines[node.end_lineno - 1].encode()  # ast counts columns in bytes
    return line[node.end_col_offset :].decode().strip().lstrip("# ")


def heading_above(node, lines):
    """The comment line directly above a statement. Two lines or more are a remark, no heading."""
    above = lines[max(0, node.lineno - 3) : node.lineno - 1]
    comments = [line for line in above if line.startswith("#")]
    if len(comments) == 1 and above[-1] == comments[0]:
        return comments[0].strip("# ")
    return ""


# ---- the command line ----


def split_arguments(argv):
    files = []
    flags = {}
    wants_help = False
    for argument in argv:
        if not is_utf8(argument):
            stop(f"{argument!r} is not UTF-8: set the terminal to UTF-8, or write it into a file")
        if argument in ("-h", "--help"):
            wants_help = True
        elif argument.startswith("--"):
            name, equals, text = argument[2:].partition("=")
            flags[name] = text if equals else None
        elif argument.endswith(".py"):
            files.append(argument)
        else:
            stop(f"{argument!r} is neither a config file (*.py) nor a flag (--key=value)")
    return Arguments(files, flags, wants_help)


def is_utf8(argument):
    """Whether an argument was UTF-8: Python reads every other byte as half of a character."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def find_file(file, script_path):
    """The path of a config file, which is relative to this folder or to the script's."""
    beside_script = os.path.join(os.path.dirname(os.path.abspath(script_path)), file)
    for path in (file, beside_script):
        if os.path.isfile(path):
            return path
    stop(f"config file {file!r} does not exist")


def run_file(path):
    """{name: value} of what a config file assigns. It runs by itself and cannot read the knobs."""
    names = {"__file__": path, "__name__": "config"}
    with open(path, encoding="utf-8") as f:
        source = f.read()
    try:
        exec(compile(source, path, "exec"), names)
    except NameError as error:
        stop(
            f"{path}: {error}; a config file holds constants, derived values belong in the "
            "script after configure()"
        )
    except SyntaxError as error:
        stop(f"{path}, line {error.lineno}: {error.msg}")
    values = {}
    for name, value in names.items():
        if not name.startswith("_") and not isinstance(value, ModuleType):
            values[name] = value
    return values


# ---- values ----


def check(name, value, config, where):
    """A value from a config file: for a knob that exists, of its default's type (or an int)."""
    wanted = find_type(name, config, where)
    if name in LISTS and isinstance(value, (list, tuple)):
        return check_list(name, value, config, where)
    if wanted is float and type(value) is int:
        value = float(value)
    if wanted is int and type(value) is float and value.is_integer():
        value = int(value)  # 1e5 is a whole number
    is_finite = type(value) is not float or math.isfinite(value)
    if type(value) is not wanted or not is_finite:
        stop(f"{where}: {name} must be {wanted.__name__}, given {value!r}")
    return value


def check_list(name, values, config, where):
    """The list of a knob in LISTS from a config file: one number or more."""
    if not values:
        stop(f"{where}: {name} must be a number or a list of numbers, given an empty list")
    checked = []
    for value in values:
        if isinstance(value, (list, tuple)):
            stop(f"{where}: {name} must be a list of numbers, given a list in it: {value!r}")
        checked.append(check(name, value, config, where))
    return checked


def parse(name, text, config):
    """A value from a flag, read as the type of the knob's default.

    text  None for a flag without "=", which switches a bool on"""
    wanted = find_type(name, config, "flag")
    if text is None and wanted is not bool:
        stop(f"--{name}: flags are written --key=value; only a switch needs no value")
    if text is None:
        return True
    if wanted is str:
        return text
    if name in LISTS and "," in text:
        value = parse_numbers(text, wanted)
    elif wanted is bool:
        value = BOOLEANS.get(text.lower())
    else:
        value = parse_number(text, wanted)
    if value is None:
        shown = " ".join(text.split())
        stop(f"--{name}={shown}: {name} takes {TYPES[wanted]}")
    return value


def parse_numbers(text, wanted):
    """The list of numbers that a text spells, with commas between; None if one of them is none."""
    numbers = []
    for item in text.split(","):
        number = parse_number(item.strip(), wanted)
        if number is None:
            return None
        numbers.append(number)
    return numbers


def parse_number(text, wanted):
    """The finite int or float, whichever is wanted, that a text spells; None if it spells none."""
    try:
        if text.lstrip("+-").isdecimal():
            number = int(text)
        else:
            number = float(text)  # 1e5 is a whole number, too
        value = wanted(number)
    except (ValueError, OverflowError):
        return None
    if value != number or abs(value) == math.inf:
        return None
    return value


def expand_home(name, path):
    """A path in which ~ or ~user at the beginning is replaced by the home folder; or several with
    commas between."""
    expanded = []
    for part in path.split(","):
        expanded.append(os.path.expanduser(part))
        if expanded[-1].startswith("~"):
            stop(
                f"{name}={path!r}: no user has this home folder; a name that begins with ~ is "
                f"./{part}"
            )
    return ",".join(expanded)


def find_type(name, config, where):
    """The type of a knob's default, or of the numbers in the list that a file has put in its place.

    Stops, with the nearest name, if there is no such knob."""
    if name in config:
        value = config[name]
        return type(value[0]) if isinstance(value, list) else type(value)
    nearest = difflib.get_close_matches(name, config, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "-h lists all knobs"
    stop(f"{where}: unknown knob {name!r}; {hint}")


# ---- printing ----


def print_config(config, origins):
    """Print what was set, one knob per line with its origin, and then all that was not."""
    width = max(map(len, origins), default=0)
    for name, origin in origins.items():
        print(f"{name:<{width}} = {config[name]!r}  ({origin})")
    rest = [f"{name}={value!r}" for name, value in config.items() if name not in origins]
    text = "at their defaults: " + ", ".join(rest)
    print(textwrap.fill(text, 100, subsequent_indent="    "), flush=True)


def format_help(docstring, modules, config):
    """The script's docstring, and its knobs as they stand under the headings of its source.

    modules  the {name: Knob} of the script and of each module that it shares knobs with"""
    assignments = {}
    for name, value in config.items():
        assignments[name] = f"{name} = {format_value(value)}"
    width = max(map(len, assignments.values()), default=0)
    lines = [
        (docstring or "").strip(),
        "",
        "Knobs (defaults < config files from left to right < --key=value), as they stand:",
    ]
    for knobs in modules:
        is_first = True
        for name, knob in knobs.items():
            if knob.heading or is_first:
                lines.append("")
            if knob.heading:
                lines.append(knob.heading)
            lines.append(f"  {assignments[name]:<{width}}  {knob.comment}".rstrip())
            is_first = False
    return "\n".join(lines)


def format_value(value):
    """A value as Python source has it, with double quotes around a string."""
    text = repr(value)
    if isinstance(value, str) and '"' not in value:
        return f'"{text[1:-1]}"'
    return text


def stop(message):
    """End the program with one line on stderr and exit status 1."""
    raise SystemExit("error: " + " ".join(message.splitlines()))
