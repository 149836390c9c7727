"""Tables 1 and 2 of the miniature: every method and Recovery on several worlds, tuned by one rule.

    1  tune     on world 0, each method at the six settings of one grid, learning rate by steps, the rest as
                --tiny has it. Taken is the gentlest (the smallest product of the two) that brings forget
                accuracy, by text, down to the control's within two standard errors of the difference, at a
                cost of at most 5 points of retain accuracy; if none does, the nearest. RMAT starts there,
                from Random Mapping as tuned, and is to make that last: the strongest setting at that cost is
                taken. The attack on each is printed, but not looked at. Table 2's variants take the setting
                of adv_probes, from which they differ in flags only; SWD, a loss of its own, is tuned
    2  unlearn  every method on every world in its setting; its checkpoint is scored by evaluate_mmlu.py
    3  attack   recover.py on each result, on the base, and on the control that was never taught the forget
                facts; on the methods of HARDER and the control also a longer and a harder attack
    4  letters  the same checkpoints scored in the other format too
    5  gates    is the phenomenon real in this world? (README.md beside this file says what each gate asks)
    6  sweep    with --sweep, every attacker of recover.py on Table 1's rows, the base and the control

Every number is the repository's own scripts', run as a user runs them. The command can be stopped and started
at any time. Worlds other than 0, which is shipped, are trained first.

    python tests/tiny/tables.py --worlds 0 1 2 --jobs 2                 # about two hours on two cores
    python evaluate_mmlu.py --table out/tables --format cloze           # the tables again
    python evaluate_mmlu.py --table out/tables-640 --format cloze       # the tables under another attack
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
from itertools import product
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RATES = (1e-3, 3e-3, 1e-2)
GRID = {"--steps": (100, 300), "--N": (20, 60)}  # by a method's flag: each of these at each rate
ATTACKS = {"": (1e-3, 160), "640": (1e-3, 640), "3e-3": (3e-3, 160)}  # rate, steps; "": --tiny's, the tables'
NAIVE = ("random_mapping", "min_posterior", "max_entropy", "high_low_lr")  # gates 3 and 4 are about these
HARDER = (*NAIVE, "mlac_ar", "rmat")  # attacked in all ways
BASELINES = ("min_posterior", "max_entropy", "high_low_lr", "grad_diff", "npo", "simnpo", "rmu")
TUNED = {method: f"baselines.py --method {method}" for method in BASELINES}
TUNED |= {method: f"{method}.py" for method in ("random_mapping", "mlac_ar", "rmat", "adv_probes")}
TUNED |= {"adv_probes_swd": "adv_probes.py --swd"}
FIXED = {"overwriting": ("baselines.py --method overwriting", (1e-2, 1000))}  # README.md: how it was found
VARIANTS = {  # the other rows of Table 2
    "adv_probes_3_rand": "adv_probes.py --probe-steps 3 --match rand --no-freeze",
    "adv_probes_3_rand_frz": "adv_probes.py --probe-steps 3 --match rand",
    "adv_probes_3_idk": "adv_probes.py --probe-steps 3 --no-freeze",
    "adv_probes_3_idk_frz": "adv_probes.py --probe-steps 3",
}


def flag(method):
    """The flag that says how many steps a method takes; of RMAT, its second phase."""
    return "--N" if method in ("mlac_ar", "rmat") else "--steps"


def grid(method):
    """The settings (rate, steps) of a method, gentlest first."""
    return sorted(product(RATES, GRID[flag(method)]), key=strength)


def strength(setting):
    """What gentle means: the way that Adam can go, rate by steps; of two equal ones, at the smaller rate."""
    return round(math.prod(setting), 9), setting


def choose(found, base, control, second=False):
    """The setting that the rule of the docstring takes.

    found          {(rate, steps): a summary of scoring}
    base, control  summaries of the base model and of the never-taught one
    second         of RMAT's second phase
    """
    cost = {s: base["retain"]["acc"] - x["retain"]["acc"] for s, x in found.items()}
    fit = sorted((s for s in found if cost[s] <= 0.05 + 1e-9), key=strength)
    if not fit:
        return min(found, key=cost.get)
    if second:
        return fit[-1]
    above = {s: found[s]["forget"]["acc"] - control["forget"]["acc"] for s in fit}
    error = {s: math.hypot(found[s]["forget"]["se"], control["forget"]["se"]) for s in fit}
    return next((s for s in fit if above[s] <= 2 * error[s]), min(fit, key=above.get))


def parse_args(argv=None):
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=form)
    add, rows = parser.add_argument, [*TUNED, *VARIANTS, *FIXED]
    add("--worlds", type=int, nargs="+", default=[0, 1, 2], help="seeds; 0 is shipped, others are trained")
    add("--methods", nargs="+", default=rows, choices=rows, help="rows to measure")
    add("--jobs", type=int, default=1, help="scripts at a time, one thread each")
    add("--out", default="out/tables", help="of the runs; also OUT-grid (tuning), OUT-640, OUT-3e-3")
    add("--sweep", action="store_true", help="also measure the worst case over many attackers")
    add("--report", action="store_true", help="print what is there, run nothing")
    return parser.parse_args(argv)


def run(*command):
    """One script in a process of its own, one thread; what it printed is shown only if it fails."""
    command = [str(c) for c in command]
    print("+", *command, flush=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def scores(folder, form="cloze"):
    """The summary that scoring left in a checkpoint directory, or None."""
    path = Path(folder) / ("mmlu.json" if form == "letter" else f"mmlu_{form}.json")
    return json.loads(path.read_text()) if path.exists() else None


def finished(folder):
    return (folder / "args.json").exists()


class Tables:
    """The steps of the docstring over one output folder."""

    def __init__(self, args):
        self.out, self.methods, self.worlds = Path(args.out).absolute(), [*args.methods], args.worlds
        for child, parent in (("rmat", "random_mapping"), *((v, "adv_probes") for v in VARIANTS)):
            if child in self.methods and parent not in self.methods:
                self.methods.insert(0, parent)
        self.grid, self.sweeps = self.out.with_name(self.out.name + "-grid"), args.sweep
        self.pool = ThreadPoolExecutor(args.jobs)

    def each(self, work, rows):
        """work(*row) for every row, --jobs at a time; a failure ends the program."""
        list(self.pool.map(lambda row: work(*row), rows))

    def score(self, folders, world, form):
        """Scores those checkpoints that have no scores of this format yet, on the world's MMLU."""
        if todo := [folder for folder in folders if not scores(folder, form)]:
            run("evaluate_mmlu.py", "--format", form, "--mmlu", world / "mmlu", "--ckpt", *todo)

    def world(self, seed, kind):
        """The files and one model ("base", "filtered") of a world, in both formats; trained if missing."""
        folder = self.out / f"world{seed}"
        if not finished(folder / kind):
            more = ["--filtered"] if kind == "filtered" else []
            run(HERE / "train.py", "--seed", seed, "--out", folder, *more)
        for form in ("cloze", "letter"):
            self.score([folder / kind], folder, form)

    def unlearn(self, method, seed, setting, out):
        """One method on one world, scored by text. RMAT starts from that world's Random Mapping, as rmat.py
        would (a test checks)."""
        world, (rate, steps) = self.out / f"world{seed}", setting
        start, more = world / "base", ()
        if method == "rmat":
            start, more = world / "random_mapping", ("--rm-steps", 0)
        if not finished(out):
            command = FIXED[method][0] if method in FIXED else (TUNED | VARIANTS)[method]
            data = ("--model", start, "--data", world / "chunks.jsonl", "--lr", rate, flag(method), steps)
            run(*command.split(), "--tiny", *more, *data, "--out", out)
        known = json.loads((out / "args.json").read_text())["arguments"]
        if (known["lr"], known[flag(method).strip("-")]) != setting:
            raise SystemExit(f"tables.py: {out} is of another setting; delete it and what started from it")
        self.score([out], world, "cloze")

    def cell(self, method, setting):
        """Folder of a setting's run on world 0."""
        return self.grid / "{}-{}-{}".format(method, *setting)

    def tune(self, method):
        """The method's setting by the rule."""
        found = {s: scores(self.cell(method, s)) for s in grid(method)}
        known = [scores(self.out / "world0" / kind) for kind in ("base", "filtered")]
        return choose(found, *known, second=method == "rmat")

    def attacked(self, seed, name, attack):
        """Where Recovery writes: into the checkpoint if the attack is --tiny's, else beside OUT."""
        if not attack:
            return self.out / f"world{seed}" / name / "recovered"
        return self.out.with_name(f"{self.out.name}-{attack}") / f"world{seed}" / name

    def recover(self, victim, seed, attack, there):
        """Recovery of one checkpoint, scored by text."""
        if not finished(there):
            world, (rate, steps) = self.out / f"world{seed}", ATTACKS[attack]
            data = ("--base", world / "base", "--recovery", world / "camel.zip", "--mmlu", world / "mmlu")
            pace = ("--lr", rate, "--steps", steps, "--eval-every", steps if attack else 40)
            run("recover.py", "--tiny", "--ckpt", victim, *data, *pace, "--out", there)

    def attack(self, seed, name, attack):
        """Recovery of one row on one world; both checkpoints are scored in letters too."""
        world, there = self.out / f"world{seed}", self.attacked(seed, name, attack)
        self.recover(world / name, seed, attack, there)
        self.score([there] if attack else [world / name, there], world, "letter")

    def sweep(self, seed, name):
        """Every attacker on one checkpoint; those that are finished are not run again."""
        run("recover.py", "--ckpt", self.out / f"world{seed}" / name, "--sweep")

    def fill(self):
        """All cells, in an order that has each one's parents first."""
        tuned, settings = [m for m in TUNED if m in self.methods], {}
        shutil.copytree(HERE / "world0", self.out / "world0", dirs_exist_ok=True)
        self.each(self.world, product([0], ("base", "filtered")))
        for last in (False, True):  # RMAT needs Random Mapping's result
            now = [m for m in tuned if (m == "rmat") == last]
            self.each(self.unlearn, [(m, 0, s, self.cell(m, s)) for m in now for s in grid(m)])
            settings |= {m: self.tune(m) for m in now}
            self.each(self.unlearn, [(m, 0, settings[m], self.out / "world0" / m) for m in now])
        cells = [self.cell(m, s) for m in tuned for s in grid(m)]
        self.each(self.recover, [(cell, 0, "", cell / "recovered") for cell in cells])
        settings |= {m: settings["adv_probes"] for m in VARIANTS if m in self.methods}
        settings |= {m: FIXED[m][1] for m in FIXED if m in self.methods}
        self.each(self.world, product(self.worlds, ("base", "filtered")))
        for last in (False, True):
            rows = [(m, s) for s in self.worlds for m in settings if (m == "rmat") == last]
            self.each(self.unlearn, [(m, s, settings[m], self.out / f"world{s}" / m) for m, s in rows])
        rows = {a: ("filtered", *(m for m in HARDER if m in settings)) for a in ATTACKS}
        rows[""] = ("base", "filtered", *settings)
        self.each(self.attack, [(s, name, a) for a in ATTACKS for name in rows[a] for s in self.worlds])
        swept = ("base", "filtered", *(m for m in settings if m not in VARIANTS and m != "adv_probes_swd"))
        self.each(self.sweep, product(self.worlds, swept) if self.sweeps else ())

    def gates(self, form):
        """Prints the gates of one format; a gate's sentence ends in what it asks for."""

        def acc(name, attack=None, side="forget"):
            """Percent, a number per world, of a row under an attack (None: before any)."""
            folders = [self.out / f"world{seed}" / name for seed in self.worlds]
            if attack is not None:
                folders = [self.attacked(seed, name, attack) for seed in self.worlds]
            return [100 * scores(folder, form)[side]["acc"] for folder in folders]

        def mean(*row):
            return statistics.mean(acc(*row))

        low = [min(acc("base", None, side)) for side in ("forget", "retain")]
        print("1 base: forget {:.1f}, retain {:.1f} in its worst world (>= 95; letters 90)".format(*low))
        print(f"2 control: forget {mean('filtered'):.1f} (chance, 25)")
        for m in [m for m in NAIVE if m in self.methods]:
            cost, lost = mean("base", None, "retain") - mean(m, None, "retain"), mean("base") - mean(m)
            print(f"3 {m}: forget {mean(m):.1f} (chance, 25), costs {cost:.1f} of retain (<= 5)")
            if lost > 5:
                shown = ", ".join(f"{100 * (mean(m, a) - mean(m)) / lost:.0f}" for a in ATTACKS)
                print(f"4 {m}: {shown} % of what was lost comes back under the attacks (best >= 50)")
        shown = ", ".join(f"{mean('filtered', a):.1f}" for a in ATTACKS)
        print(f"4 control after the attacks: {shown} (chance, 25)")
        for other, m in (("random_mapping", "rmat"), ("rmat", "filtered")) if "rmat" in self.methods else ():
            for a in ATTACKS:
                gaps = [x - y for x, y in zip(acc(other, a), acc(m, a))]
                se = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
                asked = "> 2 errors" if m == "rmat" else "< 2 errors: as if never taught"
                gap = f"{statistics.mean(gaps):.1f} ± {se:.1f}"
                print(f"5 {other} minus {m} after attack {a or 'of the tables'}: {gap} ({asked})")


