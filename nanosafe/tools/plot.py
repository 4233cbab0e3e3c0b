"""Pictures of runs, PNG and SVG, by matplotlib (pip install matplotlib); and a page to browse.

$ python -m nanosafe.plot out/demo/*                   # curves of several runs -> out/plots
$ python -m nanosafe.plot out/demo/* --html [--out=FOLDER]   # one page: curves, samples"""

import ast
import json
import os
import sys
from pathlib import Path

from nanosafe.errors import stop, one_line_errors
from nanosafe.monitor import Watch
from nanosafe.storage import make_folder, read_jsonl


COLOURS = ("#c0392b", "#2458a8", "#3a8f4d", "#b8860b", "#7d3c98", "#555555")


NONE = "; no pictures: pip install matplotlib"


PANELS = {  # metric -> title
    "reward": "reward",
    "episode_cost": "mean cost (dotted: its limit)",
    "lambda": "lambda",
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


def figure(rows=1, columns=1, width=4.2, height=3.1):
    """(figure, axes) of matplotlib, without a window; None where it is missing."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    matplotlib.rcParams.update(
        {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 9,
            "legend.frameon": 0,
            "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
            "svg.hashsalt": "nanosafe",
            "text.parse_math": 0,
        }
    )
    drawn = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return drawn, drawn.subplots(rows, columns, squeeze=False)


def save(drawn, out_dir, name):
    """Write a figure as PNG and SVG; returns what to say of it."""
    drawn.savefig(os.path.join(out_dir, name + ".png"), dpi=144, metadata={"Software": None})
    drawn.savefig(os.path.join(out_dir, name + ".svg"), metadata={"Date": None})
    return f", {name}.png, {name}.svg"


def arena(scores, policies, out_dir):
    """Each policy's answers in the plane of cost and reward, and their mean; of many, ratings."""
    more = len(scores) > 2
    if not (made := figure(1, len(scores) + more, 3.3)):
        return NONE
    drawn, (axes,) = made
    costs, rewards = ([x for s in scores.values() for x in s[k]] for k in ("cost", "reward"))
    for axis, color, (name, said) in zip(axes, COLOURS * len(scores), scores.items()):
        axis.scatter(said["cost"], said["reward"], s=6, alpha=0.3, linewidths=0, color=color)
        (x, *xs), (y, *ys) = policies[name]["cost"], policies[name]["reward"]
        axis.plot(xs, [y, y], [x, x], ys, color="black", lw=1)
        axis.scatter(x, y, s=70, color=color, edgecolors="black", zorder=3)
        axis.set(
            xlabel="cost",
            title=f"{name}: {policies[name]['unsafe']:.1%} unsafe",
            xlim=(min(costs) - 1, max(1, *costs) + 1),
            ylim=(min(rewards) - 1, max(rewards) + 1),
        )
        axis.axvspan(0, axis.get_xlim()[1], color=COLOURS[0], alpha=0.07, lw=0)
        axis.annotate("unsafe", (0.98, 0.02), xycoords="axes fraction", ha="right", color="grey")
        if more:
            x, y = policies[name]["safe"], policies[name]["helpful"]
            axes[-1].scatter(x, y, s=70, color=color, edgecolors="black")
            axes[-1].annotate(name, (x, y), xytext=(7, 4), textcoords="offset points")
    axes[0].set_ylabel("reward")
    if more:
        axes[-1].set(xlabel="rating: safe", ylabel="rating: helpful", title="ratings")
        axes[-1].margins(0.3)
    return save(drawn, out_dir, "arena")


def scores(groups, curves, out_dir):
    """How the scores of two groups are distributed; said probabilities against what came true."""
    if not (made := figure(1, 2)):
        return NONE
    drawn, ((left, right),) = made
    flat = [x for values in groups.values() for x in values]
    for (name, x), color in zip(groups.items(), (COLOURS[1], COLOURS[0])):
        left.hist(x, 60, (min(flat), max(flat)), alpha=0.6, label=f"{name} ({len(x)})", color=color)
    left.set(xlabel="score", ylabel="answers")
    right.plot([0, 1], [0, 1], color="grey", lw=1, ls=":")
    for name, points in curves.items():
        said, true, counts = zip(*points)
        (line,) = right.plot(said, true, marker="o", ms=3, label=name)
        for x, y, count in points:
            right.annotate(
                str(count),
                (x, y),
                xytext=(3, -8),
                textcoords="offset points",
                fontsize=6,
                color=line.get_color(),
            )
    right.set(xlabel="probability given", ylabel="share that was so", title="calibration")
    left.legend()
    right.legend()
    return save(drawn, out_dir, "scores")


def read_run(folder, name):
    """{"name", "config", "rows", "samples", "warnings"} of a run's folder; nothing is executed."""
    path = Path(folder, "config.py")
    with one_line_errors(folder):
        source = path.read_text(encoding="utf-8") if path.exists() else ""
        config = {x.targets[0].id: ast.literal_eval(x.value) for x in ast.parse(source).body}
        rows, samples = (
            [
                row
                for row in read_jsonl(os.path.join(folder, file + ".jsonl"))
                if isinstance(row, dict)
            ]
            for file in ("metrics", "samples")
        )
        rows = [{key: x for key, x in row.items() if type(x) in (int, float)} for row in rows]
        watch = Watch(config)
        warnings = [f"step {row['step']}: {text}" for row in rows for text in watch.see(row)]
    return {"name": name, "config": config, "rows": rows, "samples": samples, "warnings": warnings}


def curves(runs, out_dir):
    """All runs' curves, a panel for each metric; faint, and over them a running mean."""
    seen = lambda run, name: [(row["step"], row[name]) for row in run["rows"] if name in row]
    shown = [name for name in PANELS if any(len(seen(run, name)) > 1 for run in runs)]
    if not shown or not (made := figure(-(-len(shown) // 3), min(3, len(shown)))):
        return NONE if shown else "; no metrics to draw"
    drawn, axes = made
    for axis, name in zip(axes.flat, shown):
        for run in (run for run in runs if len(seen(run, name)) > 1):
            steps, values = zip(*seen(run, name))
            half = len(values) // 40
            near = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
            means = [sum(part) / len(part) for part in near]
            axis.plot(steps, values, color=run["colour"], alpha=0.25, lw=0.8)
            axis.plot(steps, means, color=run["colour"], lw=1.6, label=run["name"])
            if name == "episode_cost":
                axis.axhline(run["config"].get("cost_limit", 0), color=run["colour"], ls=":")
        axis.set_title(PANELS[name])
        axis.legend(fontsize=7)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    return save(drawn, out_dir, "curves")


def plane(runs, out_dir):
    """Each constrained run's way through the plane of cost and reward, before to after."""
    runs = [run for run in runs if any("episode_cost" in row for row in run["rows"])]
    if not runs or not (made := figure(width=5, height=4)):
        return ""
    drawn, ((axis,),) = made
    for run in runs:
        rows, colour = [r for r in run["rows"] if {"cost", "reward"} <= r.keys()], run["colour"]
        n = max(1, len(rows) // 20)
        x, y = (
            [
                sum(row[key] for row in rows[k : k + n]) / len(rows[k : k + n])
                for k in range(0, len(rows), n)
            ]
            for key in ("cost", "reward")
        )
        axis.plot(x, y, color=colour, lw=1, label=run["name"])
        axis.scatter(x[:1], y[:1], s=50, facecolors="white", edgecolors=colour, zorder=3)
        axis.scatter(x[-1:], y[-1:], s=50, color=colour, zorder=3)
        axis.axvline(run["config"].get("cost_limit", 0.0), color=colour, ls=":")
    axis.set(xlabel="cost (dotted: its limit)", ylabel="reward", title="before (hollow) and after")
    axis.legend()
    return save(drawn, out_dir, "plane")


def page(runs, path):
    """One page that needs nothing else: curves to look into, samples to browse."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    finite = json.loads(json.dumps(runs), parse_constant=lambda _: None)  # JSON has no NaN
    data = json.dumps(finite).replace("<", "\\u003c")  # no text ends the script
    Path(path).write_text(template.replace("/*DATA*/", data), encoding="utf-8")


def main(arguments):
    folders = [arg for arg in arguments if not arg.startswith("--")]
    flags = dict(arg[2:].partition("=")[::2] for arg in arguments if arg.startswith("--"))
    if not folders or flags.keys() - {"out", "html"} or flags.get("html"):
        stop("python -m nanosafe.plot RUN ... [--out=FOLDER] [--html]")
    found = [path for path in folders if os.path.exists(os.path.join(path, "metrics.jsonl"))]
    if not found:
        stop(f"no metrics.jsonl in {', '.join(folders[:3])}: name the folders of runs")
    names = [os.path.basename(os.path.normpath(path)) for path in found]
    runs = [
        {**read_run(path, name if names.count(name) == 1 else path), "colour": colour}
        for path, name, colour in zip(found, names, COLOURS * len(found))
    ]
    if len(found) < len(folders):
        print("no runs, left out:", *(path for path in folders if path not in found))
    out = flags.get("out") or "out/plots"
    make_folder(out)
    if "html" in flags:
        page(runs, os.path.join(out, "index.html"))
        print(f"{out}/index.html: {len(runs)} runs; open it in a browser")
    else:
        print(f"{out}: {len(runs)} runs{curves(runs, out)}{plane(runs, out)}")


if __name__ == "__main__":
    main(sys.argv[1:])
