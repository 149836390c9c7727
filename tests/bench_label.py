"""What labelling costs, against generating the judge's answer.

    python tests/bench_label.py            # at least 5 times as fast; the miniature, a minute
    python tests/bench_label.py --memory   # 1 GB of text takes at most 1.1 times the memory of 10 MB

Labelling reads yes and no at the first position of the answer; the question's cache is shared by all chunks.
It is timed in turn with model.generate of 8 tokens, greedy, padded on the left, on the same chunks. The exit
status is 1 if a limit is broken.
"""

import json
import resource
import statistics
import sys
import tempfile

import torch
import zstandard

from timing import DEVICE, flags, seconds

from common import load_model, read_table
from label_pile import QUESTION, TINY, around, frame, judge, plain, read_chunks


def generate(model, tokenizer, texts, head, tail, batch):
    """8 tokens after each prompt, `batch` at a time, padded on the left."""
    before, after = around(tokenizer, head, tail)
    for i in range(0, len(texts), batch):
        rows = [before + ids + after for ids in plain(tokenizer, texts[i : i + batch]).input_ids]
        T = max(map(len, rows))
        ids = torch.tensor([[0] * (T - len(r)) + r for r in rows], device=model.device)
        mask = torch.tensor([[0] * (T - len(r)) + [1] * len(r) for r in rows], device=model.device)
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False
        )


def memory(source, tokenizer):
    """Peak bytes of this process when it has read 1 GB of text over those when it had read 10 MB."""
    block = "".join(json.dumps(row) + "\n" for row in read_table(source, "--pile", ("text",))).encode()
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for size in (10_000_000, 1_000_000_000):
            with zstandard.open(path := f"{folder}/{size}.jsonl.zst", "wb") as f:
                for _ in range(size // len(block) + 1):
                    f.write(block)
            rows = read_table(path, "--pile", ("text",), streaming=True)
            assert sum(1 for _ in read_chunks(rows, tokenizer, 207, (0, 1000), 1e12, None))  # every 1000th
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peaks[1] / peaks[0]


def main(args):
    model, tokenizer = load_model(args.judge or TINY["judge"])
    if args.memory:
        print(f"1 GB over 10 MB: {(ratio := memory(args.pile, tokenizer)):.3f} (limit 1.1)")
        return int(ratio > 1.1)
    rows = read_table(args.pile, "--pile", ("text",), streaming=True)
    head, tail = frame(tokenizer, QUESTION, "biology", chat=True)
    texts = [c[1] for c, _ in zip(read_chunks(rows, tokenizer, 207, (0, 1), 1e12, None), range(args.chunks))]
    budget = args.batch * max(len(i) for i in tokenizer([head + t + tail for t in texts]).input_ids)

    def timed(work, *more):
        return seconds(lambda: work(model, tokenizer, texts, head, tail, *more))

    ratios = [timed(generate, args.batch) / timed(judge, budget) for _ in range(args.rounds + 1)]
    print(f"generating over labelling: {' '.join(f'{x:.1f}' for x in ratios)}; the first warms up")
    median = statistics.median(ratios[1:])
    print(f"generating takes {median:.1f} times as long as labelling (at least 5) | {DEVICE}")
    return int(median < 5)


if __name__ == "__main__":
    parser, add = flags(__doc__)
    add("--judge", default=None, help="hub name or directory; None: the miniature's base")
    add("--pile", default=TINY["pile"], help="documents")
    add("--chunks", type=int, default=256, help="chunks to judge")
    add("--batch", type=int, default=16, help="chunks per batch")
    add("--rounds", type=int, default=3, help="times that both sides are timed in turn")
    add("--memory", action="store_true", help="compare the memory of reading 1 GB with that of 10 MB instead")
    sys.exit(main(parser.parse_args()))
