"""evaluate_mmlu.py against lm-evaluation-harness: the same answer to every question.

    pip install "lm_eval[hf]"
    python tests/bench_mmlu.py --mmlu DIR --split validation      # DIR: MMLU's original CSVs, dev/ val/ test/

Takes a random-weight Llama of 3 M parameters and a byte-level tokenizer trained on the CSVs (or --ckpt), and
asks both programs the same questions: lm-evaluation-harness's tasks `mmlu` and `mmlu_continuation` with their
own templates, five shots, read from local files. Answers may differ only where the best two options are
within 1e-3 (of log-probability; per character for cloze). Exit status 1 if others differ.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import lm_eval
import yaml
from conftest import bpe, toy_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from common import load_model
from evaluate_mmlu import load_mmlu, score_mmlu


def make_model(folder, mmlu):
    """A random Llama whose letters' log-probabilities differ from question to question."""
    texts = [q + " " + " ".join(c) for shots, asked in mmlu.values() for q, c, _ in shots + asked]
    tokenizer = bpe(texts, size=3000)
    sizes = dict(hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
    more = dict(max_position_embeddings=8192, num_key_value_heads=4, initializer_range=0.12)
    for part in (toy_model(vocab=len(tokenizer), **sizes, **more), tokenizer):
        part.save_pretrained(folder)
    return folder


def harness_tasks(mmlu, form, folder):
    """lm-evaluation-harness's own task of each subject, its data set replaced by local files."""
    kind, end = ("default", "") if form == "letter" else ("continuation", "_continuation")
    tasks = {}
    for subject, parts in mmlu.items():
        home, files = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / kind, {}
        template = yaml.safe_load((home / f"_{kind}_template_yaml").read_text())
        for name, rows in zip(("dev", "test"), parts):
            files[name] = f"{folder}/{form}_{subject}_{name}.jsonl"
            lines = [{"question": q, "subject": subject, "choices": c, "answer": a} for q, c, a in rows]
            Path(files[name]).write_text("".join(json.dumps(x) + "\n" for x in lines))
        about = yaml.safe_load((home / f"mmlu_{subject}.yaml").read_text())["description"]
        data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        more = {"task": f"mmlu_{subject}{end}", "description": about, "num_fewshot": 5}
        tasks[subject] = ConfigurableTask(config=template | data | more)
    return tasks


def ask_harness(lm, tasks):
    """{(subject, index): four log-probabilities} by lm-evaluation-harness."""
    asked = {task.config.task: task for task in tasks.values()}
    samples = lm_eval.evaluate(lm=lm, task_dict=asked, bootstrap_iters=0)["samples"]
    lines = [(subject, x) for subject, task in tasks.items() for x in samples[task.config.task]]
    return {(subject, x["doc_id"]): [float(r[0]) for r in x["filtered_resps"]] for subject, x in lines}


def compare(theirs, ours, mmlu, form):
    """Prints agreement; returns how many answers differ without a tie."""
    ties, wrong, off = 0, [], 0
    for (subject, i), line in theirs.items():
        logprobs, prediction = ours[subject, i]
        size = [1 if form == "letter" else len(c) for c in mmlu[subject][1][i][1]]
        scores = [x / n for x, n in zip(line, size)]
        gap = max(scores) - scores["ABCD".index(prediction)]  # 0: they answer the same
        ties, wrong = ties + (0 < gap < 1e-3), wrong + [f"{subject} {i}"] * (gap >= 1e-3)
        off = max(off, *(abs(x - y) for x, y in zip(logprobs, line)))
    agree = f"{len(theirs)} questions, {ties} ties, {len(wrong)} differ ({', '.join(wrong) or '-'})"
    print(f"{form}: {agree}; log-probabilities differ by at most {off:.1e}", flush=True)
    return len(wrong)


def main(args):
    wrong, mmlu = 0, load_mmlu(args.mmlu, args.split)
    with tempfile.TemporaryDirectory() as folder:
        ckpt = str(args.ckpt or make_model(folder, mmlu))
        model, tokenizer = load_model(ckpt, "float32")
        how = {"batch_size": args.batch, "dtype": "float32", "max_length": 8192}
        lm = HFLM(pretrained=ckpt, device=model.device.type, **how)
        for form in args.format:
            answers = score_mmlu(model, tokenizer, mmlu, form)[1]
            ours = {(a["subject"], a["index"]): (a["logprobs"], a["prediction"]) for a in answers}
            wrong += compare(ask_harness(lm, harness_tasks(mmlu, form, folder)), ours, mmlu, form)
    return int(wrong > 0)


if __name__ == "__main__":
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=form)
    add = parser.add_argument
    add("--mmlu", required=True, help="folder of MMLU's CSVs: dev/, val/, test/")
    add("--split", default="validation", choices=("test", "validation"), help="questions to ask")
    add("--format", nargs="+", default=["letter", "cloze"], help="what to compare")
    add("--ckpt", default=None, help="checkpoint directory to ask; None: the random model")
    add("--batch", type=int, default=8, help="lm-evaluation-harness's; on a CPU 1 is its fastest")
    sys.exit(main(parser.parse_args()))
