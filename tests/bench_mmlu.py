"""evaluate_mmlu.py against lm-evaluation-harness: the same answer to every question, and how much faster.

    pip install "lm_eval[hf]"
    python tests/bench_mmlu.py --mmlu DIR --split validation      # DIR: MMLU's original CSVs, dev/ val/ test/

Takes a random-weight Llama of 3 M parameters and a byte-level tokenizer trained on the CSVs (or --ckpt), and asks
both programs the same questions: lm-evaluation-harness's tasks `mmlu` and `mmlu_continuation` with their own
templates, five shots, read from local files. Two answers may differ only where the best two options lie within 1e-3
(of log-probability; per byte for cloze) in one of them. Exit status 1 if others differ.

Ratios of seconds are printed: of the evaluation (prompts, tokens, forward passes), both sides timed in turn on ten groups
of subjects, and with imports and loading. The ratio of tokens is what the first would be if a token cost the same on
both sides: the harness computes every prompt in full, evaluate_mmlu.py the five shots once per subject.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

START = time.perf_counter()
from timing import DEVICE, clock, flags, llama, random_model  # and, with it, torch and transformers

from common import load_model
from evaluate_mmlu import load_mmlu, plan, score_mmlu

IMPORTS = [time.perf_counter() - START]
try:
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
except ImportError:
    print('bench_mmlu.py: lm-evaluation-harness is not installed; pip install "lm_eval[hf]"', file=sys.stderr)
    raise SystemExit(2) from None
IMPORTS.insert(0, time.perf_counter() - START)
import yaml

from conftest import bpe


def make_model(folder, mmlu):
    """A random Llama whose letters' log-probabilities differ from question to question."""
    texts = [q + " " + " ".join(c) for shots, asked in mmlu.values() for q, c, _ in shots + asked]
    tokenizer = bpe(texts, size=3000)
    more = {"max_position_embeddings": 8192, "initializer_range": 0.12, "bos_token_id": 0, "eos_token_id": 0}
    random_model(llama(len(tokenizer), 192, 512, 4, 4, **more)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def harness_tasks(mmlu, form, folder):
    """lm-evaluation-harness's own task of each subject, its data set replaced by local files."""
    kind, end = ("default", "") if form == "letter" else ("continuation", "_continuation")
    home = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / kind
    template = yaml.safe_load((home / f"_{kind}_template_yaml").read_text())
    tasks = {}
    for subject, parts in mmlu.items():
        files = {}
        for name, rows in zip(("dev", "test"), parts):
            files[name] = str(Path(folder) / f"{form}_{subject}_{name}.jsonl")
            lines = [{"question": q, "subject": subject, "choices": c, "answer": a} for q, c, a in rows]
            Path(files[name]).write_text("".join(json.dumps(x) + "\n" for x in lines))
        own = yaml.safe_load((home / f"mmlu_{subject}.yaml").read_text())
        config = template | {
            "task": f"mmlu_{subject}{end}",
            "description": own["description"],
            "num_fewshot": 5,
        }
        config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        tasks[subject] = ConfigurableTask(config=config)
    return tasks


def ask_harness(lm, tasks):
    """{(subject, index): four log-probabilities} by lm-evaluation-harness."""
    result = lm_eval.evaluate(lm=lm, task_dict={t.config.task: t for t in tasks.values()}, bootstrap_iters=0)
    samples = {subject: result["samples"][task.config.task] for subject, task in tasks.items()}
    return {
        (s, x["doc_id"]): [float(r[0]) for r in x["filtered_resps"]] for s, xs in samples.items() for x in xs
    }


def ask_ours(model, tokenizer, mmlu, form):
    """The same by evaluate_mmlu.py."""
    return {(a["subject"], a["index"]): a["logprobs"] for a in score_mmlu(model, tokenizer, mmlu, form)[1]}


def ask_both(ckpt, mmlu, form, batch):
    """([answers by the harness, by us], [(its seconds, ours) of each group of subjects], (its loading, ours))."""
    answers, times, marks = [{}, {}], [], [clock()]
    with tempfile.TemporaryDirectory() as folder:
        lm = HFLM(pretrained=str(ckpt), batch_size=batch, dtype="float32", max_length=8192, device=DEVICE)
        tasks = harness_tasks(mmlu, form, folder)
        marks.append(clock())
        model, tokenizer = load_model(ckpt, "float32")
        marks.append(clock())
        for names in [[*mmlu][i::10] for i in range(min(10, len(mmlu)))]:
            start = clock()
            answers[0] |= ask_harness(lm, {name: tasks[name] for name in names})
            turn = clock()
            answers[1] |= ask_ours(model, tokenizer, {name: mmlu[name] for name in names}, form)
            times.append((turn - start, clock() - turn))
    rows = [[row.ids for row in plan(tokenizer, name, *parts, form)] for name, parts in mmlu.items()]
    whole = sum(len(ids) for group in rows for ids in group)
    shared = whole - sum((len(group) - 1) * len(os.path.commonprefix(group)) for group in rows)
    print(f"{form}: {whole} tokens, {shared} with the shots once per subject, ratio {whole / shared:.1f}")
    return answers, times, (marks[1] - marks[0], marks[2] - marks[1])


def compare(theirs, ours, mmlu, form):
    """Prints agreement; returns how many answers differ without a tie."""
    ties = wrong = 0
    for (subject, index), line in theirs.items():
        choices = mmlu[subject][1][index][1]
        size = [1] * 4 if form == "letter" else [len(c.encode()) for c in choices]
        scores = [[x / n for x, n in zip(logprobs, size)] for logprobs in (ours[subject, index], line)]
        if scores[0].index(max(scores[0])) != scores[1].index(max(scores[1])):
            gap = min(sorted(s)[-1] - sorted(s)[-2] for s in scores)
            ties, wrong = ties + (gap < 1e-3), wrong + (gap >= 1e-3)
            if gap >= 1e-3:
                print(
                    f"  differs: {subject} {index}: ours {ours[subject, index]}, lm-evaluation-harness {line}"
                )
    off = max(abs(x - y) for key in theirs for x, y in zip(ours[key], theirs[key]))
    print(
        f"{form}: {len(theirs)} questions, {len(theirs) - ties - wrong} answers agree, {ties} ties, {wrong} differ"
    )
    print(f"{form}: largest difference of a log-probability {off:.1e}")
    return wrong


def main(args):
    mmlu, wrong = load_mmlu(args.mmlu, args.split, args.subjects), 0
    with tempfile.TemporaryDirectory() as folder:
        if not args.ckpt:
            make_model(folder, mmlu)
        for form in args.format:
            answers, times, loading = ask_both(args.ckpt or folder, mmlu, form, args.batch)
            wrong += compare(*answers, mmlu, form)
            evaluation, ratios = [sum(column) for column in zip(*times)], sorted(a / b for a, b in times)
            whole = [sum(parts) for parts in zip(IMPORTS, loading, evaluation)]
            for what, (slow, fast) in (("evaluation", evaluation), ("with imports and loading", whole)):
                seconds = f"lm-evaluation-harness {slow:.1f} s, evaluate_mmlu.py {fast:.1f} s"
                print(f"{form}: {what}: {seconds}, ratio {slow / fast:.1f}", flush=True)
            print(f"{form}: evaluation of single groups: ratios {ratios[0]:.1f} to {ratios[-1]:.1f}")
    return int(wrong > 0)


if __name__ == "__main__":
    parser, add = flags(__doc__)
    add("--mmlu", required=True, help="folder of MMLU's CSVs: dev/, val/, test/")
    add("--split", default="validation", choices=("test", "validation"), help="questions to ask")
    add("--subjects", nargs="+", default=None, help="ask these subjects only; None: all of the folder")
    add(
        "--format",
        nargs="+",
        default=["letter", "cloze"],
        choices=("letter", "cloze"),
        help="formats to compare",
    )
    add("--ckpt", default=None, help="checkpoint directory to ask; None: the random model")
    add("--batch", type=int, default=8, help="lm-evaluation-harness's batch size")
    sys.exit(main(parser.parse_args()))
