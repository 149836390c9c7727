"""Figures 2 and 3 of every attacked run under a directory.

    python tests/figures.py DIR                     # -> DIR/figures/figure2, figure3, as PNG and SVG
    python tests/figures.py DIR --format cloze      # the same, options scored by text

Figure 2 is forget and retain accuracy before and after Recovery, Figure 3 the attack's loss and both
accuracies by attack step; where checkpoints were swept, `worst`, what each attacker reached, and `frontier`,
what robustness costs in compute and in retain accuracy. The rows are
those that `python evaluate_mmlu.py --table DIR` prints, Table 1's apart from Table 2's; the never-taught
control, where there is one, is grey, in Figures 2 and 3 as a band of mean ± standard error.
Needs matplotlib (tests/requirements.txt).
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse_args(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("dir", metavar="DIR", help="directory of runs that recover.py attacked")
    add("--format", default="letter", choices=("letter", "cloze"), help="which scores to draw")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before torch is imported

from common import fail, local_path
from evaluate_mmlu import (
    CONTROL, LIMIT, average, read_facts, read_json, rows_under, scored, worst_case,
)  # fmt: skip

OF_BASELINE = {"npo": 7, "rmu": 7, "undo": 8, "overwriting": 8}  # passes a step; the others: 6
BEST = "AdvProbes-5 (IDK, Frz.)"  # of Table 1 and of Table 2
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F")
BEFORE, AFTER = "#9ECAE9", "#B5400A"  # light and dark: apart without colour too


def standard_error(values):
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def curves(runs, phase, key):
    """[(step, mean, standard error)] of a value that the attacks on these runs logged."""
    values = {}
    for run in runs:
        for line in (run["attack"] / "metrics.jsonl").read_text().splitlines():
            entry = json.loads(line)
            if entry["phase"] == phase:
                values.setdefault(entry["step"], []).append(entry[key])
    return [(step, statistics.mean(v), standard_error(v)) for step, v in sorted(values.items())]


def save_figure(figure, folder, name):
    """Writes a PNG and an SVG; the same rows give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, facts in (("png", {"Software": None}), ("svg", {"Date": None})):
        figure.savefig(folder / f"{name}.{kind}", dpi=300, bbox_inches="tight", metadata=facts)
        print(f"wrote {folder / name}.{kind}")


def groups(rows):
    """The rows but for the control's, [(title, {name: runs})]: Table 1's, then Table 2's."""
    drawn = {name: runs for name, runs in rows.items() if name != CONTROL}
    first = {"Adversarial Probes" if k == BEST else k: v for k, v in drawn.items()}
    first = {k: v for k, v in first.items() if not k.startswith("AdvProbes")}
    second = {k: v for k, v in drawn.items() if k.startswith("AdvProbes")}
    second = {} if second.keys() <= {BEST} else second
    return [(title, part) for title, part in (("Table 1", first), ("Table 2", second)) if part]


