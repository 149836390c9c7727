"""Tables 1 and 2 of the miniature: every method and Recovery on several worlds, tuned by one rule.

    1  tune     on world 0, each method at the learning rates of one grid (RATES), the rest as --tiny has it;
                taken is the largest rate that costs at most 5 points of retain accuracy before any attack (by
                text), or, if none does, the one that costs least. The attack is not looked at. The variants
                of Table 2 take the rate of adv_probes, from which each differs in its flags only; SWD, a loss
                of its own, is tuned
    2  unlearn  every method on every world at its rate; its checkpoint is scored by evaluate_mmlu.py, by text
    3  attack   recover.py on each result, and on the control that was never taught the forget facts, at two
                rates
    4  letters  the same checkpoints scored in the other format too
    5  gates    is the phenomenon real in this world? (README.md beside this file says what each gate asks)

Every figure comes from the repository's own scripts, run as a user runs them. What is finished is not run
again, so the command can be stopped and started at any time. Worlds other than 0, which is shipped, are
trained first (tests/tiny/train.py: ten minutes per model, two models per world).

    python tests/tiny/tables.py --worlds 0 1 2 --jobs 2     # about two hours on two cores
    python evaluate_mmlu.py --table out/tables --format cloze           # the tables again
    python evaluate_mmlu.py --table out/tables-3e-3 --format cloze      # the tables under the other attack
    python tests/figures.py out/tables --format cloze                   # the figures
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RATES = ("1e-3", "3e-3", "1e-2")  # the grid of every tuned method
ATTACKS = ("1e-3", "3e-3")  # of Recovery: --tiny's, whose table is the table, and a harder one
NAIVE = ("random_mapping", "min_posterior", "max_entropy", "high_low_lr")  # gates 3 and 4 are about these
TUNED = {  # tuned methods: script and flags
    "min_posterior": ("baselines.py", "--method", "min_posterior"),
    "max_entropy": ("baselines.py", "--method", "max_entropy"),
    "high_low_lr": ("baselines.py", "--method", "high_low_lr"),
    "random_mapping": ("random_mapping.py",),
    "mlac_ar": ("mlac_ar.py",),
    "rmat": ("rmat.py",),
    "adv_probes": ("adv_probes.py",),
    "adv_probes_swd": ("adv_probes.py", "--swd"),
}
VARIANTS = {  # the other rows of Table 2, at the rate of adv_probes
    "adv_probes_3_idk": ("adv_probes.py", "--probe-steps", 3, "--no-freeze"),
    "adv_probes_5_idk": ("adv_probes.py", "--no-freeze"),
    "adv_probes_3_rand": ("adv_probes.py", "--probe-steps", 3, "--no-freeze", "--match", "rand"),
    "adv_probes_5_rand": ("adv_probes.py", "--no-freeze", "--match", "rand"),
}


# fmt: off
def parse_args(argv=None):
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=form)
    add, rows = parser.add_argument, [*TUNED, *VARIANTS]
    add("--worlds", type=int, nargs="+", default=[0, 1, 2], help="seeds; 0 is shipped, others are trained")
    add("--methods", nargs="+", default=rows, choices=rows, help="rows to measure")
    add("--jobs", type=int, default=1, help="scripts at a time, one thread each")
    add("--out", default="out/tables", help="of the runs; also OUT-grid (tuning), OUT-3e-3 (harder attack)")
    add("--report", action="store_true", help="print what is there, run nothing")
    return parser.parse_args(argv)
# fmt: on


def run(*command):
    """One script in a process of its own, one thread; what it printed is shown only if it fails."""
    command = [str(c) for c in command]
    print("+", *command, flush=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )


def scores(folder, form="cloze"):
    """The summary that scoring left in a checkpoint directory, or None."""
    path = Path(folder) / ("mmlu.json" if form == "letter" else f"mmlu_{form}.json")
    return json.loads(path.read_text()) if path.exists() else None


def copy(source, target):
    """A directory without its attacks, whole or not at all."""
    draft = target.with_suffix(".draft")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(source, draft, ignore=shutil.ignore_patterns("recovered*"))
    draft.rename(target)


class Tables:
    """The steps of the docstring over one output folder."""

    def __init__(self, args):
        self.out, self.methods, self.worlds = Path(args.out).absolute(), list(args.methods), args.worlds
        for child, parent in (("rmat", "random_mapping"), *((v, "adv_probes") for v in VARIANTS)):
            if child in self.methods and parent not in self.methods:
                self.methods.insert(0, parent)
        self.grid = self.out.with_name(self.out.name + "-grid")
        self.pool = ThreadPoolExecutor(args.jobs)

    def each(self, work, *columns):
        """work(*row) for every row, --jobs at a time; a failure ends the program."""
        list(self.pool.map(work, *zip(*columns))) if columns else None

    def score(self, folders, world, form):
        """Scores those checkpoints that have no scores of this format yet, on the world's MMLU."""
        if todo := [folder for folder in folders if not scores(folder, form)]:
            run("evaluate_mmlu.py", "--format", form, "--mmlu", world / "mmlu", "--ckpt", *todo)

    def world(self, seed, kind):
        """The files and one model ("base", "filtered") of a world, in both formats; trained if missing."""
        folder = self.out / f"world{seed}"
        if not (folder / kind / "args.json").exists():
            run(
                HERE / "train.py",
                "--seed",
                seed,
                "--out",
                folder,
                *(["--filtered"] if kind == "filtered" else []),
            )
        for form in ("cloze", "letter"):
            self.score([folder / kind], folder, form)

    def unlearn(self, method, seed, rate, out):
        """One method on one world, scored by text. RMAT starts from that world's Random Mapping, as rmat.py
        would (a test checks)."""
        world = self.out / f"world{seed}"
        start, more = world / "base", ()
        if method == "rmat":
            start, more = world / "random_mapping", ("--rm-steps", 0)
        if not (out / "args.json").exists():
            shutil.rmtree(out, ignore_errors=True)
            script, *flags = (TUNED | VARIANTS)[method]
            data = ("--model", start, "--data", world / "chunks.jsonl")
            run(script, "--tiny", *flags, *more, "--lr", rate, *data, "--out", out)
        self.score([out], world, "cloze")

    def tune(self, method):
        """The method's rate by the rule, and its run on world 0 copied from the grid."""
        base = scores(self.out / "world0" / "base")["retain"]["acc"]
        cost = {r: base - scores(self.grid / f"{method}-{r}")["retain"]["acc"] for r in RATES}
        fit = [r for r in RATES if cost[r] <= 0.05 + 1e-9]
        rate = fit[-1] if fit else min(RATES, key=cost.get)
        if not (self.out / "world0" / method / "args.json").exists():
            copy(self.grid / f"{method}-{rate}", self.out / "world0" / method)
        return rate

    def attacked(self, seed, name, rate):
        """Where Recovery at a rate writes: into the checkpoint at --tiny's own, beside OUT at another."""
        if rate == ATTACKS[0]:
            return self.out / f"world{seed}" / name / "recovered"
        return self.out.with_name(f"{self.out.name}-{rate}") / f"world{seed}" / name

    def attack(self, seed, name, rate):
        """Recovery of one checkpoint at one rate; both are scored in letters too."""
        world, there = self.out / f"world{seed}", self.attacked(seed, name, rate)
        if not (there / "scores.json").exists():
            shutil.rmtree(there, ignore_errors=True)
            data = ("--base", world / "base", "--recovery", world / "camel.zip", "--mmlu", world / "mmlu")
            every = ("--eval-every", 20 if rate == ATTACKS[0] else 160)
            run("recover.py", "--tiny", "--ckpt", world / name, *data, "--lr", rate, *every, "--out", there)
        self.score([world / name, there] if rate == ATTACKS[0] else [there], world, "letter")

    def fill(self):
        """All cells, in an order that has each one's parents first."""
        tuned = [m for m in TUNED if m in self.methods]
        if not (self.out / "world0").exists():
            copy(HERE / "world0", self.out / "world0")
        self.each(self.world, *[(0, kind) for kind in ("base", "filtered")])
        first = [(m, 0, r, self.grid / f"{m}-{r}") for m in tuned if m != "rmat" for r in RATES]
        self.each(self.unlearn, *first)
        rates = {m: self.tune(m) for m in tuned if m != "rmat"}
        if "rmat" in tuned:
            self.each(self.unlearn, *[("rmat", 0, r, self.grid / f"rmat-{r}") for r in RATES])
            rates["rmat"] = self.tune("rmat")
        rates |= {m: rates["adv_probes"] for m in VARIANTS if m in self.methods}
        self.each(self.world, *[(s, kind) for s in self.worlds for kind in ("base", "filtered")])
        for last in (False, True):  # RMAT needs Random Mapping's result
            cells = [(m, s) for s in self.worlds for m in rates if (m == "rmat") == last]
            self.each(self.unlearn, *[(m, s, rates[m], self.out / f"world{s}" / m) for m, s in cells])
        self.each(
            self.attack,
            *[(s, name, a) for s in self.worlds for name in ("filtered", *rates) for a in ATTACKS],
        )

    def gates(self, form):
        """Prints the gates of one format; a gate's sentence ends in what it asks for."""
        acc = {}  # (name, when, side): percent, a number a world
        for name in ("base", "filtered", *self.methods):
            for when in ("before", *ATTACKS):
                for seed in self.worlds:
                    there = (
                        self.out / f"world{seed}" / name
                        if when == "before"
                        else self.attacked(seed, name, when)
                    )
                    for side in ("forget", "retain") if scores(there, form) else ():
                        acc.setdefault((name, when, side), []).append(100 * scores(there, form)[side]["acc"])
        acc = {key: values for key, values in acc.items() if len(values) == len(self.worlds)}
        mean = {key: statistics.mean(values) for key, values in acc.items()}
        low = [min(acc["base", "before", side]) for side in ("forget", "retain")]
        print(
            f"1 base: forget {low[0]:.1f}, retain {low[1]:.1f} in its worst world (>= 95 cloze, >= 90 letter)"
        )
        print(f"2 control: forget {mean['filtered', 'before', 'forget']:.1f} (chance, 25)")
        for m in [m for m in NAIVE if (m, ATTACKS[-1], "forget") in mean]:
            cost = mean["base", "before", "retain"] - mean[m, "before", "retain"]
            after = f"forget {mean[m, 'before', 'forget']:.1f} (chance, 25)"
            print(f"3 {m}: {after}, costs {cost:.1f} of retain (<= 5)")
            lost = [b - u for b, u in zip(acc["base", "before", "forget"], acc[m, "before", "forget"])]
            back = {
                a: [x - u for x, u in zip(acc[m, a, "forget"], acc[m, "before", "forget"])] for a in ATTACKS
            }
            if min(lost) > 5:
                best = max(statistics.mean(x / y for x, y in zip(back[a], lost)) for a in ATTACKS)
                print(f"4 {m}: {100 * best:.0f} % of what was lost comes back at the best rate (>= 50)")
        print(
            "4 control after the attacks: "
            + ", ".join(f"{mean['filtered', a, 'forget']:.1f}" for a in ATTACKS)
        )
        if ("rmat", ATTACKS[-1], "forget") in mean and ("random_mapping", ATTACKS[-1], "forget") in mean:
            worst = {
                m: [max(x) for x in zip(*(acc[m, a, "forget"] for a in ATTACKS))]
                for m in ("random_mapping", "rmat")
            }
            gaps = [a - b for a, b in zip(worst["random_mapping"], worst["rmat"])]
            se = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
            gap = f"{statistics.mean(gaps):.1f} ± {se:.1f}"
            print(f"5 Random Mapping minus RMAT at its worst attack: {gap} (> 2 errors)")


