"""What an outer step of MLAC-AR costs: its time over 2K + 1 plain passes, and its memory at K = 32 over K = 1.

    python tests/bench_rmat.py          # about three minutes on two cores

A plain pass is forward and backward of one batch, nothing else; step and passes are timed in turn, and the median of
the ratios is printed. Memory is the peak of a fresh process each: resident on the CPU, allocated on a GPU. Exit status
1 if the step takes more than 1.08 times the passes, or K = 32 more than 1.05 times the memory of K = 1.
"""

import argparse
import subprocess
import sys


def parse_args(argv=None):
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=form)
    add = parser.add_argument
    add("--K", type=int, default=4, help="adversary steps of the timed outer step")
    add("--width", type=int, default=512, help="of the random Llama; 512 makes 23 M parameters")
    add("--layers", type=int, default=6, help="of the random Llama")
    add("--batch", type=int, default=8, help="texts per batch")
    add("--tokens", type=int, default=256, help="tokens per text")
    add("--rounds", type=int, default=3, help="times that step and passes are timed in turn")
    add("--peak", type=int, default=None, help="only print the peak bytes of one outer step with this K")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before torch is imported

import torch

from timing import DEVICE, Batches, clock, median_ratio, plain_passes, random_llama, seconds
from common import peak_bytes
from mlac_ar import mlac_ar

VOCAB, TIME_LIMIT, MEMORY_LIMIT = 4000, 1.08, 1.05


def make_model(args):
    sizes = dict(hidden_size=args.width, intermediate_size=args.width * 11 // 4, num_hidden_layers=args.layers)
    return random_llama(vocab_size=VOCAB, num_attention_heads=8, **sizes).train()


def outer_steps(model, batch, tokens, K, N, **more):
    mlac_ar(model, Batches((K + 1) * batch, tokens, VOCAB), Batches(batch, tokens, VOCAB), K=K, N=N, lr=1e-5, alpha=1.0, **more)


def time_ratio(args):
    """Median over the rounds of seconds of one outer step / seconds of 2K + 1 plain passes."""
    model, times = make_model(args), []
    passes, batches = 2 * args.K + 1, Batches(args.batch, args.tokens, VOCAB)
    start = None

    def log(i, N, **_):  # the first outer step of a run allocates the buffers and is not timed
        nonlocal start
        if i > 1:
            step = clock() - start
            plain = seconds(plain_passes, model, batches, passes)
            times.append((step, plain))
            print(f"outer step {step:.2f} s | {passes} plain passes {plain:.2f} s | ratio {step / plain:.3f}", flush=True)
        start = clock()

    plain_passes(model, batches, passes)
    outer_steps(model, args.batch, args.tokens, args.K, args.rounds + 1, log=log)
    ratio, size = median_ratio(times), model.num_parameters() / 1e6
    sizes = f"{size:.1f} M parameters, K = {args.K}, {args.batch} x {args.tokens}"
    print(f"{sizes}: median ratio {ratio:.3f} (limit {TIME_LIMIT})")
    return ratio


def memory_ratio(args):
    """Peak of a process that runs one outer step with K = 32 over that with K = 1 (each a fresh process)."""
    command = [sys.executable, __file__, "--width", str(args.width), "--layers", str(args.layers), "--peak"]
    one, many = (int(subprocess.run([*command, k], capture_output=True, check=True).stdout) for k in ("1", "32"))
    peaks = f"peak at K = 1: {one / 1e6:.0f} MB, at K = 32: {many / 1e6:.0f} MB"
    print(f"{peaks}, ratio {many / one:.3f} (limit {MEMORY_LIMIT})")
    return many / one


def main(args):
    if args.peak:
        outer_steps(make_model(args), 2, 64, args.peak, 1)
        print(peak_bytes())
        return 0
    print(f"{DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    slow, large = time_ratio(args), memory_ratio(args)
    return int(slow > TIME_LIMIT or large > MEMORY_LIMIT)


if __name__ == "__main__":
    sys.exit(main(args))
