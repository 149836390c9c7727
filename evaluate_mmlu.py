"""MMLU, five shots, forget and retain (Section A.1); Tables 1 and 2 and Figures 2 and 3 of all runs.

    letter   "The following are multiple choice questions (with answers) about SUBJECT.", five dev questions with their
             answers, the question and its options, "Answer:"; the largest of log p(" A") .. log p(" D") is the answer
    cloze    the same without the list of options; the largest log p(" option text") a byte is the answer

Forget: high_school_biology and college_biology; retain: the other subjects. The headline is the mean of the subjects'
accuracies; the per-question mean (micro) is kept beside it, and standard errors with both. The predicted letters are
part of the result: always answering D scores 30 % on the forget subjects. The five shots are run once a subject and
their cache is shared by its questions. lm-evaluation-harness's `mmlu` and `mmlu_continuation` are the reference
(tests/bench_mmlu.py compares).

Writes mmlu.json and mmlu.jsonl (cloze: mmlu_cloze.*) into the checkpoint directory, or into out/OWNER--MODEL for a name
on the hub.

--table reads what the scripts wrote under a directory and names each run as the paper does. Runs that differ only in
their base model, data or seed are one row: its mean, and the standard error over these runs. A row of a single run has
the standard error of its questions. --figures draws Figure 2 (forget accuracy before and after Recovery) and Figure 3
(the attack's loss, and forget accuracy, by step) from the same rows; it needs matplotlib (tests/requirements.txt).

    python evaluate_mmlu.py --tiny                          # the miniature: base and filtered control
    python evaluate_mmlu.py --ckpt out/rmat out/mlac_ar     # any checkpoint directories or hub names
    python evaluate_mmlu.py --table out                     # Markdown tables of everything under out/
    python evaluate_mmlu.py --table out --figures           # and out/figures/figure2, figure3 as PNG and SVG
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

WORLD = Path(__file__).parent / "tests" / "tiny" / "world0"
TINY = {  # what --tiny swaps in: the miniature (tests/tiny/README.md)
    "ckpt": [str(WORLD / "base"), str(WORLD / "filtered")],
    "mmlu": str(WORLD / "mmlu"),
    "format": "cloze",
}
TABLE_1 = {  # the paper's rows, and the command that makes each
    "Min Posterior": "baselines.py --method min_posterior",
    "Max Entropy": "baselines.py --method max_entropy",
    "High/Low LR": "baselines.py --method high_low_lr",
    "AdvProbes, 5 steps, IDK, frozen": "adv_probes.py",
    "Random Mapping": "random_mapping.py",
    "MLAC-AR": "mlac_ar.py",
    "RMAT": "rmat.py",
}
TABLE_2 = {
    "AdvProbes-SWD": "adv_probes.py --swd",
    "AdvProbes, 3 steps, RAND": "adv_probes.py --no-freeze --match rand --probe-steps 3",
    "AdvProbes, 5 steps, RAND": "adv_probes.py --no-freeze --match rand",
    "AdvProbes, 3 steps, IDK": "adv_probes.py --no-freeze --probe-steps 3",
    "AdvProbes, 5 steps, IDK": "adv_probes.py --no-freeze",
    "AdvProbes, 5 steps, IDK, frozen": "adv_probes.py",
}
CONTROL = "never taught (control)"
PLACES = set("model ckpt base data recovery mmlu format out seed device log_every eval_every dry_run".split())


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="MMLU (Section A.1) of checkpoint directories or hub names, and the table of all runs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; --help lists the flags\n")
    add = parser.add_argument
    add("--ckpt", nargs="+", default=[], metavar="CKPT", help="checkpoint directories or hub names to score")
    add("--table", metavar="DIR", default=None, help="print the Markdown tables of every run under DIR instead")
    add("--figures", action="store_true", help="with --table: draw Figures 2 and 3 into DIR/figures")
    add("--mmlu", default="cais/mmlu", help="MMLU: hub name or folder of CSVs (dev/, test/, val/); args.json's")
    add("--split", default="test", choices=("test", "validation"), help="questions to ask; the shots are always dev's")
    add("--subjects", nargs="+", default=None, metavar="SUBJECT", help="score these subjects only; None: all")
    add("--format", default="letter", choices=("letter", "cloze"), help="what is compared: letters, or options' text")
    add("--out", default=None, help="directory for the scores, with one --ckpt; None: the checkpoint's own")
    add("--tokens", type=int, default=None, help="tokens in flight, shots counted; None: 32768 on a GPU, else 2048")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="auto: bf16 on a GPU, else float32")
    add("--device", default="auto", help="auto, cuda or cpu")
    add("--tiny", action="store_true", help="score the miniature's base and filtered control, on its own MMLU")

    argv = sys.argv[1:] if argv is None else argv
    if "--tiny" in argv:
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    if "--mmlu" not in argv and len({read_mmlu(c) for c in args.ckpt}) == 1:
        args.mmlu = read_mmlu(args.ckpt[0]) or args.mmlu  # what the checkpoint's own run was scored on
    if bool(args.ckpt) == bool(args.table):
        parser.error("give --ckpt to score, or --table to print the table")
    if args.figures and not args.table:
        parser.error("--figures goes with --table DIR")
    if args.out and len(args.ckpt) != 1:
        parser.error("--out goes with one --ckpt")
    if args.tokens is not None and args.tokens < 1:
        parser.error("--tokens starts at 1")
    return args


def read_mmlu(ckpt):
    """The --mmlu that a checkpoint directory's args.json names, or None."""
    path = Path(ckpt) / "args.json"
    return json.loads(path.read_text()).get("mmlu") if path.exists() else None