def main(args):
    tables = Tables(args)
    if not args.report:
        tables.fill()
    elif not (tables.out.with_name(f"{tables.out.name}-{ATTACKS[1]}")).exists():
        raise SystemExit(f"tables.py: {tables.out} is not finished; run without --report")
    print("\nTuning on world 0: retain / forget before the attack, percent, by text; taken rates are bold\n")
    print("| | " + " | ".join(RATES) + " |\n|---|" + "---|" * len(RATES))
    for method in [m for m in TUNED if m in tables.methods]:
        found = {rate: scores(tables.grid / f"{method}-{rate}") for rate in RATES}
        cells = [f"{100 * s['retain']['acc']:.1f} / {100 * s['forget']['acc']:.1f}" for s in found.values()]
        taken = RATES.index(tables.tune(method))
        cells[taken] = f"**{cells[taken]}**"
        print(f"| {method} | " + " | ".join(cells) + " |")
    for form in ("cloze", "letter"):
        print(f"\nGates, {form}\n")
        tables.gates(form)
        print(f"\n{form}\n", flush=True)
        command = [sys.executable, "evaluate_mmlu.py", "--format", form, "--table"]
        subprocess.run([*command, tables.out], cwd=ROOT, check=True)
    print(f"\ncloze, attacked at {ATTACKS[1]}\n", flush=True)
    subprocess.run([*command[:3], "cloze", "--table", f"{tables.out}-{ATTACKS[1]}"], cwd=ROOT, check=True)


if __name__ == "__main__":
    main(parse_args())
