"""What labelling costs, against generating the judge's answer and against plain forward passes.

    python tests/bench_label.py                                            # the miniature, a minute
    python tests/bench_label.py --memory                                   # 1 GB of text against 10 MB of it
    python tests/bench_label.py --judge openchat/openchat-3.5-0106 --pile 00.jsonl.zst     # a real judge

The prompt is label_pile.py's own, question and turn (the miniature knows few of its words, which costs no
time). Labelling reads yes and no at the first position of the answer, the question's cache shared by all
chunks. It is timed in turn with each of these, on the same chunks; the exit status is 1 if a median ratio is
outside its limit:

    generating  model.generate of 8 tokens, greedy, padded on the left, as a script without label_pile.py's
                ways would have it: at least 5 times labelling's seconds
    plain       forward passes over the same batches, every row in full with its question, right-padded,
                without a cache, logits at one position: labelling takes at most 1.1 times as long per token
                computed, padding included. In labelling that is the question once, and the rest of every row

A token of labelling attends to the whole question, one of a plain pass to half of its row on average. In the
miniature (width 64) attention is half of the work, and this alone costs a quarter; in a real judge it is
nothing. So without --judge the second is measured on a random judge of width 512, with a quarter of the
chunks.

--memory reads 10 MB and 1 GB of text, the documents repeated in a .jsonl.zst, in a process each as
label_pile.py does (a thousandth of the documents is cut into chunks), and prints the peaks of resident
memory. Exit status 1 if the second is over 1.1 times the first.
"""

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer

from timing import DEVICE, clock, flags, llama, random_model, ratio

from common import bos, load_model, logits, peak_bytes, read_rows
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
        more = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        model.generate(input_ids=ids, attention_mask=mask, **more)


def batches_of(model, label):
    """(tokens that labelling computes, its batches of rows (B, T) with the question before each)."""
    seen = []  # what the model is given: the question (1, P), then batches of the rest of the rows
    hook = model.base_model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    label()
    hook.remove()
    question, *rest = seen
    return sum(ids.numel() for ids in seen), [torch.cat([question.expand(len(r), -1), r], 1) for r in rest]


@torch.inference_mode()
def plain_forward(model, batches):
    """Forward passes without a cache, logits at the last position of each row."""
    for ids in batches:
        logits(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1])


def memory(source):
    """Peak bytes of reading 10 MB and 1 GB of text, as a ratio; printed."""
    import zstandard

    lines = [json.dumps(row) for row in read_rows(source, "--pile", ("text",), streaming=True)]
    block = ("\n".join(lines) + "\n").encode()
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for size in (10_000_000, 1_000_000_000):
            path, start = Path(folder) / f"{size}.jsonl.zst", clock()
            with open(path, "wb") as f, zstandard.ZstdCompressor(level=1).stream_writer(f) as z:
                for _ in range(size // len(block) + 1):
                    z.write(block)
            peaks.append(int(subprocess.check_output([sys.executable, __file__, "--read", path]).split()[-1]))
            print(f"{size / 1e6:.0f} MB: peak {peaks[-1] / 1e6:.0f} MB, {clock() - start:.0f} s", flush=True)
    print(f"1 GB over 10 MB: {peaks[1] / peaks[0]:.3f} (limit 1.1)")
    return peaks[1] / peaks[0]


def main(args):
    if args.memory:
        return int(memory(args.pile or TINY["pile"]) > 1.1)
    rows = read_rows(args.read or args.pile or TINY["pile"], "--pile", ("text",), streaming=True)
    if args.read:
        tokenizer = AutoTokenizer.from_pretrained(args.judge or TINY["judge"])
        n = sum(1 for _ in read_chunks(rows, tokenizer, 207, (0, 1000), 1e12, None))
        print(n, "chunks", peak_bytes())
        return 0
    model, tokenizer = load_model(args.judge or TINY["judge"])
    head, tail = frame(tokenizer, QUESTION, "biology", chat=True)
    texts = [c[1] for c, _ in zip(read_chunks(rows, tokenizer, 207, (0, 1), 1e12, None), range(args.chunks))]
    budget = args.batch * max(len(i) for i in tokenizer([head + t + tail for t in texts]).input_ids)

    def label(model, texts):
        return partial(judge, model, tokenizer, texts, head, tail, budget)

    ours, theirs = label(model, texts), partial(generate, model, tokenizer, texts, head, tail, args.batch)
    ours()  # warms up
    faster = ratio(args.rounds, theirs, ours)
    print(f"generating takes {faster:.1f} times as long as labelling (at least 5) | {DEVICE}", flush=True)
    if not args.judge:
        model = random_model(llama(len(tokenizer), 512, 1408, 6, 8)).eval()
        ours = label(model, texts[: args.chunks // 4])
    n, whole = batches_of(model, ours)
    share = n / sum(ids.numel() for ids in whole)
    over = ratio(args.rounds, ours, partial(plain_forward, model, whole), share)
    print(f"labelling takes {over:.3f} times as long per token as plain passes (limit 1.1) | {DEVICE}")
    return int(faster < 5 or over > 1.1)


if __name__ == "__main__":
    parser, add = flags(__doc__)
    add("--judge", default=None, help="hub name or directory; None: the miniature's base")
    add("--pile", default=None, help="documents; None: the miniature's")
    add("--chunks", type=int, default=256, help="chunks to judge")
    add("--batch", type=int, default=16, help="chunks per batch")
    add("--rounds", type=int, default=3, help="times that both sides are timed in turn")
    add("--memory", action="store_true", help="compare the memory of reading 1 GB with that of 10 MB instead")
    add("--read", default=None, metavar="FILE", help="only read FILE and print the peak bytes")
    sys.exit(main(parser.parse_args()))
