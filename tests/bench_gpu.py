"""What the scripts cost on one H100, in ten minutes: the most important figures first, each written at once.

    python tests/bench_gpu.py --predict   # before, on any machine: dry runs   -> bench_gpu.predicted.json
    python tests/bench_gpu.py             # on the GPU                         -> bench_gpu.jsonl
    python tests/bench_gpu.py --cpu       # rehearsal: all of it on a tiny config, in a minute

The model has Llama-2-7B's config and random weights; batches are the scripts' defaults:

    s/step      of the steps after the first, which compiles the update
    over plain  the step's time over that of as many plain passes (forward and backward of one batch, nothing
                else) as it has: 2K + 1 for MLAC-AR, 4 for Recovery, 2 for the others
    MFU         6 FLOPs per weight (embedding aside) and token over 989 TFLOP/s, no recomputation
    peak        GB allocated at most; predicted: by --dry-run, from the file that --predict wrote

Then scoring, the miniature's row of Table 1 on this device, whether a killed run ends bit-identical, and with
--real Random Mapping's row on a real model. Exit status 1 if a figure fails or misses its goal.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

START, ARGV = time.time(), sys.argv[1:]
if "--cpu" in ARGV:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import bench_faults
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

ROOT, DEVICE = bench_faults.ROOT, "cuda" if torch.cuda.is_available() else "cpu"
sys.path.insert(0, str(ROOT))

from adv_probes import adv_probes
from baselines import baseline
from common import next_token_loss, read_json, recompute, write_json
from evaluate_mmlu import Exam, score_mmlu
from mlac_ar import mlac_ar
from random_mapping import random_mapping
from recover import finetune

CUDA, LARGE = DEVICE == "cuda", "--cpu" not in ARGV
TINY = dict(vocab_size=4000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
CONFIG = LlamaConfig(architectures=["LlamaForCausalLM"], **{} if LARGE else TINY)  # defaults: Llama-2-7B
BATCH, TOKENS, K = (16, 256, 4) if LARGE else (4, 32, 4)
GOALS = {"mlac_ar": {"over plain": 1.10, "peak": 70}, "adv_probes": {"over plain": 1.3}}  # at most
METHODS = {  # function, batches in a step of each stream, plain passes per step, arguments
    "mlac_ar": (mlac_ar, (K + 1, 1), 2 * K + 1, dict(K=K, alpha=1.0)),
    "adv_probes": (adv_probes, (1, 1, 1), 2, {}),
    "random_mapping": (random_mapping, (1, 1), 2, {}),
    "baselines": (baseline, (1, 1), 2, dict(method="max_entropy")),
    "recover": (finetune, (4,), 4, {}),
}


def clock():
    """Seconds, read when the device has nothing left to do."""
    getattr(torch, DEVICE).synchronize()
    return time.perf_counter()


def seconds(work):
    start, _ = clock(), work()
    return clock() - start


def step_seconds(train, n=1):
    """Seconds of a step of train(steps, log), mean of n: not of the first, which allocates and compiles."""
    marks = []
    train(n + 1, lambda i, *_, **__: marks.append(clock()) if i in (1, n + 1) else None)
    return (marks[1] - marks[0]) / n


def random_model(config, dtype=torch.float32):
    """A model of random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.micro_batch = 0
    return model


def random_batches(n, batch, tokens, vocab):
    """n batches (ids, mask) without padding, on the device."""
    ids = torch.randint(1, vocab, (n, batch, tokens), generator=torch.Generator().manual_seed(0))
    return [(x, torch.ones_like(x, dtype=torch.bool)) for x in ids.to(DEVICE)]


def plain_passes(model, batches):
    """A forward and a backward pass of each batch and nothing else: what a step is compared with."""
    for batch in batches:
        next_token_loss(model, *batch).backward()
        model.zero_grad()


def predict(path, every):
    """Writes the peaks, in GB, that the scripts' own dry runs print for the config."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        CONFIG.save_pretrained(folder)
        for name, (*_, more) in METHODS.items():
            options = ["--dry-run", "--ckpt" if name == "recover" else "--model", folder]
            options += ["--recompute-every", str(every)]
            options += ["--method", more["method"]] if "method" in more else []
            command = [sys.executable, ROOT / f"{name}.py", *options]
            said = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout
            found[name] = float(re.search(r"^peak +([\d.]+) GB", said, re.M)[1])
    write_json(path, found)
    print(found)


def measure(name, model, args, n=3):
    """The figures of one method, over n steps."""
    function, streams, passes, more = METHODS[name]
    data = [(n + 1) * random_batches(1, k * BATCH, TOKENS, CONFIG.vocab_size) for k in streams]
    batches = passes * random_batches(1, BATCH, TOKENS, CONFIG.vocab_size)
    plain = partial(seconds, partial(plain_passes, model, batches))

    def train(steps, log):
        function(model, *data, lr=1e-6, log=log, **more, **{"N" if name == "mlac_ar" else "steps": steps})

    plain(), torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats() if CUDA else None
    before, step, after = plain(), step_seconds(train, n), plain()
    weights = model.num_parameters() - CONFIG.vocab_size * CONFIG.hidden_size
    return {
        "s/step": step, "over plain": 2 * step / (before + after),
        "peak": torch.cuda.max_memory_allocated() / 1e9, "predicted": read_json(args.predicted).get(name),
        "MFU": 6 * weights * passes * BATCH * TOKENS / step / 989e12,
    }  # fmt: skip


def scoring(model, n=128 if LARGE else 8):
    """Questions per second, on made-up ones of MMLU's average length (five shots: about 600 tokens)."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests" / "tiny" / "world0" / "base")
    words, draw = [w for w in tokenizer.get_vocab() if w.isalpha() and w.islower()], random.Random(0)
    texts = [[" ".join(draw.choices(words, k=k)) for k in (45, 8, 8, 8, 8)] for _ in range(n + 5)]
    made = [(question, choices, 0) for question, *choices in texts]
    exam = Exam({"made up": (made[:5], made[5:])}, forget=("made up",))
    score_mmlu(model, tokenizer, exam)
    return {"questions/s": n / seconds(lambda: score_mmlu(model, tokenizer, exam))}


