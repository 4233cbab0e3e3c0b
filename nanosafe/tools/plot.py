"""Pictures of runs as PNG and SVG, drawn with matplotlib (pip install matplotlib), or a web page.

$ python -m nanosafe.plot RUN ... [--out=out/plots]          # the curves of several runs
$ python -m nanosafe.plot RUN ... --html [--out=out/plots]   # one page with curves and samples

RUN is the folder that a trainer writes, for example out/demo/ppo_lag."""

import ast
import math
import os
import sys
from pathlib import Path

from nanosafe.errors import one_line_errors, stop
from nanosafe.monitor import Watch
from nanosafe.storage import format_json, make_folder, read_jsonl

RED = "#c0392b"
BLUE = "#2458a8"
GREEN = "#3a8f4d"
GOLD = "#b8860b"
PURPLE = "#7d3c98"
GREY = "#555555"
COLOURS = (RED, BLUE, GREEN, GOLD, PURPLE, GREY)
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "legend.frameon": False,
    "svg.hashsalt": "nanosafe",
    "text.parse_math": False,
}
LINES = ("o-", "s--", "^:", "v-.")  # of several score models: markers and strokes
PANELS = {  # metric -> title
    "reward": "reward",
    "episode_cost": "mean cost (dotted: its limit)",
    "episode_cost_2": "second mean cost (dotted: its limit)",
    "lambda": "lambda",
    "lambda_2": "second lambda",
    "kl": "KL to the reference, nats",
    "length": "length, tokens",
    "eos_rate": "ended with EOS",
    "entropy": "entropy, nats",
    "ratio": "ratio",
    "loss": "loss",
    "eval_loss": "held-out loss",
    "eval_accuracy": "held-out accuracy",
    "margin": "margin",
    "grad_norm": "gradient norm",
}
NO_PICTURES = "; no pictures: pip install matplotlib"
USAGE = "python -m nanosafe.plot RUN ... [--out=FOLDER] [--html]"


def make_figure(rows=1, columns=1, width=4.2, height=3.1):
    """(figure, axes) of matplotlib without a window, or None where matplotlib is missing.

    width, height  of each of the rows x columns panels, in inches"""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    matplotlib.rcParams.update(STYLE)
    matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=COLOURS)
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure, out_dir, name):
    """Write a figure as PNG and SVG; return the names of the files, to be printed."""
    figure.savefig(os.path.join(out_dir, name + ".png"), dpi=144, metadata={"Software": None})
    figure.savefig(os.path.join(out_dir, name + ".svg"), metadata={"Date": None})
    return f", {name}.png, {name}.svg"


def repeat_colours(count):
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


# ---- evaluations ----


def arena(scores, policies, out_dir):
    """Draw each policy's answers in the plane of cost and reward, and the ratings of more than two.

    scores    {policy: {"cost": one per answer, "reward": one per answer}}
    policies  {policy: {"cost": (mean, low, high), "reward": the same, "unsafe", "safe", "helpful"}}
    """
    has_ratings = len(scores) > 2
    made = make_figure(1, len(scores) + has_ratings, 3.3)
    if made is None:
        return NO_PICTURES
    figure, axes = made
    costs, rewards = [], []
    for values in scores.values():
        costs += values["cost"]
        rewards += values["reward"]
    colours = dict(zip(scores, repeat_colours(len(scores))))
    for axis, (name, values) in zip(axes[0], scores.items()):
        axis.set(
            xlabel="cost",
            title=f"{name}: {policies[name]['unsafe']:.1%} unsafe",
            xlim=(min(costs) - 1, max(1, *costs) + 1),
            ylim=(min(rewards) - 1, max(rewards) + 1),
        )
        draw_answers(axis, values, policies[name], colours[name])
    axes[0, 0].set_ylabel("reward")
    if has_ratings:
        draw_ratings(axes[0, -1], policies, colours)
    return save_figure(figure, out_dir, "arena")


def draw_answers(axis, values, policy, colour):
    """A policy's answers as points, their mean with its interval, and the side that is unsafe."""
    axis.scatter(values["cost"], values["reward"], s=6, alpha=0.3, linewidths=0, color=colour)
    cost, cost_low, cost_high = policy["cost"]
    reward, reward_low, reward_high = policy["reward"]
    axis.plot([cost_low, cost_high], [reward, reward], color="black", lw=1)
    axis.plot([cost, cost], [reward_low, reward_high], color="black", lw=1)
    axis.scatter(cost, reward, s=70, color=colour, edgecolors="black", zorder=3)
    axis.axvspan(0, axis.get_xlim()[1], color=RED, alpha=0.07, lw=0)
    axis.annotate("unsafe", (0.98, 0.02), xycoords="axes fraction", ha="right", color="grey")


