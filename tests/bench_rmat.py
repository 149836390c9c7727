"""What an outer step of MLAC-AR costs: its time over 2K + 1 plain passes; memory at K = 32 over K = 1.

    python tests/bench_rmat.py          # about three minutes on two cores

A plain pass is forward and backward of one batch, nothing else; outer step and passes are timed in turn, and
the median of the ratios is printed. Memory is the peak of a fresh process each: resident on the CPU,
allocated on a GPU. Exit status 1 if the step takes more than 1.10 times the passes, or K = 32 more than 1.05
times the memory of K = 1.
"""

import statistics
import subprocess
import sys

from transformers import LlamaConfig

from timing import DEVICE, flags, plain_passes, random_batches, random_model, seconds, step_seconds

from common import no_log, peak_bytes
from mlac_ar import mlac_ar

VOCAB = 4000


def main(args):
    sizes = dict(
        hidden_size=args.width, intermediate_size=args.width * 11 // 4, num_hidden_layers=args.layers
    )
    model = random_model(LlamaConfig(vocab_size=VOCAB, num_attention_heads=8, **sizes)).train()
    K, batch, tokens = (args.peak, 2, 64) if args.peak else (args.K, args.batch, args.tokens)
    forget, retain = (2 * random_batches(1, n * batch, tokens, VOCAB) for n in (K + 1, 1))

    def steps(N, log=no_log):
        mlac_ar(model, forget, retain, K=K, N=N, lr=1e-5, alpha=1.0, log=log)

    if args.peak:
        steps(1)
        return print(peak_bytes())
    passes, ratios = (2 * K + 1) * retain[:1], []
    for _ in range(args.rounds):
        ratios.append(step_seconds(steps) / seconds(lambda: plain_passes(model, passes)))
        print(f"an outer step over its plain passes: {ratios[-1]:.3f}", flush=True)
    time = statistics.median(ratios)
    size = f"{model.num_parameters() / 1e6:.1f} M parameters, K = {K}, {batch} x {tokens} tokens, {DEVICE}"
    print(f"{size}: median {time:.3f} (limit 1.10)", flush=True)
    command = [sys.executable, __file__, "--width", str(args.width), "--layers", str(args.layers), "--peak"]
    one, many = (int(subprocess.check_output([*command, k])) for k in ("1", "32"))
    print(f"peak at K = 1: {one / 1e6:.0f} MB, at K = 32: {many / one:.3f} times that (limit 1.05)")
    return int(time > 1.10 or many > 1.05 * one)


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
