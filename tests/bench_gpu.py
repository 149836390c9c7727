"""What the scripts cost on one H100, in ten minutes: the most important figures first, each written at once.

    python tests/bench_gpu.py          # on the GPU                                      -> bench_gpu.jsonl
    python tests/bench_gpu.py --cpu    # rehearsal: all of it on a tiny config, in a minute

The model has Llama-2-7B's config and random weights; batches are the scripts' defaults:

    s/step       of the steps after the first, which compiles the update
    over plain   the step's time over that of as many plain passes (forward and backward of one batch, nothing
                 else) as it has: 2K + 1 for MLAC-AR, 4 for Recovery, 2 for the others
    peak         GB allocated at most; predicted: by the script's own --dry-run
    questions/s  of five shots and MMLU's average length (about 600 tokens)

Exit status 1 if a figure fails.
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
from pathlib import Path

if "--cpu" in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from adv_probes import adv_probes
from baselines import baseline
from common import next_token_loss
from evaluate_mmlu import Exam, score_mmlu
from mlac_ar import mlac_ar
from random_mapping import random_mapping
from recover import finetune

LARGE, DEVICE = "--cpu" not in sys.argv, "cuda" if torch.cuda.is_available() else "cpu"
TINY = dict(vocab_size=4000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
CONFIG = LlamaConfig(architectures=["LlamaForCausalLM"], **{} if LARGE else TINY)  # defaults: Llama-2-7B
BATCH, TOKENS, K = (16, 256, 4) if LARGE else (4, 32, 4)
METHODS = {  # function, batches in a step of each stream, plain passes per step, arguments
    "mlac_ar": (mlac_ar, (K + 1, 1), 2 * K + 1, dict(K=K, alpha=1.0)),
    "adv_probes": (adv_probes, (1, 1, 1), 2, {}),
    "random_mapping": (random_mapping, (1, 1), 2, {}),
    "baselines": (baseline, (1, 1), 2, dict(method="max_entropy")),
    "recover": (finetune, (4,), 4, {}),
}


def predicted(name, every):
    """The peak, GB, that a script's dry run prints for the config."""
    with tempfile.TemporaryDirectory() as folder:
        CONFIG.save_pretrained(folder)
        method = METHODS[name][3].get("method")
        options = ["--recompute-every", str(every), *(["--method", method] if method else [])]
        options += ["--dry-run", "--ckpt" if name == "recover" else "--model", folder]
        command = [sys.executable, ROOT / f"{name}.py", *options]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout
    return float(re.search(r"^peak +([\d.]+) GB", said, re.M)[1])


def clock():
    """Seconds, read when the device has nothing left to do."""
    getattr(torch, DEVICE).synchronize()
    return time.perf_counter()


def batch(n):
    """n texts without padding, (ids, mask), on the device."""
    ids = torch.randint(1, CONFIG.vocab_size, (n, TOKENS), generator=torch.Generator().manual_seed(0))
    return ids.to(DEVICE), torch.ones_like(ids, dtype=torch.bool, device=DEVICE)


def measure(name, model, every, n=3):
    """The figures of one method, over n steps after the first."""
    function, streams, passes, more = METHODS[name]
    data, one, marks = [(n + 1) * [batch(k * BATCH)] for k in streams], batch(BATCH), {}

    def plain():
        start = clock()
        for _ in range(passes):
            next_token_loss(model, *one).backward()
            model.zero_grad()
        return clock() - start

    plain()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before, steps = plain(), {"N" if name == "mlac_ar" else "steps": n + 1}
    function(model, *data, lr=1e-6, log=lambda i, *_, **__: marks.update({i: clock()}), **more, **steps)
    step, after = (marks[n + 1] - marks[1]) / n, plain()
    peak = torch.cuda.max_memory_allocated() / 1e9
    found = {"s/step": step, "over plain": 2 * step / (before + after), "peak": peak}
    return found | {"predicted": predicted(name, every)}


def scoring(model, n=128 if LARGE else 8):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests" / "tiny" / "world0" / "base")
    words, draw = [w for w in tokenizer.get_vocab() if w.isalpha() and w.islower()], random.Random(0)
    texts = [[" ".join(draw.choices(words, k=k)) for k in (45, 8, 8, 8, 8)] for _ in range(n + 5)]
    made = [(question, choices, 0) for question, *choices in texts]
    exam = Exam({"made up": (made[:5], made[5:])}, forget=("made up",))
    score_mmlu(model, tokenizer, exam)
    start, _ = clock(), score_mmlu(model, tokenizer, exam)
    return {"questions/s": n / (clock() - start)}


def main(args):
    if LARGE and DEVICE == "cpu":
        raise SystemExit("bench_gpu.py: no GPU here; --cpu rehearses")
    torch.manual_seed(0)
    with torch.device(DEVICE):
        dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=dtype).train()
    model.micro_batch = BATCH  # the scripts' default, or no less than a batch
    if DEVICE == "cuda":
        model.activation_checkpointing_enable({"use_reentrant": False}, args.recompute_every)
    failed, every = 0, args.recompute_every
    for figure in args.only or ["mlac_ar", "adv_probes", "evaluate_mmlu", *[*METHODS][2:]]:
        try:
            found = measure(figure, model, every) if figure in METHODS else scoring(model)
        except (Exception, SystemExit) as error:  # memory, a kernel: the other figures are still wanted
            found, failed = {"error": f"{type(error).__name__}: {error}"}, 1
        line = json.dumps(
            {"device": torch.cuda.get_device_name() if LARGE else "CPU", "figure": figure} | found
        )
        print(line, flush=True)
        with open(args.out, "a") as f:
            f.write(line + "\n")
    return failed


if __name__ == "__main__":
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=form)
    add = parser.add_argument
    add("--cpu", action="store_true", help="rehearsal on a tiny config, without a GPU")
    add("--only", nargs="+", choices=[*METHODS, "evaluate_mmlu"], help="these figures")
    add("--recompute-every", type=int, default=1, help="as in the scripts; at least 1")
    add("--out", default="bench_gpu.jsonl", help="file that the figures are added to")
    sys.exit(main(parser.parse_args()))
