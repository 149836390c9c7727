"""What each method costs at full scale: peak memory, seconds per step, tokens per second, MFU.

    python tests/bench_gpu.py                                           # three models on one 80 GB GPU
    python tests/bench_gpu.py --models llama-2-7b --methods mlac_ar     # the figure that matters, alone

Models are made from their configs with random weights, so nothing is downloaded; time and memory do not
depend on what the weights are. Per model and method, on the scripts' own functions and default batches:

    peak        bytes allocated at most (torch.cuda.max_memory_allocated); next to it, what --dry-run predicts
    s/step      of the steps after the first, which compiles the update rule
    over plain  the step's time over that of as many plain passes (forward and backward of one batch, nothing
                else) as it has: 2K + 1 for MLAC-AR, 1 for Recovery, 2 for the others
    tokens/s    of all batches of a step
    MFU         6 FLOPs per weight (embedding aside) and token over the card's bf16 peak, no recomputation
    waits       times that a step made the host wait for all the device's work, as set_sync_debug_mode sees it

and questions per second of scoring (letters, five shots, prompts as long as MMLU's are on average). Results
go to a JSON file too. The 7B and 8B models need some 65 GB of host memory. Without a GPU the same is done at
toy size on the CPU, where peak is counted in live tensors and MFU is not given: that the bench runs, not what
a GPU does.

Exit status 1, on a GPU, if MLAC-AR on a 7B model needs 70 GB or more, if its step takes more than 1.25 times
its plain passes, or if a dry run is more than a tenth off.
"""

import json
import re
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer

from timing import CUDA, ROOT, Batches, clock, flags, llama, plain_passes, random_model, timed

from adv_probes import adv_probes
from baselines import baseline
from common import HostCopy, LiveBytes, configure_libraries
from evaluate_mmlu import score_mmlu
from mlac_ar import mlac_ar
from random_mapping import random_mapping
from recover import finetune

# fmt: off
LLAMA_3 = {"num_key_value_heads": 8, "rope_theta": 5e5}
CONFIGS = {  # vocabulary, width, inner width, layers, heads: from the models' config.json
    "llama-2-7b": llama(32000, 4096, 11008, 32, 32),
    "llama-3.1-8b": llama(128256, 4096, 14336, 32, 32, **LLAMA_3),
    "llama-3.2-1b": llama(128256, 2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True, **LLAMA_3),
    "toy": llama(4000, 128, 352, 4, 4),
}
METHODS = ("random_mapping", "adv_probes", "baselines", "mlac_ar", "recover", "evaluate_mmlu")
PEAK_FLOPS = {  # dense bf16, from the maker's data sheets; the first that is part of the card's name
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12,
    "A100": 312e12,
}
COLUMNS = ("peak GB", "predicted GB", "s/step", "over plain", "tokens/s", "MFU", "waits", "questions/s")
# fmt: on


def work_of(method, model, args):
    """(run(steps, log), the script's function; texts per plain pass; plain passes per step)."""
    B, K = args.batch, args.K
    x, x_K, pairs = (Batches(n * B, args.tokens, model.config.vocab_size) for n in (1, K + 1, 4))
    work, batch, passes = {
        "random_mapping": (partial(random_mapping, model, x, x), B, 2),
        "adv_probes": (partial(adv_probes, model, x, x, x), B, 2),
        "baselines": (partial(baseline, model, x, x, method="max_entropy"), B, 2),
        "mlac_ar": (partial(mlac_ar, model, x_K, x, K=K, alpha=1.0), B, 2 * K + 1),
        "recover": (partial(finetune, model, pairs), 4 * B, 1),
    }[method]
    steps = "N" if method == "mlac_ar" else "steps"
    return (lambda n, log=lambda *_, **__: None: work(**{steps: n}, lr=1e-6, log=log)), batch, passes


