"""Kills scripts at random moments, starts them again, compares what they end in with an undisturbed run's.

    python tests/bench_faults.py    # 100 kills, about eight minutes on two cores

A chain is one run that is killed one to four times, each time at a random moment, by SIGKILL, SIGTERM or
SIGINT, and then left to end. After each kill the directory must not pass for what it is not: if there is an
args.json or a config.json, the weights beside it are those of the undisturbed run. The last line is "kills
100, resumed 100, bit-equal 100": a kill counts as resumed if the next start of the same command was accepted,
and as bit-equal if its chain ended like the undisturbed run.
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
SHORT = "--tiny --batch 4 --log-every 1 --save-every 1e-9".split()
SCRIPTS = {
    "random_mapping": "random_mapping.py --steps 25",
    "mlac_ar": "mlac_ar.py --N 12 --K 2",
    "rmat": "rmat.py --rm-steps 12 --N 8 --K 2",
    "adv_probes": "adv_probes.py --steps 12",
    "overwriting": "baselines.py --method overwriting --steps 20",
    "high_low_lr": "baselines.py --method high_low_lr --steps 25",
    "recover": f"recover.py --ckpt {ROOT}/tests/tiny/world0/base --steps 12 --eval-every 4",
    "label_pile": "label_pile.py --max-chunks 400 --rows 20",
}
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def start(name, out):
    script, *flags = SCRIPTS[name].split()
    more = SHORT if name != "label_pile" else ["--tiny"]
    command = [sys.executable, "-u", ROOT / script, *flags, *more, "--out", out]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def results(out, kinds=("model.safetensors", "scores.json", "mmlu*.json*", "part*.jsonl")):
    """{file: bytes} of what a run is for: weights, scores and labels."""
    found = [path for kind in kinds for path in out.rglob(kind) if "state" not in path.parts]
    return {path.relative_to(out): path.read_bytes() for path in found}


def false_checkpoint(out, whole):
    """Is there something in `out` that passes for a result and differs from the undisturbed run's?"""
    found, signs = results(out), results(out, ("args.json", "config.json"))
    return any(found.get(x) != whole.get(x) for x in (sign.parent / "model.safetensors" for sign in signs))


def undisturbed(name, folder):
    """(results, seconds until its first line, seconds from there to the end) of a run that is left alone."""
    begun, process = time.time(), start(name, folder / name)
    first, ready = process.stdout.readline(), time.time()
    rest = process.stdout.read()
    if process.wait():
        raise SystemExit(f"{name} ended with {process.returncode}:\n{first}{rest}")
    return results(folder / name), ready - begun, time.time() - ready


def chain(name, kills, draw, out, whole, first, rest):
    """Kills one run `kills` times; returns the resumed and bit-equal among them, and what went wrong."""
    killed = 0
    while killed < kills:
        process, number = start(name, out), draw.choice(SIGNALS)
        said = "" if draw.random() < 0.1 else process.stdout.readline()  # else it is killed while it loads
        time.sleep(draw.uniform(0, rest / (1 + killed) if said else first))
        process.send_signal(number)
        said += process.communicate()[0]
        if process.returncode == 0 or "is a finished run" in said:
            shutil.rmtree(out)  # it was done before the signal came: once more
            killed = 0
            continue
        killed += 1
        if process.returncode == 2 or "Traceback" in said and "KeyboardInterrupt" not in said:
            return 0, 0, f"{name}: failed or refused after {killed - 1} kills: {said[-800:]}"
        if out.exists() and false_checkpoint(out, whole):
            return 0, 0, f"{name}: a false checkpoint after {number!r}, kill {killed}"
    process = start(name, out)
    said = process.communicate()[0]
    if process.returncode and "is a finished run" not in said:  # killed after the last file was written
        return 0, 0, f"{name}: not resumed: {said[-500:]}"
    equal = results(out) == whole
    return kills, kills * equal, "" if equal else f"{name}: resumed, but it ended in other bits"


def main(args):
    draw, chains = random.Random(args.seed), []
    while left := args.kills - sum(kills for _, kills in chains):
        chains.append((list(SCRIPTS)[len(chains) % len(SCRIPTS)], min(draw.randint(1, 4), left)))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        names = sorted({name for name, _ in chains})
        known = dict(zip(names, pool.map(lambda name: undisturbed(name, Path(folder)), names)))

        def one(i):
            (name, kills), own = chains[i], random.Random(f"{args.seed} {i}")
            found = chain(name, kills, own, Path(folder) / f"chain{i}", *known[name])
            print(f"chain {i + 1}/{len(chains)}: {name}, {kills} kills {found[2] or 'made good'}", flush=True)
            return found

        resumed, equal, _ = zip(*pool.map(one, range(len(chains))))
    print(f"kills {args.kills}, resumed {sum(resumed)}, bit-equal {sum(equal)}")
    return int(sum(equal) < args.kills)


if __name__ == "__main__":
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=form)
    add = parser.add_argument
    add("--kills", type=int, default=100, help="in all, over all scripts")
    add("--jobs", type=int, default=2, help="runs at a time, one thread each")
    add("--seed", type=int, default=0, help="of the moments and the signals")
    sys.exit(main(parser.parse_args()))
