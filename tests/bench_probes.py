"""What a critic step of the adversarial probes costs: its time over that of a model step, on the miniature.

    python tests/bench_probes.py          # half a minute on two cores

Runs of adv_probes with one and with six critic steps a model step are timed in turn on the same batches: five critic
steps are the difference, the model step is what is left. The median of the ratios is printed. Exit status 1 if a critic
step costs a quarter of a model step or more, as it would if the streams were computed again for it.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=4, help="model steps of a timed run")
    add("--rounds", type=int, default=3, help="times that both runs are timed in turn")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()

from adv_probes import TINY, adv_probes, match_texts
from common import Stream, load_chunks, load_model


def main(args):
    model, tokenizer = load_model(TINY["model"])
    texts_f, texts_r = load_chunks(TINY["data"])
    stream = partial(
        Stream, tokenizer=tokenizer, size=TINY["batch"], length=TINY["tokens"], seed=0, device=model.device
    )
    sets = stream(texts_f, purpose="forget"), stream(texts_r, purpose="retain")
    match = stream(match_texts("idk", TINY["tokens"], 0), purpose="match")

    def seconds(probe_steps):
        start = time.perf_counter()
        adv_probes(
            model, *sets, match, steps=args.steps, lr=1e-9, probe_steps=probe_steps, probe_width=TINY["probe_width"]
        )
        return (time.perf_counter() - start) / args.steps

    seconds(1)  # tokenises, warms up
    ratios = []
    for _ in range(args.rounds):
        one, six = seconds(1), seconds(6)
        critic = (six - one) / 5
        ratios.append(critic / (one - critic))
        print(f"model step {one - critic:.3f} s | critic step {critic:.3f} s | ratio {ratios[-1]:.3f}", flush=True)
    ratio = statistics.median(ratios)
    print(f"a critic step costs {ratio:.3f} of a model step (limit 0.25) | {model.device.type}")
    return int(ratio >= 0.25)


if __name__ == "__main__":
    sys.exit(main(args))
