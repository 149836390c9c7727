"""Figures 2 and 3 of every attacked run under a directory, as PNG and SVG in DIR/figures.

    python tests/figures.py DIR --format cloze      # options scored by text; without: by letter

Figure 2: accuracy before and after Recovery. Figure 3: its loss and accuracies by step. Of sweeps, `worst`:
what each attacker reached. Rows are those of `evaluate_mmlu.py --table DIR`; the never-taught control is grey
(mean ± standard error).
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import fail, read_json
from evaluate_mmlu import CONTROL, LIMIT, columns, damaged, rows_under

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError:
    fail("the figures need matplotlib, which is not installed; pip install -r tests/requirements.txt")

BEST = "AdvProbes-5 (IDK, Frz.)"  # of Table 1 and of Table 2
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F")
MARKERS, CHANCE = "os^Dv<>p", dict(color="black", lw=0.8, ls=(0, (4, 2)))
RIGHT = dict(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
ABOVE = dict(loc="outside upper center", ncols=4, frameon=False)
UNLEARNED = dict(facecolor="#9ECAE9", hatch="////", label="unlearned")
RECOVERED = dict(facecolor="#B5400A", label="after recovery")  # dark: apart without colour too


def curves(runs, form, phase, key, factor=1):
    """Steps, means and standard errors of a value that the attacks on these runs logged, times `factor`, if
    they scored by `form`; the steps that all of them logged."""
    values = {}
    for attack in [run["attack"] for run in runs]:
        scored = read_json(attack / "args.json")["arguments"]["format"] == form
        for line in (attack / "metrics.jsonl").read_text().splitlines() if scored else ():
            if (entry := json.loads(line))["phase"] == phase:
                values.setdefault(entry["step"], []).append(factor * entry[key])
    most = max(map(len, values.values()), default=0)
    steps = sorted(step for step in values if len(values[step]) == most)
    errors = [statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else 0.0 for v in map(values.get, steps)]
    return steps, [statistics.mean(values[step]) for step in steps], errors


def figure_2(parts, control, form):
    """Bars: forget (left) and retain accuracy of each row, before and after Recovery."""
    names, values = zip(*((name, columns(runs)) for _, part in parts for name, runs in part.items()))
    places = [i + 0.6 * (i >= len(parts[0][1])) for i in range(len(names))]  # a gap before Table 2's
    figure = Figure(figsize=(6.9, 0.8 + 0.27 * len(names)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, side in zip(panels, ("forget", "retain")):
        if control:
            mean, se = (columns(control)[f"{side}_recovered{end}"] for end in ("", "_se"))
            axes.axvspan(mean - se, mean + se, color="0.85", lw=0, label="never taught, after recovery")
        axes.axvline(25, **CHANCE, label="chance")
        for shift, end, look in ((-0.19, "", UNLEARNED), (0.19, "_recovered", RECOVERED)):
            means, errors = ([v[f"{side}{end}{more}"] for v in values] for more in ("", "_se"))
            look = look | dict(xerr=errors, error_kw={"lw": 0.8, "capsize": 1.5}, lw=0.5, ec="black")
            axes.barh([place + shift for place in places], means, 0.38, **look)
        axes.set(xlim=(0, 104), xlabel=f"{side} accuracy, % ({form})", yticks=places, yticklabels=names)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), **ABOVE)
    return figure


def figure_3(parts, control, form):
    """Curves by attack step: loss, forget and retain accuracy; a row of panels for each table."""
    figure = Figure(figsize=(6.9, 0.3 + 2.2 * len(parts)), layout="constrained")
    panels = figure.subplots(len(parts), 3, squeeze=False)
    for line, (title, part) in zip(panels, parts):
        for i, (name, runs) in enumerate(part.items()):
            look = {"color": COLOURS[i % 8], "ls": ("-", "--", "-.", ":")[(i + i // 8) % 4], "lw": 1.1}
            look |= {"marker": MARKERS[i % 8], "ms": 3, "mfc": "white" if i % 2 else None, "label": name}
            line[0].plot(*curves(runs, form, "step", "loss")[:2], markevery=(i % 4, 4), **look)
            for axes, side in zip(line[1:], ("forget", "retain")):
                axes.errorbar(*curves(runs, form, "accuracy", side, 100), capsize=1.2, elinewidth=0.5, **look)
        for axes, side in zip(line[1:], ("forget", "retain")):
            if control:
                steps, *ends = curves(control, form, "accuracy", side, 100)
                low, high = ([mean + sign * se for mean, se in zip(*ends)] for sign in (-1, 1))
                axes.fill_between(steps, low, high, color="0.8", lw=0, label="never taught")
            axes.axhline(25, **CHANCE)
            axes.text(1, 23, "chance", ha="right", va="top", transform=axes.get_yaxis_transform())
            axes.set(ylim=(0, 104), ylabel=f"{side} accuracy, % ({form})")
        line[0].set(ylabel="attack loss, nats per token")
        line[-1].legend(**RIGHT, handlelength=3, title=title)
    figure.supxlabel("attack step", fontsize=7)
    return figure


def figure_worst(swept, control, form):
    """Dots: what each attacker of the sweeps reached, forget against retain accuracy; a panel for each row.
    The control's dots are grey; left of the dotted line is damage; the highest dot that counts is named."""
    height = math.ceil(len(swept) / 4)
    figure = Figure(figsize=(6.9, 0.3 + 1.9 * height), layout="constrained")
    panels = figure.subplots(height, 4, squeeze=False, sharex=True, sharey=True)

    def best(runs):
        """[(retain, forget, attacker)] at the highest forget accuracy, without damage if it ever was."""
        found = []
        for name, (before, *states) in (x for run in runs for x in run["attacks"].items()):
            top = max(states or [before], key=lambda s: (not damaged(before, s), s["forget"]))
            found.append((100 * top["retain"], 100 * top["forget"], name.removeprefix("sweep/")))
        return found

    for axes, (name, runs) in zip(panels.flat, swept.items()):
        before = [100 * statistics.mean(run["theta"][x]["acc"] for run in runs) for x in ("retain", "forget")]
        if never := best(control):
            own = 100 * statistics.mean(run["theta"]["retain"]["acc"] - LIMIT for run in control)
            inside = [y for x, y, _ in never if x >= own] or [0]
            axes.axhspan(min(inside), max(inside), color="0.9", lw=0, label="never taught, without damage")
            axes.scatter(*[*zip(*never)][:2], s=7, c="0.6", lw=0, label="never taught")
        x, y, attacker = zip(*best(runs))
        axes.scatter(x, y, s=9, c=RECOVERED["facecolor"], marker="^", lw=0, label="an attacker's best")
        axes.plot(*before, "s", ms=5, mfc="none", mec="black", label="before the attacks")
        least = before[0] - 100 * LIMIT
        axes.axvline(least, color="black", lw=0.6, ls=":")
        axes.axhline(25, **CHANCE)
        if top := max(((v, n) for u, v, n in zip(x, y, attacker) if u >= least), default=None):
            axes.text(least - 2, *top, ha="right", va="center")
        axes.set(title=name, xlim=(0, 104), ylim=(0, 104))
    for axes in panels.flat[len(swept) :]:
        axes.set_axis_off()
    figure.supxlabel(f"retain accuracy, % ({form})")
    figure.supylabel(f"forget accuracy, % ({form})")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), **ABOVE)
    return figure


