"""How much faster the judge's one scored position is than generating its answer: the same chunks, the same batch.

    python tests/bench_label.py                                              # the miniature, under a minute
    python tests/bench_label.py --memory                                     # 1 GB of text against 10 MB of it
    python tests/bench_label.py --judge openchat/openchat-3.5-0106 --pile 00.jsonl.zst       # a real judge

The prompt is label_pile.py's own, question and turn (the miniature knows few of its words, which costs no time).
Scoring reads yes and no at the first position of the answer, the question's cache shared by all chunks; generating is
model.generate of 8 tokens, greedy, padded on the left, as a script without label_pile.py's ways would have it. They are
timed in turn, the median of the ratios is printed. Exit status 1 under 5.

--memory reads 10 MB and 1 GB of text, the documents repeated in a .jsonl.zst, in a process each as label_pile.py does
(a thousandth of the documents is cut into chunks), and prints the peaks of resident memory. Exit status 1 if the second
is over 1.1 times the first.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--judge", default=None, help="hub name or directory; None: the miniature's base")
    add("--pile", default=None, help="documents; None: the miniature's")
    add("--chunks", type=int, default=256, help="chunks to judge")
    add("--batch", type=int, default=16, help="chunks a batch")
    add("--rounds", type=int, default=3, help="times that both are timed in turn")
    add("--memory", action="store_true", help="compare the memory of reading 1 GB with that of 10 MB instead")
    add("--read", default=None, metavar="FILE", help="only read FILE and print the peak bytes")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()

import torch

from transformers import AutoTokenizer

from common import bos, load_model, peak_bytes, read_rows
from label_pile import QUESTION, TINY, frame, judge, plain, read_chunks


def generate(model, tokenizer, texts, head, tail, batch):
    """8 tokens after each prompt, `batch` at a time, padded on the left."""
    before = bos(tokenizer) + tokenizer(head, add_special_tokens=False).input_ids
    after = tokenizer(tail, add_special_tokens=False).input_ids
    for i in range(0, len(texts), batch):
        rows = [before + ids + after for ids in plain(tokenizer, texts[i : i + batch]).input_ids]
        T = max(map(len, rows))
        ids = torch.tensor([[0] * (T - len(r)) + r for r in rows], device=model.device)
        mask = torch.tensor([[0] * (T - len(r)) + [1] * len(r) for r in rows], device=model.device)
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)


def seconds(work, *args):
    start = time.perf_counter()
    work(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory(source):
    """Peak bytes of reading 10 MB and 1 GB of text, as a ratio; printed."""
    import zstandard

    lines = [json.dumps(row) for row in read_rows(source, "--pile", ("text",), streaming=True)]
    block = ("\n".join(lines) + "\n").encode()
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for size in (10_000_000, 1_000_000_000):
            path = Path(folder) / f"{size}.jsonl.zst"
            with open(path, "wb") as f, zstandard.ZstdCompressor(level=1).stream_writer(f) as z:
                for _ in range(size // len(block) + 1):
                    z.write(block)
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, __file__, "--read", path], check=True, capture_output=True, text=True
            )
            peaks.append(int(done.stdout.split()[-1]))
            spent = time.perf_counter() - start
            print(f"{size / 1e6:.0f} MB of text: peak {peaks[-1] / 1e6:.0f} MB, {spent:.0f} s", flush=True)
    print(f"1 GB over 10 MB: {peaks[1] / peaks[0]:.3f} (limit 1.1)")
    return peaks[1] / peaks[0]


def main(args):
    if args.read:
        rows = read_rows(args.read, "--pile", ("text",), streaming=True)
        tokenizer = AutoTokenizer.from_pretrained(args.judge or TINY["judge"])
        n = sum(1 for _ in read_chunks(rows, tokenizer, 207, (0, 1000), 1e12, None))
        print(n, "chunks", peak_bytes())
        return 0
    if args.memory:
        return int(memory(args.pile or TINY["pile"]) > 1.1)
    model, tokenizer = load_model(args.judge or TINY["judge"])
    head, tail = frame(tokenizer, QUESTION, "biology", chat=True)
    rows = read_rows(args.pile or TINY["pile"], "--pile", ("text",), streaming=True)
    texts = [c[1] for c, _ in zip(read_chunks(rows, tokenizer, 207, (0, 1), 1e12, None), range(args.chunks))]
    prompts = [len(i) for i in tokenizer([head + t + tail for t in texts]).input_ids]
    budget, ratios = args.batch * max(prompts), []
    judge(model, tokenizer, texts[: args.batch], head, tail, budget)
    for _ in range(args.rounds):
        ours = seconds(judge, model, tokenizer, texts, head, tail, budget)
        theirs = seconds(generate, model, tokenizer, texts, head, tail, args.batch)
        ratios.append(theirs / ours)
        print(
            f"scoring {len(texts) / ours:.0f} chunks/s | generating {len(texts) / theirs:.0f} | {ratios[-1]:.1f} x",
            flush=True,
        )
    ratio = statistics.median(ratios)
    print(f"scoring is {ratio:.1f} times as fast as generating (at least 5) | {model.device.type} | batch {args.batch}")
    return int(ratio < 5)


if __name__ == "__main__":
    sys.exit(main(args))
