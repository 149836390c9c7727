"""What labelling costs, against generating the judge's answer and against plain forward passes.

    python tests/bench_label.py                                              # the miniature, a minute
    python tests/bench_label.py --memory                                     # 1 GB of text against 10 MB of it
    python tests/bench_label.py --judge openchat/openchat-3.5-0106 --pile 00.jsonl.zst       # a real judge

The prompt is label_pile.py's own, question and turn (the miniature knows few of its words, which costs no time).
Labelling reads yes and no at the first position of the answer, the question's cache shared by all chunks.
Generating is model.generate of 8 tokens, greedy, padded on the left, as a script without label_pile.py's ways
would have it. Plain passes are over the same batches, every row in full with its question, without a cache,
logits at one position. Both are timed in turn with labelling, on the same chunks; medians are printed.

The plain passes are compared per token, padding included; labelling's tokens are the question once and the rest
of every row. In labelling almost every token comes after the question and attends to all of it, in a whole
prompt to half as much on average: in a judge as narrow as the miniature (width 64), where attention is half of
the work, that alone can cost a fifth; at a real judge's width it is nothing. --width makes a random judge.

Exit status 1 if generating takes less than 5 times as long as labelling, or if a token of labelling takes more
than 1.1 times as long as one of the plain passes.

--memory reads 10 MB and 1 GB of text, the documents repeated in a .jsonl.zst, in a process each as label_pile.py
does (a thousandth of the documents is cut into chunks), and prints the peaks of resident memory. Exit status 1
if the second is over 1.1 times the first.
"""

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer

from timing import DEVICE, clock, flags, in_turn, llama, median_ratio, random_model

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
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False
        )


@torch.inference_mode()
def plain_forward(model, batches):
    """Forward passes without a cache, logits at the last position of each row."""
    for ids in batches:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits(model, hidden[:, -1])


def batches_of(model, label):
    """(labelling's tokens, its batches (B, T) with the question before every row)."""
    seen = []  # what labelling gives the model: the question (1, P), then batches of the rest of the rows
    hook = model.base_model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    label()
    hook.remove()
    question, *rest = seen
    whole = [torch.cat([question.expand(len(ids), -1), ids], 1) for ids in rest]
    return sum(ids.numel() for ids in seen), whole


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
            start, command = clock(), [sys.executable, __file__, "--read", path]
            peaks.append(
                int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
            )
            print(
                f"{size / 1e6:.0f} MB of text: peak {peaks[-1] / 1e6:.0f} MB, {clock() - start:.0f} s",
                flush=True,
            )
    print(f"1 GB over 10 MB: {peaks[1] / peaks[0]:.3f} (limit 1.1)")
    return peaks[1] / peaks[0]


def main(args):
    rows = read_rows(args.read or args.pile or TINY["pile"], "--pile", ("text",), streaming=True)
    if args.read:
        tokenizer = AutoTokenizer.from_pretrained(args.judge or TINY["judge"])
        n = sum(1 for _ in read_chunks(rows, tokenizer, 207, (0, 1000), 1e12, None))
        print(n, "chunks", peak_bytes())
        return 0
    if args.memory:
        return int(memory(args.pile or TINY["pile"]) > 1.1)
    model, tokenizer = load_model(args.judge or TINY["judge"])
    if args.width:
        model = random_model(
            llama(len(tokenizer), args.width, args.width * 11 // 4, 6, args.width // 64)
        ).eval()
    head, tail = frame(tokenizer, QUESTION, "biology", chat=True)
    texts = [c[1] for c, _ in zip(read_chunks(rows, tokenizer, 207, (0, 1), 1e12, None), range(args.chunks))]
    budget = args.batch * max(len(i) for i in tokenizer([head + t + tail for t in texts]).input_ids)
    label = partial(judge, model, tokenizer, texts, head, tail, budget)
    n, whole = batches_of(model, label)
    share, times = n / sum(ids.numel() for ids in whole), []
    works = (
        label,
        partial(generate, model, tokenizer, texts, head, tail, args.batch),
        partial(plain_forward, model, whole),
    )
    for ours, generated, passed in in_turn(args.rounds, *works):
        times.append((ours, generated, passed * share))
        pace = f"labelling {len(texts) / ours:.0f} chunks/s, {n / ours:.0f} tokens/s"
        others = f"generating {len(texts) / generated:.0f} chunks/s | plain {n / times[-1][2]:.0f} tokens/s"
        print(f"{pace} | {others}", flush=True)
    faster, over = median_ratio((g, o) for o, g, _ in times), median_ratio((o, p) for o, _, p in times)
    print(f"generating takes {faster:.1f} times as long (at least 5) | {DEVICE} | batch {args.batch}")
    print(
        f"a token of labelling takes {over:.2f} times as long as one of plain passes (limit 1.1) | {n} tokens"
    )
    return int(faster < 5 or over > 1.1)


if __name__ == "__main__":
    parser, add = flags(__doc__)
    add("--judge", default=None, help="hub name or directory; None: the miniature's base")
    add(
        "--width",
        type=int,
        default=None,
        help="a random judge of six layers of this width, a multiple of 64, instead",
    )
    add("--pile", default=None, help="documents; None: the miniature's")
    add("--chunks", type=int, default=256, help="chunks to judge")
    add("--batch", type=int, default=16, help="chunks per batch")
    add("--rounds", type=int, default=5, help="times that all are timed in turn")
    add("--memory", action="store_true", help="compare the memory of reading 1 GB with that of 10 MB instead")
    add("--read", default=None, metavar="FILE", help="only read FILE and print the peak bytes")
    sys.exit(main(parser.parse_args()))
