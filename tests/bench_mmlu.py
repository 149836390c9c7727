"""evaluate_mmlu.py against lm-evaluation-harness: the same answer to every question, and how much faster.

    pip install "lm_eval[hf]"
    python tests/bench_mmlu.py --mmlu DIR --split validation      # DIR: MMLU's original CSVs, dev/ val/ test/

Takes a random-weight Llama of 3 M parameters and a byte-level tokenizer trained on the CSVs (or --ckpt), and asks
both programs the same questions: lm-evaluation-harness's tasks `mmlu` and `mmlu_continuation` with their own
templates, five shots, read from local files. Two answers may differ only where the best two options lie within 1e-3
(of log-probability; per byte for cloze) in one of them. Exit status 1 if others differ.

Two ratios of seconds are printed. `evaluation` is from questions to answers, which is what the harness' own figures
are about: prompts, tokens, forward passes; both sides in this process, subjects in ten groups, timed in turn. `process`
is all that a user waits for: imports, loading of the model and the questions, evaluation; evaluate_mmlu.py, whose
answers are the ones compared, is then a process of its own. Set OMP_NUM_THREADS: both sides use as many threads.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def parse_args(argv=None):
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=form)
    add = parser.add_argument
    add("--mmlu", required=True, help="folder of MMLU's CSVs: dev/, val/, test/")
    add("--split", default="validation", choices=("test", "validation"), help="questions to ask")
    add("--subjects", nargs="+", default=None, help="ask these subjects only; None: all of the folder")
    add("--format", nargs="+", default=["letter", "cloze"], choices=("letter", "cloze"), help="formats to compare")
    add("--ckpt", default=None, help="checkpoint directory to ask; None: the random model")
    add("--batch", type=int, default=8, help="lm-evaluation-harness's batch size")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before torch is imported

START = time.perf_counter()
try:
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
except ImportError:
    print('bench_mmlu.py: lm-evaluation-harness is not installed; pip install "lm_eval[hf]"', file=sys.stderr)
    raise SystemExit(2) from None
IMPORTING = time.perf_counter() - START

import yaml

from timing import DEVICE, ROOT, clock, median_ratio, random_llama, seconds
from common import load_model
from conftest import bpe
from evaluate_mmlu import load_mmlu, score_mmlu


def make_model(folder, mmlu):
    """A random Llama whose letters' log-probabilities differ from question to question."""
    texts = [q + " " + " ".join(c) for shots, asked in mmlu.values() for q, c, _ in shots + asked]
    tokenizer = bpe(texts, size=3000)
    sizes = dict(hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
    more = dict(max_position_embeddings=8192, initializer_range=0.12, bos_token_id=0, eos_token_id=0)
    random_llama(vocab_size=len(tokenizer), **sizes, **more).save_pretrained(folder)
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
        config = template | {"task": f"mmlu_{subject}{end}", "description": own["description"], "num_fewshot": 5}
        config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        tasks[subject] = ConfigurableTask(config=config)
    return tasks


def ask_harness(lm, tasks):
    """{(subject, index): four log-probabilities} by lm-evaluation-harness."""
    result = lm_eval.evaluate(lm=lm, task_dict={t.config.task: t for t in tasks.values()}, bootstrap_iters=0)
    found = {}
    for subject, task in tasks.items():
        for sample in result["samples"][task.config.task]:
            found[subject, sample["doc_id"]] = [float(r[0]) for r in sample["filtered_resps"]]
    return found


def in_groups(ckpt, mmlu, form, batch):
    """The harness' answers, [(its seconds, ours) of each group of subjects] and the seconds that it took to load."""
    found, times = {}, []
    with tempfile.TemporaryDirectory() as folder:
        start = clock()
        lm = HFLM(pretrained=str(ckpt), batch_size=batch, dtype="float32", max_length=8192, device=DEVICE)
        tasks = harness_tasks(mmlu, form, folder)
        loading = IMPORTING + clock() - start
        model, tokenizer = load_model(ckpt, "float32")
        for names in [[*mmlu][i::10] for i in range(min(10, len(mmlu)))]:
            start = clock()
            found |= ask_harness(lm, {name: tasks[name] for name in names})
            slow = clock() - start
            times.append((slow, seconds(score_mmlu, model, tokenizer, {name: mmlu[name] for name in names}, form)))
    return found, times, loading


def ask_ours(ckpt, args, mmlu, form):
    """The same answers by evaluate_mmlu.py, run as a user runs it."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, ROOT / "evaluate_mmlu.py", "--ckpt", ckpt, "--mmlu", args.mmlu, "--out", out]
        command += ["--split", args.split, "--format", form, "--dtype", "float32", "--subjects", *mmlu]
        subprocess.run(command, check=True)
        rows = [json.loads(line) for line in next(Path(out).glob("mmlu*.jsonl")).read_text().splitlines()]
    return {(r["subject"], r["index"]): r["logprobs"] for r in rows}


def compare(a, b, mmlu, form):
    """Prints agreement; returns how many answers differ without a tie."""
    ties = wrong = 0
    for key, theirs in b.items():
        choices = mmlu[key[0]][1][key[1]][1]
        size = [1] * 4 if form == "letter" else [len(c.encode()) for c in choices]
        scores = [[x / n for x, n in zip(line, size)] for line in (a[key], theirs)]
        if scores[0].index(max(scores[0])) != scores[1].index(max(scores[1])):
            gap = min(sorted(s)[-1] - sorted(s)[-2] for s in scores)
            ties, wrong = ties + (gap < 1e-3), wrong + (gap >= 1e-3)
            if gap >= 1e-3:
                print(f"  differs: {key}: ours {a[key]}, lm-evaluation-harness {theirs}")
    off = max(abs(x - y) for key in b for x, y in zip(a[key], b[key]))
    print(f"{form}: {len(b)} questions, {len(b) - ties - wrong} answers agree, {ties} ties, {wrong} differ")
    print(f"{form}: largest difference of a log-probability {off:.1e}")
    return wrong


def main(args):
    mmlu = load_mmlu(args.mmlu, args.split, args.subjects)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        if not args.ckpt:
            make_model(folder, mmlu)
        ckpt = args.ckpt or folder
        for form in args.format:
            theirs, times, loading = in_groups(ckpt, mmlu, form, args.batch)
            start = clock()
            mine = ask_ours(ckpt, args, mmlu, form)
            whole = clock() - start
            wrong += compare(mine, theirs, mmlu, form)
            (slow, fast), ratios = map(sum, zip(*times)), sorted(a / b for a, b in times)
            say = "{}: {}: lm-evaluation-harness {:.1f} s, evaluate_mmlu.py {:.1f} s, ratio {:.1f}".format
            spread = f"(groups: {ratios[0]:.1f} to {ratios[-1]:.1f}, median {median_ratio(times):.1f})"
            print(say(form, "evaluation", slow, fast, slow / fast), spread)
            print(say(form, "process", loading + slow, whole, (loading + slow) / whole), flush=True)
    raise SystemExit(int(wrong > 0))


if __name__ == "__main__":
    main(args)