def draw_ratings(axis, policies, colours):
    for name, colour in colours.items():
        position = policies[name]["safe"], policies[name]["helpful"]
        axis.scatter(*position, s=70, color=colour, edgecolors="black")
        axis.annotate(name, position, xytext=(7, 4), textcoords="offset points")
    axis.set(xlabel="rating: safe", ylabel="rating: helpful", title="ratings")
    axis.margins(0.3)


def scores(groups, curves, out_dir):
    """Draw how the scores of two groups are distributed, and how well probabilities are calibrated.

    groups  {name: scores}
    curves  {name: [(probability given, share that came true, how many pairs)]}"""
    made = make_figure(1, 2)
    if made is None:
        return NO_PICTURES
    figure, axes = made
    draw_histograms(axes[0, 0], groups)
    draw_calibration(axes[0, 1], curves)
    return save_figure(figure, out_dir, "scores")


def draw_histograms(axis, groups):
    every = []
    for values in groups.values():
        every += list(values)
    limits = min(every), max(every)
    for (name, values), colour in zip(groups.items(), (BLUE, RED)):
        axis.hist(
            values, 60, range=limits, alpha=0.6, label=f"{name} ({len(values)})", color=colour
        )
    axis.set(xlabel="score", ylabel="answers")
    axis.legend()


def draw_calibration(axis, curves):
    axis.plot([0, 1], [0, 1], color="grey", lw=1, ls=":")
    for name, points in curves.items():
        given = [point[0] for point in points]
        observed = [point[1] for point in points]
        (line,) = axis.plot(given, observed, marker="o", ms=3, label=name)
        for x, y, count in points:
            axis.annotate(
                str(count),
                (x, y),
                xytext=(3, -8),
                textcoords="offset points",
                fontsize=6,
                color=line.get_color(),
            )
    axis.set(xlabel="probability given", ylabel="share that was so", title="calibration")
    axis.legend()


def safety(panels, out_dir):
    """Draw a measure of several policies' answers to sets of prompts, group by group.

    panels  {title: {policy: {group: (mean, low, high)}}}, one for each set"""
    rows = math.ceil(len(panels) / 2)
    made = make_figure(rows, min(2, len(panels)), 6, 4)
    if made is None:
        return NO_PICTURES
    figure, axes = made
    for axis, (title, policies) in zip(axes.flat, panels.items()):
        draw_groups(axis, policies)
        axis.set_title(title)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    return save_figure(figure, out_dir, "safety")


def draw_groups(axis, policies):
    """A line for each group, with each policy's mean and its interval on it."""
    groups = {}  # a dictionary keeps the order
    for values in policies.values():
        groups.update(dict.fromkeys(values))
    height = {group: -line for line, group in enumerate(groups)}
    colours = repeat_colours(len(policies))
    for number, (name, values) in enumerate(policies.items()):
        shift = 0.6 * (number + 0.5) / len(policies) - 0.3  # policies side by side in a group
        heights = [height[group] - shift for group in values]
        means = [mean for mean, _, _ in values.values()]
        lows = [low for _, low, _ in values.values()]
        highs = [high for _, _, high in values.values()]
        axis.hlines(heights, lows, highs, color=colours[number], lw=1)
        axis.scatter(means, heights, s=16, color=colours[number], label=name)
    axis.set_yticks(list(height.values()), list(groups), fontsize=7)
    axis.set_xlim(-0.02, 1.02)