def read_json(path):
    return json.loads(path.read_text()) if path.exists() else None


def title(facts):
    """The paper's name of the run that an args.json describes; None for a base model."""
    script, a = facts["script"], facts["arguments"]
    if script == "adv_probes.py":
        frozen = ", frozen" if a["freeze"] else ""
        return "AdvProbes-SWD" if a["swd"] else f"AdvProbes, {a['probe_steps']} steps, {a['match'].upper()}{frozen}"
    if script.endswith("train.py"):
        return CONTROL if a["filtered"] else None
    command = f"{script} --method {a['method']}" if script == "baselines.py" else script
    return {c: name for name, c in TABLE_1.items()}.get(command, script.removesuffix(".py"))


def settings(facts):
    """What two runs must share to be one row: every argument but those that say where things are."""
    return repr(sorted((k, str(v)) for k, v in facts["arguments"].items() if k not in PLACES))


def rows_under(root, stem):
    """{name: [run ..]} of everything scored under root; runs of one method and settings, attacked alike, are one row.

    stem  file stem of the format's scores
    A run is {"folder", "attack": a folder or None, "base", "theta", "recovered": summaries, the last may be None}.
    """
    facts = {path.parent.resolve(): read_json(path) for path in sorted(Path(root).rglob("args.json"))}
    attacks, groups = {}, {}  # an attack stands in its victim's row, wherever it was written
    for folder in [f for f in facts if facts[f]["script"] == "recover.py"]:
        attacks.setdefault(Path(facts[folder]["parent"]).resolve(), []).append(folder)
        facts |= {victim: read_json(victim / "args.json") for victim in attacks if (victim / "args.json").exists()}
    for folder, mine in sorted(facts.items()):
        if mine["script"] == "recover.py" or title(mine) is None:
            continue
        for attack in [a for a in attacks.get(folder, ()) if (a / f"{stem}.json").exists()] or [None]:
            by = facts[attack] if attack else {"arguments": {}}
            base = mine.get("base") or by.get("base", "")
            base = Path(base) if Path(base).is_dir() else Path(root) / base.replace("/", "--")
            run = {"folder": folder, "attack": attack, "base": read_json(base / f"{stem}.json")}
            run |= {"theta": read_json(folder / f"{stem}.json")}
            run |= {"recovered": read_json(attack / f"{stem}.json") if attack else None}
            if run["base"] and run["theta"]:
                key = (title(mine), settings(mine), attack and attack.name, settings(by))
                groups.setdefault(key, []).append(run)
    places, titles, rows = [*TABLE_1, *TABLE_2], [key[0] for key in groups], {}
    for key in sorted(groups, key=lambda key: places.index(key[0]) if key[0] in places else len(places)):
        name, attack = key[0], key[2]
        if titles.count(name) > 1:  # the same method in two settings, or under two attacks
            name += f" ({groups[key][0]['folder'].name}{f', {attack}' if attack else ''})"
        rows[name] = groups[key]
    return rows


