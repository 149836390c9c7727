"""What an outer step of MLAC-AR costs: its time over 2K + 1 plain passes; memory at K = 32 over K = 1.

    python tests/bench_rmat.py          # about three minutes on two cores

A plain pass is forward and backward of one batch, nothing else; step and passes are timed in turn, and the
median of the ratios is printed. Memory is the peak of a fresh process each: resident on the CPU, allocated on
a GPU. Exit status 1 if the step takes more than 1.08 times the passes, or K = 32 more than 1.05 times the
memory of K = 1.
"""

import statistics
import subprocess
import sys

import torch

from timing import DEVICE, Batches, clock, flags, llama, plain_passes, random_model, timed

from common import peak_bytes
from mlac_ar import mlac_ar

VOCAB = 4000


def outer_steps(model, batch, tokens, K, N, **more):
    forget, retain = Batches((K + 1) * batch, tokens, VOCAB), Batches(batch, tokens, VOCAB)
    mlac_ar(model, forget, retain, K=K, N=N, lr=1e-5, alpha=1.0, **more)


def time_ratio(model, args):
    """Median over the rounds of seconds of one outer step / seconds of 2K + 1 plain passes."""
    n, batches, ratios, marks = 2 * args.K + 1, Batches(args.batch, args.tokens, VOCAB), [], []

    def log(i, N, **_):  # the first outer step of a run allocates the buffers and is not timed
        if i > 1:
            step, plain = clock() - marks[-1], timed(plain_passes, model, batches, n)[1]
            print(
                f"outer step {step:.2f} s | plain passes {plain:.2f} s | ratio {step / plain:.3f}", flush=True
            )
            ratios.append(step / plain)
        marks.append(clock())

    plain_passes(model, batches, n)
    outer_steps(model, args.batch, args.tokens, args.K, args.rounds + 1, log=log)
    size, ratio = f"{model.num_parameters() / 1e6:.1f} M parameters", statistics.median(ratios)
    print(f"{size}, K = {args.K}, {args.batch} x {args.tokens}: median ratio {ratio:.3f} (limit 1.08)")
    return ratio


def memory_ratio(args):
    """Peak of a process that runs one outer step with K = 32 over that with K = 1."""
    command = [sys.executable, __file__, "--width", str(args.width), "--layers", str(args.layers), "--peak"]
    one, many = (int(subprocess.check_output([*command, k])) for k in ("1", "32"))
    ratio = f"ratio {many / one:.3f} (limit 1.05)"
    print(f"peak at K = 1: {one / 1e6:.0f} MB, at K = 32: {many / 1e6:.0f} MB, {ratio}")
    return many / one


def main(args):
    model = random_model(llama(VOCAB, args.width, args.width * 11 // 4, args.layers, 8)).train()
    if args.peak:
        outer_steps(model, 2, 64, args.peak, 1)
        print(peak_bytes())
        return 0
    print(f"{DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    slow, large = time_ratio(model, args), memory_ratio(args)
    return int(slow > 1.08 or large > 1.05)


if __name__ == "__main__":
    parser, add = flags(__doc__)
    add("--K", type=int, default=4, help="adversary steps of the timed outer step")
    add("--width", type=int, default=512, help="of the random Llama; 512 makes 23 M parameters")
    add("--layers", type=int, default=6, help="of the random Llama")
    add("--batch", type=int, default=8, help="texts per batch")
    add("--tokens", type=int, default=256, help="tokens per text")
    add("--rounds", type=int, default=3, help="times that step and passes are timed in turn")
    add("--peak", type=int, default=None, help="only print the peak bytes of one outer step with this K")
    sys.exit(main(parser.parse_args()))
