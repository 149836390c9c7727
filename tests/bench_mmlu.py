"""evaluate_mmlu.py against lm-evaluation-harness: the same answer to every question, and how much faster.

    pip install "lm_eval[hf]"
    python tests/bench_mmlu.py --mmlu DIR --split validation      # DIR: MMLU's original CSVs, dev/ val/ test/

Takes a random-weight Llama of 3 M parameters and a byte-level tokenizer trained on the CSVs (or --ckpt), and
asks both programs the same questions: lm-evaluation-harness's tasks `mmlu` and `mmlu_continuation` with their
own templates, five shots, read from local files. Two answers may differ only where the best two options lie
within 1e-3 (of log-probability; per byte for cloze) in one of them. Exit status 1 if others differ.

Printed are two ratios of seconds, of the evaluation (prompts, tokens, forward passes; both sides timed in
turn on ten groups of subjects) and with imports and loading. The first would be the ratio of tokens, printed
too, if a token cost the same: evaluate_mmlu.py computes the five shots once per subject, the harness once per
question.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

START = time.perf_counter()
from timing import DEVICE, flags, llama, random_model, timed  # and, with it, torch and transformers

from common import load_model
from evaluate_mmlu import Exam, load_mmlu, plan, score_mmlu

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
    tasks = {}
    for subject, parts in mmlu.items():
        own = subject in mmlu.about  # of --wmdp
        home = Path(lm_eval.__file__).parent / "tasks" / ("wmdp" if own else f"mmlu/{kind}")
        task, template = ("wmdp_bio", "_default") if own else (f"mmlu_{subject}", f"_{kind}")
        template = yaml.safe_load((home / f"{template}_template_yaml").read_text())
        files = {}
        for name, rows in [(n, rows) for n, rows in zip(("dev", "test"), parts) if rows]:
            files[name] = str(Path(folder) / f"{form}_{subject}_{name}.jsonl")
            lines = [{"question": q, "subject": subject, "choices": c, "answer": a} for q, c, a in rows]
            Path(files[name]).write_text("".join(json.dumps(x) + "\n" for x in lines))
        about = yaml.safe_load((home / f"{task}.yaml").read_text())["description"]
        data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        more = {"task": f"{task}{end}", "description": about, "num_fewshot": 0 if own else 5}
        tasks[subject] = ConfigurableTask(config=template | data | more)
    return tasks


def ask_harness(lm, tasks):
    """{(subject, index): four log-probabilities} by lm-evaluation-harness."""
    asked = {task.config.task: task for task in tasks.values()}
    samples = lm_eval.evaluate(lm=lm, task_dict=asked, bootstrap_iters=0)["samples"]
    lines = [(subject, x) for subject, task in tasks.items() for x in samples[task.config.task]]
    return {(subject, x["doc_id"]): [float(r[0]) for r in x["filtered_resps"]] for subject, x in lines}


def ask_ours(model, tokenizer, mmlu, form):
    """The same by evaluate_mmlu.py."""
    return {(a["subject"], a["index"]): a["logprobs"] for a in score_mmlu(model, tokenizer, mmlu, form)[1]}


def ask_both(ckpt, mmlu, form, batch):
    """[their answers, ours], (their seconds, our seconds) of each group of subjects, and of loading."""
    answers, times = [{}, {}], []
    more = {"batch_size": batch, "dtype": "float32", "max_length": 8192, "device": DEVICE}
    with tempfile.TemporaryDirectory() as folder:
        lm, load_lm = timed(lambda: HFLM(pretrained=str(ckpt), **more))
        tasks, read = timed(harness_tasks, mmlu, form, folder)
        (model, tokenizer), load = timed(load_model, ckpt, "float32")
        for names in [[*mmlu][i::10] for i in range(min(10, len(mmlu)))]:
            theirs, slow = timed(ask_harness, lm, {name: tasks[name] for name in names})
            part = Exam({name: mmlu[name] for name in names}, mmlu.forget, mmlu.shots, mmlu.about)
            ours, fast = timed(ask_ours, model, tokenizer, part, form)
            answers = [old | new for old, new in zip(answers, (theirs, ours))]
            times.append((slow, fast))
    plans = [plan(tokenizer, mmlu.about.get(name, name), *mmlu[name], form) for name in mmlu]
    prompts = [[row.ids for row in rows] for rows in plans]
    whole = sum(len(ids) for subject in prompts for ids in subject)
    shared = whole - sum((len(subject) - 1) * len(os.path.commonprefix(subject)) for subject in prompts)
    print(f"{form}: {whole} tokens, {shared} with the shots once per subject, ratio {whole / shared:.1f}")
    return answers, times, (load_lm + read, load)


def compare(theirs, ours, mmlu, form):
    """Prints agreement; returns how many answers differ without a tie."""
    ties = wrong = 0
    for (subject, i), line in theirs.items():
        size = [1 if form == "letter" else len(c.encode()) for c in mmlu[subject][1][i][1]]
        scores = [[x / n for x, n in zip(logprobs, size)] for logprobs in (ours[subject, i], line)]
        if scores[0].index(max(scores[0])) != scores[1].index(max(scores[1])):
            gap = min(sorted(s)[-1] - sorted(s)[-2] for s in scores)
            ties, wrong = ties + (gap < 1e-3), wrong + (gap >= 1e-3)
            if gap >= 1e-3:
                print(f"  differs: {subject} {i}: ours {ours[subject, i]}, lm-evaluation-harness {line}")
    off, n = max(abs(x - y) for key in theirs for x, y in zip(ours[key], theirs[key])), len(theirs)
    agree = f"{n - ties - wrong} answers agree, {ties} ties, {wrong} differ"
    print(f"{form}: {n} questions, {agree}; log-probabilities differ by at most {off:.1e}")
    return wrong


def main(args):
    mmlu, wrong = load_mmlu(args.mmlu, args.split, args.subjects), 0
    with tempfile.TemporaryDirectory() as folder:
        if args.wmdp:  # the two biology subjects in WMDP's schema
            rows = [q for name in mmlu.forget for q in mmlu[name][1]]
            lines = [{"question": q, "choices": c, "answer": a} for q, c, a in rows]
            (Path(folder) / "wmdp.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
            more = {"questions": str(Path(folder) / "wmdp.jsonl"), "about": "biology"}
            mmlu = load_mmlu(args.mmlu, args.split, args.subjects, **more)
        if not args.ckpt:
            make_model(folder, mmlu)
        for form in args.format:
            answers, times, loading = ask_both(args.ckpt or folder, mmlu, form, args.batch)
            wrong += compare(*answers, mmlu, form)
            evaluation = [sum(side) for side in zip(*times)]
            whole = [sum(side) for side in zip(IMPORTS, loading, evaluation)]
            for what, (slow, fast) in (("evaluation", evaluation), ("with imports and loading", whole)):
                seconds = f"lm-evaluation-harness {slow:.1f} s, evaluate_mmlu.py {fast:.1f} s"
                print(f"{form}: {what}: {seconds}, ratio {slow / fast:.1f}")
            print(f"{form}: by group: {' '.join(f'{a / b:.1f}' for a, b in times)}", flush=True)
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
        help="what to compare",
    )
    add("--ckpt", default=None, help="checkpoint directory to ask; None: the random model")
    add("--wmdp", action="store_true", help="ask the biology questions as the harness's wmdp_bio, no shots")
    add("--batch", type=int, default=8, help="lm-evaluation-harness's; on a CPU 1 is its fastest")
    sys.exit(main(parser.parse_args()))