def count_waits(run):
    """Times that the second step of a run made the host wait for the device."""
    marks = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            torch.cuda.set_sync_debug_mode("warn")
            run(2, lambda *_, **__: marks.append(sum("synchroniz" in str(w.message) for w in seen)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return marks[1] - marks[0]


def live_peak(run, model):
    """Peak bytes of live tensors in two steps on the CPU, without what a GPU's run has in host memory."""
    HostCopy.reserved = 0
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        run(2)
    return live.peak - HostCopy.reserved


def measure(method, model, args):
    """The figures of one method on one model."""
    run, batch, passes = work_of(method, model, args)
    plain = partial(plain_passes, model, Batches(batch, args.tokens, model.config.vocab_size))
    marks, n = [], max(passes, 3)

    def log(
        i, steps, **_
    ):  # between the first step and the end nothing waits: steps overlap as in a real run
        if i in (1, steps):
            marks.append(clock())

    plain(1)
    before = timed(plain, n)[1]
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run(args.steps + 1, log)
    peak = torch.cuda.max_memory_allocated() if CUDA else live_peak(run, model)
    step, pass_ = (marks[1] - marks[0]) / args.steps, (before + timed(plain, n)[1]) / (2 * n)
    tokens, weights = passes * batch * args.tokens, model.num_parameters()
    if not model.config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.numel()
    card = next((f for name, f in PEAK_FLOPS.items() if CUDA and name in torch.cuda.get_device_name()), None)
    row = {"peak GB": peak / 1e9, "s/step": step, "over plain": step / passes / pass_}
    row |= {"tokens/s": tokens / step, "MFU": card and 6 * weights * tokens / step / card}
    return row | {"waits": count_waits(run) if CUDA else None}


def measure_scoring(model, subjects=2, questions=64):
    """Questions per second on made-up questions of MMLU's average length (five shots: about 600 tokens)."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests" / "tiny" / "world0" / "base")
    words = [w for w in tokenizer.get_vocab() if w.isalpha() and w.islower()]
    draw = torch.Generator().manual_seed(0)

    def some(n):
        return " ".join(words[i] for i in torch.randint(len(words), (n,), generator=draw))

    made = [(some(45), [some(8) for _ in range(4)], i % 4) for i in range(subjects * (questions + 5))]
    mmlu = {f"subject {s}": (made[s::subjects][:5], made[s::subjects][5:]) for s in range(subjects)}
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    score_mmlu(model, tokenizer, {"subject 0": mmlu["subject 0"]})
    pace = subjects * questions / timed(score_mmlu, model, tokenizer, mmlu)[1]
    return {"questions/s": pace, "peak GB": torch.cuda.max_memory_allocated() / 1e9 if CUDA else None}


def predict(name, method, args):
    """The peak, in GB, that the script's own --dry-run prints for a config."""
    if method == "evaluate_mmlu":
        return None
    with tempfile.TemporaryDirectory() as folder:
        CONFIGS[name].save_pretrained(folder)
        start = {"recover": ["--ckpt", folder, "--base", folder]}.get(method, ["--model", folder])
        more = {"mlac_ar": ["--K", args.K], "baselines": ["--method", "max_entropy"]}.get(method, [])
        batch = 4 * args.batch if method == "recover" else args.batch
        options = [*start, *more, "--batch", batch, "--tokens", args.tokens, "--dry-run"]
        command = [sys.executable, ROOT / f"{method}.py", *map(str, options)]
        done = subprocess.run(command, capture_output=True, text=True)
    if not (found := re.search(r"(cuda|cpu) +peak +([\d.]+) GB", done.stdout)):
        raise SystemExit(f"{method}.py --dry-run of {name}: {done.stderr}")
    return float(found[2])


def faults(name, method, row):
    """What is wrong with a row, as sentences."""
    first = CUDA and (name, method) == ("llama-2-7b", "mlac_ar")
    if row["predicted GB"] and abs(row["predicted GB"] / row["peak GB"] - 1) > 0.1:
        yield f"{name} {method}: the dry run is more than a tenth off"
    if first and row["peak GB"] >= 70:
        yield "MLAC-AR needs 70 GB or more"
    if first and row["over plain"] > 1.25:
        yield "an outer step takes over 1.25 times its plain passes"


def main(args):
    configure_libraries()
    if not CUDA:
        print("no GPU here: the same at toy size on the CPU, in float32", flush=True)
        args.models, args.batch, args.tokens = ["toy"], 4, 64
    where = torch.cuda.get_device_name() if CUDA else "CPU"
    cells = [(name, method) for name in args.models for method in args.methods]
    with ThreadPoolExecutor(4 if CUDA else 1) as pool:  # before anything is timed
        predicted = dict(zip(cells, pool.map(lambda cell: predict(*cell, args), cells)))
    print(f"{where}, torch {torch.__version__}, {args.batch} x {args.tokens} tokens, K = {args.K}\n")
    print("| " + " | ".join(["model", "method", *COLUMNS]) + " |\n" + "|---" * (2 + len(COLUMNS)) + "|")
    rows, bad = [], []
    for name in args.models:
        model = random_model(CONFIGS[name], torch.bfloat16 if CUDA else torch.float32).train()
        if CUDA:
            model.activation_checkpointing_enable({"use_reentrant": False})
        for method in args.methods:
            row = measure_scoring(model) if method == "evaluate_mmlu" else measure(method, model, args)
            row["predicted GB"] = predicted[name, method]
            found = [row.get(column) for column in COLUMNS]
            shown = ["–" if x is None else f"{x:.0f}" if x >= 1000 else f"{x:.3g}" for x in found]
            print(f"| {name} | {method} | " + " | ".join(shown) + " |", flush=True)
            rows.append({"model": name, "method": method, **row})
            bad += faults(name, method, row)
        del model
        if CUDA:
            torch.cuda.empty_cache()
    facts = dict(device=where, torch=torch.__version__, batch=args.batch, tokens=args.tokens, K=args.K)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    print("\n" + "\n".join([*bad, f"wrote {args.out}"]))
    return int(CUDA and bool(bad))


if __name__ == "__main__":
    parser, add = flags(__doc__)
    large = [name for name in CONFIGS if name != "toy"]
    add("--models", nargs="+", default=large, choices=CONFIGS, help="configs to build")
    add("--methods", nargs="+", default=METHODS, choices=METHODS, help="what to run")
    add("--K", type=int, default=4, help="adversary steps of MLAC-AR")
    add("--batch", type=int, default=16, help="texts per batch; Recovery has four times as many")
    add("--tokens", type=int, default=256, help="tokens per text")
    add("--steps", type=int, default=3, help="timed steps of a method")
    add("--out", default="out/bench_gpu.json", help="file of the results")
    sys.exit(main(parser.parse_args()))
