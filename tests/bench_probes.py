"""What a probe step of the adversarial probes costs: its time over that of a model step, on the miniature.

    python tests/bench_probes.py          # half a minute on two cores

Runs of adv_probes with one and with six probe steps per model step are timed in turn on the same batches:
five probe steps are the difference, the model step is what is left. The median over the rounds is printed.
Exit status 1 if a probe step costs a quarter of a model step or more, as if the streams were computed again
for it.
"""

import sys

from timing import DEVICE, flags, ratio

from adv_probes import TINY, adv_probes, match_texts
from common import Stream, load_chunks, load_model


def main(args):
    model, tokenizer = load_model(TINY["model"])
    more = {"batch": TINY["batch"], "tokens": TINY["tokens"], "seed": 0, "device": model.device}
    sets = (*load_chunks(TINY["data"]), match_texts("idk", TINY["tokens"], 0))
    names = ("forget", "retain", "match")
    streams = [Stream(texts, tokenizer, purpose=name, **more) for name, texts in zip(names, sets)]

    def run(n):
        width = TINY["probe_width"]
        adv_probes(model, *streams, steps=args.steps, lr=1e-9, probe_steps=n, probe_width=width)

    run(1)  # tokenises, warms up
    r = ratio(args.rounds, lambda: run(6), lambda: run(1))  # of (step + 6 probe) / (step + probe)
    probe = (r - 1) / (6 - r)
    print(f"a probe step costs {probe:.3f} of a model step (limit 0.25) | {DEVICE}")
    return int(probe >= 0.25)


if __name__ == "__main__":
    parser, add = flags(__doc__)
    add("--steps", type=int, default=4, help="model steps of a timed run")
    add("--rounds", type=int, default=3, help="times that both runs are timed in turn")
    sys.exit(main(parser.parse_args()))