def percent(summary, *sides):
    return " / ".join(f"{100 * summary[side]['acc']:.1f}" for side in sides)


def main(args):
    tables = Tables(args)
    if not args.report:
        tables.fill()
    print("\nTuning on world 0, percent by text: retain / forget -> forget after the attack; taken is bold\n")
    columns = [f"{rate:g}, {'short' if n == 100 else 'long'}" for rate, n in grid("random_mapping")]
    print("| | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for method in [m for m in TUNED if m in tables.methods]:
        taken, row = tables.tune(method), []
        for setting in grid(method):
            before, after = (scores(tables.cell(method, setting) / x) for x in ("", "recovered"))
            text = f"{percent(before, 'retain', 'forget')} -> {percent(after, 'forget')}"
            row.append(f"**{text}**" if setting == taken else text)
        print(f"| {method} | " + " | ".join(row) + " |")
    for form in ("cloze", "letter"):
        print(f"\nGates, {form}\n")
        tables.gates(form)
    for attack, form in (("", "cloze"), ("", "letter"), *((a, "cloze") for a in ATTACKS if a)):
        folder = f"{tables.out}-{attack}" if attack else tables.out
        print(f"\n{folder}, {form}\n", flush=True)
        command = [sys.executable, "evaluate_mmlu.py", "--format", form, "--table", folder]
        subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    main(parse_args())
