"""What an outer step of MLAC-AR costs: its time over 2K + 1 plain passes, and its memory at K = 32 over K = 1.

    python tests/bench_rmat.py          # about three minutes on two cores

A plain pass is forward and backward of one batch, nothing else; step and passes are timed in turn, and the median of
the ratios is printed. Memory is the peak of a fresh process each: resident on the CPU, allocated on a GPU. Exit status
1 if the step takes more than 1.15 times the passes, or K = 32 more than 1.05 times the memory of K = 1.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--K", type=int, default=4, help="adversary steps of the timed outer step")
    add("--width", type=int, default=512, help="of the random Llama; 512 makes 23 M parameters")
    add("--layers", type=int, default=6, help="of the random Llama")
    add("--batch", type=int, default=8, help="texts a batch")
    add("--tokens", type=int, default=256, help="tokens a text")
    add("--rounds", type=int, default=3, help="times that step and passes are timed in turn")
    add("--peak", type=int, default=None, help="only print the peak bytes of one outer step with this K")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import peak_bytes
from mlac_ar import mlac_ar, next_token_loss


class Batches:
    """Random batches of fixed size."""

    def __init__(self, size, tokens, vocab, device):
        self.shape, self.vocab, self.device = (size, tokens), vocab, device

    def __getitem__(self, i):
        ids = torch.randint(1, self.vocab, self.shape, generator=torch.Generator().manual_seed(i)).to(self.device)
        return ids, torch.ones_like(ids, dtype=torch.bool)


def make_model(width, layers, device, vocab=4000):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device)


def seconds(work):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_ratio(args, device):
    """Median over the rounds of seconds of one outer step / seconds of 2K + 1 plain passes."""
    model = make_model(args.width, args.layers, device).train()
    forget = Batches((args.K + 1) * args.batch, args.tokens, 4000, device)
    retain = Batches(args.batch, args.tokens, 4000, device)
    times = []  # mlac_ar allocates its buffers once, so the second outer step of a run is the one to time

    def passes():
        for _ in range(2 * args.K + 1):
            next_token_loss(model, *retain[0]).backward()
            model.zero_grad()

    def log(i, N, **_):
        now = time.perf_counter()
        if i > 1:
            plain = seconds(passes)
            times.append((now - start[0], plain))
        start[0] = time.perf_counter()

    start = [0.0]
    seconds(passes)
    mlac_ar(model, forget, retain, K=args.K, N=args.rounds + 1, lr=1e-5, alpha=1.0, log=log)
    for step, plain in times:
        print(f"outer step {step:.2f} s | {2 * args.K + 1} plain passes {plain:.2f} s | ratio {step / plain:.3f}")
    size = sum(p.numel() for p in model.parameters()) / 1e6
    ratio = statistics.median(step / plain for step, plain in times)
    print(
        f"{size:.1f} M parameters, K = {args.K}, {args.batch} x {args.tokens}: median ratio {ratio:.3f} (budget 1.15)"
    )
    return ratio


def run_for_peak(args, device):
    """Prints the peak bytes of one outer step with --peak K in this process."""
    model, K = make_model(args.width, args.layers, device).train(), args.peak
    forget, retain = Batches((K + 1) * 2, 64, 4000, device), Batches(2, 64, 4000, device)
    mlac_ar(model, forget, retain, K=K, N=1, lr=1e-5, alpha=1.0)
    print(peak_bytes())


def memory_ratio(args):
    """Peak of a process that runs one outer step with K = 32 over that with K = 1 (each a fresh process)."""
    command = [sys.executable, __file__, "--width", str(args.width), "--layers", str(args.layers), "--peak"]
    one, many = (int(subprocess.run([*command, k], capture_output=True, check=True).stdout) for k in ("1", "32"))
    print(f"peak at K = 1: {one / 1e6:.0f} MB, at K = 32: {many / 1e6:.0f} MB, ratio {many / one:.3f} (budget 1.05)")
    return many / one


def main(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.peak:
        return run_for_peak(args, device)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    slow, large = time_ratio(args, device), memory_ratio(args)
    raise SystemExit(int(slow > 1.15 or large > 1.05))


if __name__ == "__main__":
    main(args)