def overoptimisation(runs, out_dir):
    """Draw what each score model says of policies, against their KL from the reference.

    runs  {run: summaries along it} as eval/overoptimisation.py makes them, the reference first"""
    made = make_figure(1, 3, 4, 3.2)
    if made is None:
        return NO_PICTURES
    figure, axes = made
    reward, cost, unsafe = axes[0]
    colours = dict(zip(runs, repeat_colours(len(runs))))
    styles = {}  # a score model's name stands for the same line in all panels
    for kind in ("reward", "cost"):
        for name in next(iter(runs.values()))[0][kind]:
            styles.setdefault(name, LINES[len(styles) % len(LINES)])
    for run, summaries in runs.items():
        kls = [summary["kl"].mean for summary in summaries]
        for kind, axis in (("reward", reward), ("cost", cost)):
            for name in summaries[0][kind]:
                gains = [summary[kind][name]["standardised"] for summary in summaries]
                label = f"{run}, {name}"
                axis.plot(kls, gains, styles[name], color=colours[run], label=label, ms=3)
        for name in summaries[0]["cost"]:
            line = styles[name]
            shares = [summary["cost"][name]["unsafe"] for summary in summaries]
            unsafe.plot(kls, [share.mean for share in shares], line, color=colours[run], ms=3)
            lows = [share.low for share in shares]
            highs = [share.high for share in shares]
            unsafe.fill_between(kls, lows, highs, color=colours[run], alpha=0.08, lw=0)
    reward.set_title("reward, in the reference's deviations")
    cost.set_title("cost, in the reference's deviations")
    unsafe.set_title("share of unsafe answers")
    for axis in axes[0]:
        axis.set_xlabel("KL to the reference, nats per answer")
    lines = {}  # by label: a score model may be in one panel only
    for axis in (reward, cost):
        handles, labels = axis.get_legend_handles_labels()
        lines.update(zip(labels, handles))
    columns = max(2, len(lines) // 2)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns)
    return save_figure(figure, out_dir, "overoptimisation")


def dual(curve, best, cost_limit, out_dir):
    """Draw the dual function and what it predicts over lambda.

    curve  Duals of eval/dual.py, in order of lambda; best: the one at lambda*"""
    made = make_figure(2, 2, 3.6, 2.6)
    if made is None:
        return NO_PICTURES
    figure, axes = made
    panels = {
        "value": "dual function",
        "reward": "reward",
        "cost": "cost (dotted: its limit)",
        "effective_samples": "answers that carry the weight",
    }
    lambdas = [point.lambda_ for point in curve]
    for axis, (name, title) in zip(axes.flat, panels.items()):
        axis.plot(lambdas, [getattr(point, name) for point in curve], color=BLUE)
        axis.scatter(best.lambda_, getattr(best, name), color=RED, zorder=3)
        axis.set(xlabel="lambda (red: lambda*)", title=title)
    axes[1, 0].axhline(cost_limit, color=GREY, ls=":")
    return save_figure(figure, out_dir, "dual")


# ---- runs ----


def read_run(folder, name):
    """A run's folder as {"name", "config", "rows", "samples", "warnings"}. Nothing is executed."""
    config = read_config(folder)
    rows = []
    for row in read_rows(folder, "metrics.jsonl"):
        numbers = {key: value for key, value in row.items() if is_finite_number(value)}
        if "step" in numbers:
            rows.append(numbers)
    watch = Watch(config)
    warnings = []
    for row in rows:
        for sentence in watch.see(row):
            warnings.append(f"step {row['step']}: {sentence}")
    samples = read_rows(folder, "samples.jsonl")
    return {"name": name, "config": config, "rows": rows, "samples": samples, "warnings": warnings}


def is_finite_number(value):
    """False for null, which stands in metrics.jsonl for a number that was not finite."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def read_config(folder):
    """The knobs in a run's config.py, which is parsed and not executed."""
    path = Path(folder, "config.py")
    if not path.exists():
        return {}
    with one_line_errors(path):
        source = path.read_text(encoding="utf-8")
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        stop(f"{path}, line {error.lineno}: {error.msg}")
    config = {}
    for node in statements:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            stop(f"{path}, line {node.lineno}: only NAME = VALUE is read")
        try:
            config[node.targets[0].id] = ast.literal_eval(node.value)
        except (ValueError, TypeError):
            stop(f"{path}, line {node.lineno}: the value is not a constant; nothing is executed")
    return config


def read_rows(folder, name):
    """The objects in a run's jsonl file."""
    rows = read_jsonl(os.path.join(folder, name))
    return [row for row in rows if isinstance(row, dict)]


def find_limit(run, metric):
    """The limit of a run's episode_cost or episode_cost_2."""
    if run["config"].get("constraint") == "prompt":
        return 0.0  # what the trainer counts is the excess over cost_limit
    return find_cost_limit(run, 1 if metric.endswith("_2") else 0)


def find_cost_limit(run, position):
    """What a run's cost_limit says about the cost model at this position, the first is 0."""
    limits = run["config"].get("cost_limit", 0.0)
    return limits[position] if isinstance(limits, list) else limits


def points_of(run, metric):
    """The (step, value) pairs of a metric in a run."""
    return [(row["step"], row[metric]) for row in run["rows"] if metric in row]


def draw_curves(runs, out_dir):
    """Draw all runs' curves, one panel per metric: faint, with their running means over them."""
    metrics = []
    for metric in PANELS:
        if any(len(points_of(run, metric)) > 1 for run in runs):
            metrics.append(metric)
    if not metrics:
        return "; no metrics to draw"
    made = make_figure(math.ceil(len(metrics) / 3), min(3, len(metrics)))
    if made is None:
        return NO_PICTURES
    figure, axes = made
    for axis, metric in zip(axes.flat, metrics):
        for run in runs:
            points = points_of(run, metric)
            if len(points) > 1:
                draw_curve(axis, run, points)
                if metric.startswith("episode_cost"):
                    axis.axhline(find_limit(run, metric), color=run["colour"], ls=":")
        axis.set_title(PANELS[metric])
        axis.legend(fontsize=7)
    for axis in axes.flat[len(metrics) :]:
        axis.set_axis_off()
    return save_figure(figure, out_dir, "curves")


def draw_curve(axis, run, points):
    steps = [step for step, _ in points]
    values = [value for _, value in points]
    half = len(values) // 40
    means = []
    for i in range(len(values)):
        near = values[max(0, i - half) : i + half + 1]
        means.append(sum(near) / len(near))
    axis.plot(steps, values, color=run["colour"], alpha=0.25, lw=0.8)
    axis.plot(steps, means, color=run["colour"], lw=1.6, label=run["name"])


def draw_plane(runs, out_dir):
    """Draw each constrained run's way through the plane of cost and reward."""
    constrained = []
    for run in runs:
        if any("episode_cost" in row for row in run["rows"]):
            constrained.append(run)
    made = make_figure(width=5, height=4) if constrained else None
    if made is None:
        return ""
    figure, axes = made
    axis = axes[0, 0]
    for run in constrained:
        rows = [row for row in run["rows"] if "cost" in row and "reward" in row]
        size = max(1, len(rows) // 20)
        costs = mean_of_blocks([row["cost"] for row in rows], size)
        rewards = mean_of_blocks([row["reward"] for row in rows], size)
        colour = run["colour"]
        axis.plot(costs, rewards, color=colour, lw=1, label=run["name"])
        hollow = {"facecolors": "white", "edgecolors": colour}
        axis.scatter(costs[:1], rewards[:1], s=50, zorder=3, **hollow)
        axis.scatter(costs[-1:], rewards[-1:], s=50, zorder=3, color=colour)
        axis.axvline(find_cost_limit(run, 0), color=colour, ls=":")
    axis.set(xlabel="cost (dotted: its limit)", ylabel="reward", title="before (hollow) and after")
    axis.legend()
    return save_figure(figure, out_dir, "plane")


def mean_of_blocks(values, size):
    """The means of consecutive blocks of `size` values."""
    means = []
    for start in range(0, len(values), size):
        block = values[start : start + size]
        means.append(sum(block) / len(block))
    return means


def write_page(runs, path):
    """Write a page that needs no other file: curves to look into, samples to browse."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    data = format_json(runs).replace("<", "\\u003c")  # so that no text can end the script
    Path(path).write_text(template.replace("/*DATA*/", data), encoding="utf-8")


# ---- the command ----


def main(arguments):
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return
    folders, flags = [], {}
    for argument in arguments:
        if argument.startswith("--"):
            name, _, value = argument[2:].partition("=")
            flags[name] = value
        else:
            folders.append(argument)
    if not folders or flags.keys() - {"out", "html"} or flags.get("html"):
        stop(USAGE)
    runs = read_runs(folders)
    out_dir = os.path.expanduser(flags.get("out") or "out/plots")
    make_folder(out_dir)
    if "html" in flags:
        write_page(runs, os.path.join(out_dir, "index.html"))
        print(f"{out_dir}/index.html: {len(runs)} runs; open it in a browser")
    else:
        written = draw_curves(runs, out_dir) + draw_plane(runs, out_dir)
        print(f"{out_dir}: {len(runs)} runs{written}")


def read_runs(folders):
    """The runs in these folders, each with a name of its own and a colour."""
    found, others = [], []
    for folder in folders:
        if os.path.exists(os.path.join(folder, "metrics.jsonl")):
            found.append(folder)
        else:
            others.append(folder)
    if not found:
        stop(f"no metrics.jsonl in {', '.join(folders[:3])}: name the folders of runs")
    if others:
        print("no runs, left out:", *others)
    names = [os.path.basename(os.path.normpath(folder)) for folder in found]
    runs = []
    for folder, name, colour in zip(found, names, repeat_colours(len(found))):
        run = read_run(folder, name if names.count(name) == 1 else folder)
        runs.append({**run, "colour": colour})
    return runs


if __name__ == "__main__":
    main(sys.argv[1:])