def average(rows):
    """Mean and standard error over runs of paper_scores' rows; of a single run, its own errors of the questions."""
    if len(rows) == 1:
        return rows[0]
    mean = {k: statistics.mean(row[k] for row in rows) for k in rows[0] if not k.endswith("_se")}
    return mean | {f"{k}_se": statistics.stdev(row[k] for row in rows) / math.sqrt(len(rows)) for k in mean}


if __name__ == "__main__":
    args = parse_args()  # before torch is imported: --help and a mistyped flag answer at once

from common import (
    fail, load_mmlu, load_model, paper_scores, score_mmlu, scores_dir, scores_name, show_scores, write_scores,
)  # fmt: skip


def scored(run):
    """paper_scores of a run of rows_under; of one that was not attacked, θ stands in for θ' (its cells show a dash)."""
    return paper_scores(run["base"], run["theta"], run["recovered"] or run["theta"])


def markdown(rows, bases):
    """Table 1's columns as Markdown, percent ± standard error, the untouched bases first."""
    heads = ("", "Forget ↓", "Retain ↑", "Score_U ↑", "Forget, recovered ↓", "Retain, recovered", "Score_R ↑")
    heads += ("Composite ↑", "runs")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, runs in [("base", bases), *rows.items()]:
        row = average([scored(run) for run in runs])
        keys = [k for k in row if not k.endswith("_se")]
        shown = keys if runs[0]["recovered"] else keys[:2] if name == "base" else keys[:3]
        cells = [f"{row[k]:.1f} ± {row[k + '_se']:.1f}" if k in shown else "–" for k in keys]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {len(runs)} |")
    return "\n".join(lines)


def tables(rows):
    """Tables 1 and 2 as Markdown, and the commands of the paper's rows that are not there."""
    bases = {repr(run["base"]): run["base"] for runs in rows.values() for run in runs}
    bases = [{"base": base, "theta": base, "recovered": None} for base in bases.values()]
    best, text = "AdvProbes, 5 steps, IDK, frozen", []
    first = {name: runs for name, runs in rows.items() if name not in TABLE_2 or name == best}
    second = {name: rows[name] for name in TABLE_2 if name in rows}
    for number, commands, part in ((1, TABLE_1, first), (2, TABLE_2, second)):
        if not part or part.keys() == {best} != first.keys():
            continue
        text.append(f"Table {number}\n\n{markdown(part, bases)}")
        missing = [command for name, command in commands.items() if not any(row.startswith(name) for row in rows)]
        text += ["Rows of the paper that are not there yet: " + ", ".join(missing)] if missing else []
    text.append("± is the standard error over the runs of a row; of a single run, that of its questions.")
    return "\n\n".join(text)


def curves(runs, phase, key):
    """[(step, mean, standard error)] of a value that the attacks on these runs logged."""
    values = {}
    for run in runs:
        for line in (run["attack"] / "metrics.jsonl").read_text().splitlines():
            entry = json.loads(line)
            if entry["phase"] == phase:
                values.setdefault(entry["step"], []).append(entry[key])
    spread = {step: statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else 0.0 for step, v in values.items()}
    return [(step, statistics.mean(v), spread[step]) for step, v in sorted(values.items())]