def figures(root, rows, form):
    """Writes the figures of rows, see evaluate_mmlu.rows_under; the same rows give the same bytes."""

    def having(key):
        """Table 1's rows and Table 2's, [(title, {name: runs})], and the control's runs, which have it."""
        found = {name: own for name, runs in rows.items() if (own := [run for run in runs if run[key]])}
        control, best = found.pop(CONTROL, []), {"Adversarial Probes": found[BEST]} if BEST in found else {}
        second = {name: runs for name, runs in found.items() if name.startswith("AdvProbes")}
        first = {name: runs for name, runs in found.items() if name not in second} | best
        second = second if {*second} - {BEST} else {}
        return [(title, part) for title, part in (("Table 1", first), ("Table 2", second)) if part], control

    def save(figure, name):
        (folder := Path(root) / "figures").mkdir(exist_ok=True)
        for kind, facts in (("png", {"Software": None}), ("svg", {"Date": None})):
            figure.savefig(folder / f"{name}.{kind}", dpi=300, bbox_inches="tight", metadata=facts)
            print(f"wrote {folder / name}.{kind}")

    look = {"font.size": 7, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6}
    matplotlib.rcParams.update(look | {"hatch.linewidth": 0.4, "svg.hashsalt": "rmat"})
    parts, control = having("attacks")
    if swept := {name: runs for _, part in parts for name, runs in part.items() if name != BEST}:
        save(figure_worst(swept, control, form), "worst")
    parts, control = having("recovered")
    if parts:
        save(figure_2(parts, control, form), "figure2")
        save(figure_3(parts, control, form), "figure3")
    elif not swept:
        fail(f"{root}: no attacked run scored by {form} there; run recover.py --ckpt on its checkpoints")


if __name__ == "__main__":
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("dir", metavar="DIR", help="directory of runs that recover.py attacked")
    parser.add_argument("--format", default="letter", choices=("letter", "cloze"), help="scores to draw")
    args = parser.parse_args()
    figures(args.dir, rows_under(args.dir, args.format), args.format)