def miniature(folder):
    """Its row of Table 1, percent; in a rehearsal of a few steps."""
    few = ("", "") if LARGE else (" --rm-steps 2 --N 1 --batch 4", " --steps 1")
    for command in (f"rmat.py --tiny --out x{few[0]}", f"recover.py --ckpt x --out y{few[1]}"):
        script, *flags = command.split()
        subprocess.run([sys.executable, ROOT / script, *flags], cwd=folder, check=True, capture_output=True)
    return {k: x for k, x in read_json(f"{folder}/y/scores.json").items() if not k.endswith("_se")}


def real(flags, folder):
    """Random Mapping on a real model, and its attack: the row of Table 1, percent."""
    command = [sys.executable, ROOT / "tests/real/rows.py", *flags.split(), "--out", folder]
    subprocess.run([*command, "--only", "random_mapping", "--attackers", "paper"], check=True)
    return read_json(f"{folder}/random_mapping/sweep/paper/scores.json")


def killed(folder):
    """Of a run that is killed at random moments, the kills after which it ended bit-identical."""
    name, kills = ("rmat", 2) if LARGE else ("random_mapping", 1)
    known = bench_faults.undisturbed(name, Path(folder))
    _, equal, why = bench_faults.chain(name, kills, random.Random(0), Path(folder) / "killed", *known)
    return {"kills": kills, "bit-equal": equal} | ({"error": why} if why else {})


def main(args):
    if args.predict:
        return predict(args.predicted, args.recompute_every)
    if LARGE and not CUDA:
        raise SystemExit("bench_gpu.py: no GPU here; --cpu rehearses, --predict makes the predictions")
    device, missed = torch.cuda.get_device_name() if CUDA else "CPU", []

    def write(figure, work, *more):
        """Measures a figure, prints and writes it."""
        if args.only and figure not in args.only:
            return
        try:
            values = {"error": "no time"} if time.time() - START > 60 * args.minutes else work(*more)
        except (Exception, SystemExit) as error:  # memory, a kernel: the other figures are still wanted
            values = {"error": f"{type(error).__name__}: {error}"}
        wrong = [k for k, goal in GOALS.get(figure, {}).items() if LARGE and values.get(k, 0) > goal]
        missed.extend(f"{figure}: {k} {values[k]}" for k in [*wrong, *values.keys() & {"error"}])
        shown = [f"{k} {x:.3g}" if isinstance(x, float) else f"{k} {x}" for k, x in values.items()]
        print(f"{time.time() - START:4.0f} s | {figure} | " + " | ".join(shown), flush=True)
        line = {"device": device, "figure": figure, **values, "at": time.time() - START}
        with open(args.out, "a") as f:
            f.write(json.dumps(line) + "\n")

    model = random_model(CONFIG, torch.bfloat16 if CUDA else torch.float32)
    model.micro_batch = BATCH  # the scripts' default, or no less than a batch
    if CUDA:
        recompute(model, args.recompute_every)
    for name in [*METHODS][:2]:
        write(name, measure, name, model, args)
    write("evaluate_mmlu", scoring, model)
    with tempfile.TemporaryDirectory() as folder:
        write("miniature", miniature, folder)
        write("killed_run", killed, folder)
        write("real_model", real, args.real, f"{folder}/real") if args.real else None
    for name in [*METHODS][2:]:
        write(name, measure, name, model, args)
    print("\n".join(["", *missed, f"wrote {args.out}"]))
    return int(bool(missed))


if __name__ == "__main__":
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=form)
    add = parser.add_argument
    add("--predict", action="store_true", help="only make the predictions")
    add("--cpu", action="store_true", help="rehearsal on a tiny config, without a GPU")
    add("--real", help="flags of tests/real/rows.py, in quotes: a real model's row too")
    add("--only", nargs="+", help="these figures: methods, evaluate_mmlu, miniature, killed_run, real_model")
    add("--minutes", type=float, default=9.0, help="after these no further figure is begun")
    add("--recompute-every", type=int, default=1, help="as in the scripts; at least 1")
    add("--predicted", default="bench_gpu.predicted.json", help="file of the predictions")
    add("--out", default="bench_gpu.jsonl", help="file that the figures are added to")
    sys.exit(main(parser.parse_args()))