def save_figure(figure, folder, name):
    """PNG and SVG, the same bytes from the same rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, facts in (("png", {"Software": None}), ("svg", {"Date": None})):
        figure.savefig(folder / f"{name}.{kind}", dpi=300, bbox_inches="tight", metadata=facts)
        print(f"wrote {folder / name}.{kind}")


def figures(root, rows, form):
    """Figures 2 and 3 of the attacked rows of Table 1, in greys, for a column and for the width of a page."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        fail("--figures needs matplotlib, which is not here; pip install -r tests/requirements.txt")
    rows = {name: runs for name, runs in rows.items() if runs[0]["attack"]}
    rows = {name: runs for name, runs in rows.items() if name in TABLE_1 or name not in TABLE_2} or rows
    if not rows:
        fail(f"--figures: no attacked run under {root}; run recover.py --ckpt on its checkpoints first")
    matplotlib.rcParams.update({"font.size": 7, "svg.hashsalt": "rmat", "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False, "axes.linewidth": 0.6, "hatch.linewidth": 0.5})
    names = [name.replace(", 5 steps, IDK, frozen", "") for name in rows]

    figure = Figure(figsize=(3.3, 0.5 + 0.3 * len(rows)))
    axes = figure.add_subplot()
    for place, (key, label, style) in enumerate((
        ("forget", "unlearned", {"facecolor": "white", "hatch": "////"}),
        ("forget_recovered", "after recovery", {"facecolor": "0.35"}),
    )):  # fmt: skip
        values = [average([scored(run) for run in runs]) for runs in rows.values()]
        axes.barh(
            [i + 0.38 * place for i in range(len(rows))], [v[key] for v in values], 0.38, label=label, lw=0.6,
            edgecolor="black", xerr=[v[f"{key}_se"] for v in values], error_kw={"lw": 0.8, "capsize": 1.5}, **style,
        )  # fmt: skip
    axes.axvline(25, color="black", lw=0.8, ls="--", label="chance")
    axes.set(xlim=(0, 104), xlabel=f"forget accuracy, % ({form})")
    axes.set_yticks([i + 0.19 for i in range(len(rows))], names)
    axes.invert_yaxis()
    legend = {"frameon": False, "handlelength": 3.5}
    figure.legend(*axes.get_legend_handles_labels(), loc="lower center", bbox_to_anchor=(0.5, 0.9), ncols=3, **legend)
    save_figure(figure, Path(root) / "figures", "figure2")

    figure = Figure(figsize=(6.9, 2.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, runs in enumerate(rows.values()):
        look = {"color": f"{0.6 * (i % 3) / 2:.2f}", "ls": ("-", "--", ":", "-.")[i % 4], "lw": 0.9, "label": names[i]}
        look |= {"marker": "os^Dv<>pX*"[i % 10], "ms": 3.2, "mfc": "white" if i % 2 else None}
        steps, means, _ = zip(*curves(runs, "step", "loss"))
        left.plot(steps, means, markevery=(i % 4, 4), **look)
        runs = [run for run in runs if read_json(run["attack"] / "args.json")["arguments"]["format"] == form]
        if points := curves(runs, "accuracy", "forget"):
            steps, means, errors = zip(*((step, 100 * mean, 100 * se) for step, mean, se in points))
            right.errorbar(steps, means, errors, capsize=1.5, elinewidth=0.6, **look)
    right.axhline(25, color="black", lw=0.8, ls=(0, (1, 3)))
    left.set(xlabel="attack step", ylabel="attack loss, nats a token")
    right.set(xlabel="attack step", ylabel=f"forget accuracy, % ({form})", ylim=(0, 104))
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", **legend)
    save_figure(figure, Path(root) / "figures", "figure3")


def main(args):
    if args.table:
        rows = rows_under(args.table, scores_name(args.format))
        if not rows:
            fail(f"--table {args.table}: no run scored by {args.format} there; run recover.py, or try another --format")
        print(tables(rows))
        if args.figures:
            figures(args.table, rows, args.format)
        return
    mmlu = load_mmlu(args.mmlu, args.split, args.subjects)
    for name in args.ckpt:
        model, tokenizer = load_model(name, args.dtype, args.device, flag="--ckpt")
        start = time.time()
        summary, answers = score_mmlu(model, tokenizer, mmlu, args.format, args.tokens)
        seconds = time.time() - start
        write_scores(args.out or scores_dir(name), summary, answers)
        print(
            f"{name} | {args.format} | {show_scores(summary)} | {len(answers) / seconds:.0f} questions/s",
            flush=True,
        )


if __name__ == "__main__":
    main(args)
