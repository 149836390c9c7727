"""Tables 1 and 2 of the miniature: every method and Recovery on several worlds.

    1  unlearn  every method on every world, with --tiny's settings, which the version of this file in commit
                d4b0f7e chose (README.md beside it)
    2  attack   recover.py on each result, on the base, and on the control that was never taught the forget
                facts; on the methods of HARDER and the control also a longer and a harder attack
    3  letters  the same checkpoints scored in the other format too
    4  gates    is the phenomenon real in this world? (README.md says what each gate asks)
    5  sweep    with --sweep, every attacker of recover.py on Table 1's rows, the base and the control

Every number is the repository's own scripts', run as a user runs them. The command can be stopped and started
at any time. Worlds other than 0, which is shipped, are trained first.

    python tests/tiny/tables.py --worlds 0 1 2 --jobs 2    # about two hours on two cores; --report: again
"""

import argparse
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
sys.path.insert(0, str(ROOT))

from common import read_json
from evaluate_mmlu import FILES

ATTACKS = {"": (1e-3, 160), "640": (1e-3, 640), "3e-3": (3e-3, 160)}  # rate, steps; "": --tiny's, the tables'
NAIVE = ("random_mapping", "min_posterior", "max_entropy", "high_low_lr")  # gates 3 and 4 are about these
HARDER = (*NAIVE, "mlac_ar", "rmat")  # attacked in all ways
BASELINES = (*NAIVE[1:], "grad_diff", "npo", "simnpo", "rmu", "overwriting")
FIRST = {method: f"{method}.py" for method in ("random_mapping", "mlac_ar", "rmat", "adv_probes")}
FIRST |= {method: f"baselines.py --method {method}" for method in BASELINES}
SECOND = {  # the other rows of Table 2
    "adv_probes_swd": "adv_probes.py --swd",
    "adv_probes_3_rand": "adv_probes.py --probe-steps 3 --match rand --no-freeze",
    "adv_probes_3_rand_frz": "adv_probes.py --probe-steps 3 --match rand",
    "adv_probes_3_idk": "adv_probes.py --probe-steps 3 --no-freeze",
    "adv_probes_3_idk_frz": "adv_probes.py --probe-steps 3",
}