def figure_2(Figure, parts, control, form):
    """Bars: forget (left) and retain accuracy of each row, before and after Recovery."""
    names = [name for _, part in parts for name in part]
    values = [average([scored(run) for run in runs]) for _, part in parts for runs in part.values()]
    places = [i + 0.6 * (i >= len(parts[0][1])) for i in range(len(names))]  # a gap before Table 2's
    figure = Figure(figsize=(6.9, 0.8 + 0.27 * len(names)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, side in zip(panels, ("forget", "retain")):
        if control:
            c = average([scored(run) for run in control])
            mean, se = c[f"{side}_recovered"], c[f"{side}_recovered_se"]
            axes.axvspan(mean - se, mean + se, color="0.85", lw=0, label="never taught, after recovery")
        axes.axvline(25, color="black", lw=0.8, ls=(0, (4, 2)), label="chance")
        for shift, key, label, look in (
            (-0.19, side, "unlearned", {"facecolor": BEFORE, "hatch": "////"}),
            (0.19, f"{side}_recovered", "after recovery", {"facecolor": AFTER}),
        ):
            axes.barh(
                [place + shift for place in places], [v[key] for v in values], 0.38, lw=0.5, ec="black",
                xerr=[v[f"{key}_se"] for v in values], error_kw={"lw": 0.8, "capsize": 1.5}, label=label,
                **look,
            )  # fmt: skip
        axes.set(xlim=(0, 104), xlabel=f"{side} accuracy, % ({form})")
        axes.set_yticks(places, names)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def figure_3(Figure, parts, control, form):
    """Curves by attack step: loss, forget and retain accuracy; a row of panels for each table."""
    figure = Figure(figsize=(6.9, 0.3 + 2.2 * len(parts)), layout="constrained")
    panels = figure.subplots(len(parts), 3, squeeze=False)
    for line, (title, part) in zip(panels, parts):
        for i, (name, runs) in enumerate(part.items()):
            look = {"color": COLOURS[i % 8], "ls": ("-", "--", "-.", ":")[(i + i // 8) % 4], "lw": 1.1}
            look |= {"marker": "os^Dv<>p"[i % 8], "ms": 3, "mfc": "white" if i % 2 else None, "label": name}
            steps, means, _ = zip(*curves(runs, "step", "loss"))
            line[0].plot(steps, means, markevery=(i % 4, 4), **look)
            scored_so = [
                r for r in runs if read_json(r["attack"] / "args.json")["arguments"]["format"] == form
            ]
            for axes, side in zip(line[1:], ("forget", "retain")):
                if points := curves(scored_so, "accuracy", side):
                    steps, means, errors = zip(*((s, 100 * mean, 100 * se) for s, mean, se in points))
                    axes.errorbar(steps, means, errors, capsize=1.2, elinewidth=0.5, **look)
        for axes, side in zip(line[1:], ("forget", "retain")):
            if points := curves(control, "accuracy", side):
                low, high = zip(*((100 * (mean - se), 100 * (mean + se)) for _, mean, se in points))
                axes.fill_between([s for s, *_ in points], low, high, color="0.8", lw=0, label="never taught")
            axes.axhline(25, color="black", lw=0.8, ls=(0, (4, 2)))
            axes.annotate(
                "chance", (1, 25), (0, -2), ("axes fraction", "data"), "offset points", ha="right", va="top"
            )
            axes.set(ylim=(0, 104), ylabel=f"{side} accuracy, % ({form})")
        line[0].set(ylabel="attack loss, nats per token")
        line[-1].legend(
            loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, handlelength=3, title=title
        )
    for axes in panels[-1]:
        axes.set_xlabel("attack step")
    return figure


def figure_worst(Figure, rows, form):
    """Dots: what each attacker of the sweeps reached, forget against retain accuracy; a panel for each row.

    The control's dots are in every panel, in grey; left of the dotted line is damage, see worst_case. The
    highest dot that counts is named.
    """
    control = [run for run in rows.get(CONTROL, []) if run.get("sweep")]
    swept = {k: [run for run in v if run.get("sweep")] for k, v in rows.items() if k != CONTROL}
    swept = {"Adversarial Probes" if k == BEST else k: v for k, v in swept.items() if v}
    figure = Figure(figsize=(6.9, 0.3 + 1.9 * math.ceil(len(swept) / 4)), layout="constrained")
    panels = figure.subplots(math.ceil(len(swept) / 4), 4, squeeze=False, sharex=True, sharey=True)

    def best(runs):
        """[(retain, forget, attacker)] of each attacker of each run, percent, at its highest forget accuracy
        without damage; of one that always did damage, at its highest."""
        found = []
        for run in runs:
            for name, attack in run["sweep"].items():
                least = 100 * (attack["retain"] - LIMIT)
                states = [(100 * s["retain"], 100 * s["forget"], name) for s in attack["states"] if s["step"]]
                found.append(max([s for s in states if s[0] >= least] or states, key=lambda s: s[1]))
        return found

    for axes, (name, runs) in zip(panels.flat, swept.items()):
        before = [
            100 * statistics.mean(run["theta"][side]["acc"] for run in runs) for side in ("retain", "forget")
        ]
        if never := best(control):
            low, high = min(y for x, y, _ in never if x >= 90), max(y for x, y, _ in never if x >= 90)
            axes.axhspan(low, high, color="0.9", lw=0, label="never taught: range without damage")
            axes.scatter(*zip(*((x, y) for x, y, _ in never)), s=7, c="0.6", lw=0, label="never taught")
        x, y, attacker = zip(*best(runs))
        axes.scatter(x, y, s=9, c=AFTER, marker="^", lw=0, label="an attacker's best")
        axes.plot(*before, "s", ms=5, mfc="none", mec="black", label="before the attacks")
        axes.axvline(before[0] - 100 * LIMIT, color="black", lw=0.6, ls=":")
        axes.axhline(25, color="black", lw=0.8, ls=(0, (4, 2)))
        top = max(
            ((v, u, n) for u, v, n in zip(x, y, attacker) if u >= before[0] - 100 * LIMIT), default=None
        )
        if top:
            axes.text(before[0] - 100 * LIMIT - 2, top[0], top[2], ha="right", va="center")
        axes.set(title=name, xlim=(0, 104), ylim=(0, 104))
    for axes in panels.flat[len(swept) :]:
        axes.set_axis_off()
    figure.supxlabel(f"retain accuracy, % ({form})")
    figure.supylabel(f"forget accuracy, % ({form})")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False
    )
    return figure


def passes(folder):
    """Passes over a batch that made a checkpoint out of its base: a forward pass counts 1, a backward pass 2.
    What adversarial probes cost by themselves is not counted."""
    facts = read_facts(folder) or {}
    script, a = facts.get("script"), facts.get("arguments", {})
    outer = 3 * (2 * a["K"] + 1) * a["N"] if script in ("mlac_ar.py", "rmat.py") else 0
    own = {
        "random_mapping.py": lambda: 6 * a["steps"],
        "mlac_ar.py": lambda: outer,
        "rmat.py": lambda: 6 * a["rm_steps"] + outer,
        "adv_probes.py": lambda: (6 if a["swd"] else 7) * a["steps"],
        "baselines.py": lambda: OF_BASELINE.get(a["method"], 6) * a["steps"],
    }
    return own[script]() + passes(local_path(folder, facts["parent"])) if script in own else 0


def figure_frontier(Figure, rows):
    """Points: ρ in the worst case over the attackers that all rows were swept with, by passes of training.
    Filled points cost at most 2 points of retain accuracy; the control is the grey line."""
    swept = {name: [run for run in runs if run.get("sweep")] for name, runs in rows.items()}
    swept = {"Adversarial Probes" if name == BEST else name: runs for name, runs in swept.items() if runs}
    common = set.intersection(*(set(run["sweep"]) for runs in swept.values() for run in runs))

    def rho(runs):
        found = [worst_case({k: v for k, v in run["sweep"].items() if k in common}) for run in runs]
        return statistics.mean(w["rho"] for w in found), standard_error([w["rho"] for w in found])

    figure = Figure(figsize=(6.9, 3.2), layout="constrained")
    axes = figure.subplots()
    if control := swept.pop(CONTROL, None):
        axes.axhline(rho(control)[0], color="0.7", lw=3, label="never taught")
    for i, (name, runs) in enumerate((n, r) for n, r in swept.items() if passes(r[0]["folder"])):
        cost = statistics.mean(
            100 * (run["base"]["retain"]["acc"] - run["theta"]["retain"]["acc"]) for run in runs
        )
        mean, error = rho(runs)
        axes.errorbar(
            statistics.mean(passes(run["folder"]) for run in runs), mean, error or None,
            fmt="os^Dv<>p"[(i + 3 * (i // 8)) % 8], color=COLOURS[i % 8], ms=5, lw=0.8,
            mfc=None if cost <= 2 else "white", label=f"{name}: {max(cost, 0):.1f}",
        )  # fmt: skip
    axes.axhline(0, color="black", lw=0.8, ls=(0, (4, 2)))
    axes.set(xscale="log", xlabel="passes of training (forward 1, backward 2)", ylim=(-0.15, 1.05))
    axes.set_ylabel(f"ρ, the worst of {', '.join(sorted(common)) if len(common) < 5 else len(common)}")
    axes.legend(
        loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, title="cost in points of retain accuracy"
    )
    return figure


def figures(root, rows, form):
    """Writes Figures 2 and 3 of the attacked rows, and those of the sweeps where there are any, into
    root/figures.

    rows  of evaluate_mmlu.rows_under
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        fail("the figures need matplotlib, which is not installed; pip install -r tests/requirements.txt")
    swept = any(run.get("sweep") for runs in rows.values() for run in runs)
    if swept:
        matplotlib.rcParams.update({"font.size": 7, "svg.hashsalt": "rmat"})
        save_figure(figure_worst(Figure, rows, form), Path(root) / "figures", "worst")
        save_figure(figure_frontier(Figure, rows), Path(root) / "figures", "frontier")
    rows = {name: runs for name, runs in rows.items() if runs[0]["attack"]}
    control, parts = rows.get(CONTROL, []), groups(rows)
    if not parts and swept:
        return
    if not parts:
        fail(f"{root}: no attacked run scored by {form} there; run recover.py --ckpt on its checkpoints")
    matplotlib.rcParams.update({"font.size": 7, "svg.hashsalt": "rmat", "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False, "axes.linewidth": 0.6, "hatch.linewidth": 0.4})
    for name, draw in (("figure2", figure_2), ("figure3", figure_3)):
        save_figure(draw(Figure, parts, control, form), Path(root) / "figures", name)


def main(args):
    figures(args.dir, rows_under(args.dir, args.format), args.format)


if __name__ == "__main__":
    main(args)
