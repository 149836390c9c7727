"""Figures 2 and 3 of every attacked run under a directory.

    python tests/figures.py DIR                     # -> DIR/figures/figure2, figure3, as PNG and SVG
    python tests/figures.py DIR --format cloze      # the same, options scored by text

Figure 2 is forget accuracy before and after Recovery, Figure 3 the attack's loss and forget accuracy by
attack step. The rows are those that `python evaluate_mmlu.py --table DIR` prints. Needs matplotlib
(tests/requirements.txt).
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

from common import fail
from evaluate_mmlu import average, read_json, rows_under, scored

LEGEND = {"frameon": False, "handlelength": 3.5}


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


def figure_2(Figure, rows, names, form):
    """Bars, for the width of a column: forget accuracy of each row before and after Recovery."""
    figure = Figure(figsize=(3.3, 0.5 + 0.3 * len(rows)))
    axes = figure.add_subplot()
    values = [average([scored(run) for run in runs]) for runs in rows.values()]
    for place, (key, label, style) in enumerate((
        ("forget", "unlearned", {"facecolor": "white", "hatch": "////"}),
        ("forget_recovered", "after recovery", {"facecolor": "0.35"}),
    )):  # fmt: skip
        axes.barh(
            [i + 0.38 * place for i in range(len(rows))], [v[key] for v in values], 0.38, label=label, lw=0.6,
            edgecolor="black", xerr=[v[f"{key}_se"] for v in values], error_kw={"lw": 0.8, "capsize": 1.5},
            **style,
        )  # fmt: skip
    axes.axvline(25, color="black", lw=0.8, ls="--", label="chance")
    axes.set(xlim=(0, 104), xlabel=f"forget accuracy, % ({form})")
    axes.set_yticks([i + 0.19 for i in range(len(rows))], names)
    axes.invert_yaxis()
    below = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.9), "ncols": 3}
    figure.legend(*axes.get_legend_handles_labels(), **below, **LEGEND)
    return figure


def figure_3(Figure, rows, names, form):
    """Curves, for the width of a page: the attack's loss and forget accuracy of each row, by attack step."""
    figure = Figure(figsize=(6.9, 2.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, runs in enumerate(rows.values()):
        look = {"color": f"{0.6 * (i % 3) / 2:.2f}", "ls": ("-", "--", ":", "-.")[i % 4], "lw": 0.9}
        look |= {
            "label": names[i],
            "marker": "os^Dv<>pX*"[i % 10],
            "ms": 3.2,
            "mfc": "white" if i % 2 else None,
        }
        steps, means, _ = zip(*curves(runs, "step", "loss"))
        left.plot(steps, means, markevery=(i % 4, 4), **look)
        runs = [run for run in runs if read_json(run["attack"] / "args.json")["arguments"]["format"] == form]
        if points := curves(runs, "accuracy", "forget"):
            steps, means, errors = zip(*((step, 100 * mean, 100 * se) for step, mean, se in points))
            right.errorbar(steps, means, errors, capsize=1.5, elinewidth=0.6, **look)
    right.axhline(25, color="black", lw=0.8, ls=(0, (1, 3)))
    left.set(xlabel="attack step", ylabel="attack loss, nats per token")
    right.set(xlabel="attack step", ylabel=f"forget accuracy, % ({form})", ylim=(0, 104))
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", **LEGEND)
    return figure


def figures(root, rows, form):
    """Writes Figures 2 and 3 of the attacked rows of Table 1, in greys, into root/figures.

    rows  of evaluate_mmlu.rows_under; if all attacked rows are of Table 2, these are drawn
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        fail("the figures need matplotlib, which is not installed; pip install -r tests/requirements.txt")
    rows = {name: runs for name, runs in rows.items() if runs[0]["attack"]}
    best = "AdvProbes-5 (IDK, Frz.)"  # of Table 1; the others are Table 2's
    rows = {name: runs for name, runs in rows.items() if name == best or name[:9] != "AdvProbes"} or rows
    if not rows:
        fail(f"{root}: no attacked run scored by {form} there; run recover.py --ckpt on its checkpoints")
    matplotlib.rcParams.update({"font.size": 7, "svg.hashsalt": "rmat", "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False, "axes.linewidth": 0.6, "hatch.linewidth": 0.5})
    names = ["Adversarial Probes" if name == best else name for name in rows]
    for name, draw in (("figure2", figure_2), ("figure3", figure_3)):
        save_figure(draw(Figure, rows, names, form), Path(root) / "figures", name)


def main(args):
    figures(args.dir, rows_under(args.dir, args.format), args.format)


if __name__ == "__main__":
    main(args)