def run(*command, out=None):
    """One script in a process of its own, unless the checkpoint `out` is finished; what it printed is shown
    only if it fails."""
    if out and (out / "args.json").exists():
        return
    command = [str(c) for c in command]
    print("+", *command, flush=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def score(folder, form):
    """Scores a checkpoint on its world's MMLU, if it has no scores of this format yet."""
    if not (folder / FILES[form]).exists():
        run("evaluate_mmlu.py", "--format", form, "--ckpt", folder)


def make(world, kind):
    """The files and one model ("base", "filtered") of a world, in both formats."""
    more = ["--filtered"] if kind == "filtered" else []
    seed = world.name.removeprefix("world")
    run(HERE / "train.py", "--seed", seed, "--out", world, *more, out=world / kind)
    for form in FILES:
        score(world / kind, form)


def unlearn(world, method):
    out = world / method
    data = ("--model", world / "base", "--data", world / "chunks.jsonl", "--out", out)
    run(*(FIRST | SECOND)[method].split(), "--tiny", *data, out=out)


def attacked(world, name, attack):
    """Where Recovery writes: into the checkpoint if the attack is --tiny's, else beside OUT."""
    beside = world.parent.with_name(f"{world.parent.name}-{attack}")
    return beside / world.name / name if attack else world / name / "recovered"


def recover(world, name, attack):
    """Recovery, which scores both checkpoints by text; they are scored by letters too."""
    (rate, steps), out = ATTACKS[attack], attacked(world, name, attack)
    pace = ("--lr", rate, "--steps", steps, "--eval-every", steps if attack else 40)
    run("recover.py", "--ckpt", world / name, *pace, "--out", out, out=out)
    for folder in (out,) if attack else (world / name, out):
        score(folder, "letter")


def sweep(world, name):
    """Every attacker on one checkpoint; those that are finished are not run again."""
    run("recover.py", "--ckpt", world / name, "--sweep")


def fill(args, worlds):
    """All cells, in an order that has each one's parents first."""
    pool = ThreadPoolExecutor(args.jobs)

    def each(work, rows):
        list(pool.map(lambda row: work(*row), rows))  # a failure ends the program

    shutil.copytree(HERE / "world0", worlds[0].parent / "world0", dirs_exist_ok=True)
    each(make, product(worlds, ("base", "filtered")))
    each(unlearn, product(worlds, args.methods))
    rows = {a: ("filtered", *(m for m in HARDER if m in args.methods)) for a in ATTACKS}
    rows[""] = ("base", "filtered", *args.methods)
    each(recover, [(world, name, a) for a in ATTACKS for name in rows[a] for world in worlds])
    swept = ("base", "filtered", *(m for m in args.methods if m in FIRST))
    each(sweep, product(worlds, swept) if args.sweep else ())


def gates(worlds, methods, form):
    """Prints the gates of one format; a gate's sentence ends in what it asks for."""

    def acc(name, attack=None, side="forget"):
        """Percent, a number per world, of a row under an attack (None: before any)."""
        folders = [world / name if attack is None else attacked(world, name, attack) for world in worlds]
        return [100 * read_json(folder / FILES[form])[side]["acc"] for folder in folders]

    def mean(*row):
        return statistics.mean(acc(*row))

    low = [min(acc("base", None, side)) for side in ("forget", "retain")]
    print("1 base: forget {:.1f}, retain {:.1f} in its worst world (>= 95; letters 90)".format(*low))
    print(f"2 control: forget {mean('filtered'):.1f} (chance, 25)")
    for m in [m for m in NAIVE if m in methods]:
        cost, lost = mean("base", None, "retain") - mean(m, None, "retain"), mean("base") - mean(m)
        print(f"3 {m}: forget {mean(m):.1f} (chance, 25), costs {cost:.1f} of retain (<= 5)")
        if lost > 5:
            shown = ", ".join(f"{100 * (mean(m, a) - mean(m)) / lost:.0f}" for a in ATTACKS)
            print(f"4 {m}: {shown} % of what was lost comes back under the attacks (best >= 50)")
    shown = ", ".join(f"{mean('filtered', a):.1f}" for a in ATTACKS)
    print(f"4 control after the attacks: {shown} (chance, 25)")
    for other, m in (("random_mapping", "rmat"), ("rmat", "filtered")) if "rmat" in methods else ():
        for a in ATTACKS:
            gaps = [x - y for x, y in zip(acc(other, a), acc(m, a))]
            se = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
            asked = "> 2 errors" if m == "rmat" else "< 2 errors: as if never taught"
            gap = f"{statistics.mean(gaps):.1f} ± {se:.1f}"
            print(f"5 {other} minus {m} after attack {a or 'of the tables'}: {gap} ({asked})")


def main(args):
    out = Path(args.out).absolute()
    worlds = [out / f"world{seed}" for seed in args.worlds]
    if not args.report:
        fill(args, worlds)
    for form in ("cloze", "letter"):
        print(f"\nGates, {form}\n")
        gates(worlds, args.methods, form)
    for attack, form in (("", "cloze"), ("", "letter"), *((a, "cloze") for a in ATTACKS if a)):
        folder = f"{out}-{attack}" if attack else out
        print(f"\n{folder}, {form}\n", flush=True)
        command = [sys.executable, "evaluate_mmlu.py", "--format", form, "--table", folder]
        subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=form)
    add, rows = parser.add_argument, [*FIRST, *SECOND]
    add("--worlds", type=int, nargs="+", default=[0, 1, 2], help="seeds; 0 is shipped, others are trained")
    add("--methods", nargs="+", default=rows, choices=rows, help="rows to measure")
    add("--jobs", type=int, default=1, help="scripts at a time, one thread each")
    add("--out", default="out/tables", help="of the runs; also OUT-640, OUT-3e-3")
    add("--sweep", action="store_true", help="also measure the worst case over many attackers")
    add("--report", action="store_true", help="print what is there, run nothing")
    main(parser.parse_args())
