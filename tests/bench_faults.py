"""Kills scripts at random moments, starts them again, and compares what they end in with a run that nobody
disturbed, to the bit.

    python tests/bench_faults.py                      # 100 kills, six minutes on two cores
    python tests/bench_faults.py --kills 10 --seed 7

A chain is one run that is killed one to four times, each time at a moment drawn anew, by SIGKILL, SIGTERM or
SIGINT, and then left to end. After each kill the directory must not pass for what it is not: if there is an
args.json or a config.json, the weights beside it are those of the undisturbed run. The last line is

    kills 100, resumed 100, bit-equal 100

where a kill counts as resumed if the next start of the same command was accepted, and as bit-equal if its
chain ended like the undisturbed run.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORLD = ROOT / "tests" / "tiny" / "world0"
SHORT = ("--tiny", "--batch", 4, "--log-every", 1, "--save-every", 1e-9)
SCRIPTS = {  # name: script and flags
    "random_mapping": ("random_mapping.py", *SHORT, "--steps", 25),
    "mlac_ar": ("mlac_ar.py", *SHORT, "--N", 12, "--K", 2, "--hold", 1, "--vary", "rate", "mix"),
    "rmat": ("rmat.py", *SHORT, "--rm-steps", 12, "--N", 8, "--K", 2),
    "adv_probes": ("adv_probes.py", *SHORT, "--steps", 12),
    "overwriting": ("baselines.py", *SHORT, "--method", "overwriting", "--steps", 20),
    "high_low_lr": ("baselines.py", *SHORT, "--method", "high_low_lr", "--steps", 25),
    "recover": ("recover.py", *SHORT, "--ckpt", WORLD / "base", "--steps", 12, "--eval-every", 4),
    "label_pile": ("label_pile.py", "--tiny", "--max-chunks", 400, "--rows", 20),
}  # fmt: skip
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def start(name, out):
    command = [sys.executable, "-u", ROOT / SCRIPTS[name][0], *SCRIPTS[name][1:], "--out", out]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([str(x) for x in command], env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def results(out):
    """{file: bytes} of what a run is for: weights, scores and labels."""
    kinds = ("model.safetensors", "scores.json", "mmlu*.json*", "part*.jsonl")
    return {
        p.relative_to(out): p.read_bytes()
        for kind in kinds
        for p in out.rglob(kind)
        if "state" not in p.parts
    }


def false_checkpoint(out, whole):
    """Is there something in `out` that passes for a result and differs from the undisturbed run's?"""
    looks = [
        p.parent for name in ("args.json", "config.json") for p in out.rglob(name) if "state" not in p.parts
    ]
    found = results(out)
    there = [folder.relative_to(out) for folder in looks]
    return any(found.get(f / "model.safetensors") != whole.get(f / "model.safetensors") for f in there)


def undisturbed(name, folder):
    """(results, seconds until its first line, seconds from there to the end) of a run that is let be."""
    begun, process = time.time(), start(name, folder / name)
    first = process.stdout.readline()
    ready = time.time()
    rest = process.stdout.read()
    if process.wait():
        raise SystemExit(f"{name} ended with {process.returncode}:\n{first}{rest}")
    return results(folder / name), ready - begun, time.time() - ready


def chain(name, kills, draw, out, known):
    """Kills one run `kills` times; returns the resumed and bit-equal among them, and what went wrong."""
    whole, first, rest = known
    killed = 0
    while killed < kills:
        process, number = start(name, out), draw.choice(SIGNALS)
        said = "" if draw.random() < 0.1 else process.stdout.readline()  # else it is killed while it loads
        time.sleep(draw.uniform(0, rest / (1 + killed) if said else first))
        process.send_signal(number)
        said += process.communicate()[0]
        if process.returncode in (0, 2) and "is a finished run" not in said:
            if process.returncode == 2:
                return 0, 0, f"{name}: refused after {killed} kills: {said[-300:]}"
            shutil.rmtree(out)  # it was done before the signal came: once more
            killed = 0
            continue
        killed += 1
        if "Traceback" in said:
            return 0, 0, f"{name}: {said[-800:]}"
        if out.exists() and false_checkpoint(out, whole):
            return 0, 0, f"{name}: a false checkpoint after {number!r}, kill {killed}"
    process = start(name, out)
    said = process.communicate()[0]
    done = process.returncode == 0 or "is a finished run" in said  # killed after the last file had landed
    if not done:
        return 0, 0, f"{name}: not resumed: {said[-500:]}"
    equal = results(out) == whole
    shutil.rmtree(out)
    return kills, kills * equal, "" if equal else f"{name}: resumed, but it ended in other bits"


def main(args):
    draw, chains, left = random.Random(args.seed), [], args.kills
    while left:
        n = min(draw.randint(1, 4), left)
        chains.append(
            (list(SCRIPTS)[len(chains) % len(SCRIPTS)], n, random.Random(f"{args.seed} {len(chains)}"))
        )
        left -= n
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        folder = Path(folder)
        known = {name: undisturbed(name, folder) for name in {name for name, *_ in chains}}

        def one(i):
            name, n, own = chains[i]
            found = chain(name, n, own, folder / f"chain{i}", known[name])
            print(f"chain {i + 1}/{len(chains)}: {name}, {n} kills {found[2] or 'made good'}", flush=True)
            return found

        found = list(pool.map(one, range(len(chains))))
    resumed, equal = (sum(x[i] for x in found) for i in (0, 1))
    print(f"kills {args.kills}, resumed {resumed}, bit-equal {equal}")
    return int(equal < args.kills)


if __name__ == "__main__":
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=form)
    parser.add_argument("--kills", type=int, default=100, help="in all, over all scripts")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the signals")
    sys.exit(main(parser.parse_args()))
