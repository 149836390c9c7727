"""Table 1 on a real pretrained model, from public files:

    python tests/real/rows.py --model DIR --mmlu DIR --pile FILE .. --camel ZIP      -> out/real, resumable

--model  a checkpoint directory; ours is Qwen2.5-Coder-1.5B-Instruct (Apache 2.0, on the hub)
--mmlu   the original CSVs of Hendrycks et al. (MIT): dev, val, test
--pile   jsonl or jsonl.zst with `text` and `meta.pile_set_name`; PubMed and NIH texts are to forget
--camel  question-answer pairs in the layout of camel-ai/biology's zip

Made of them, in OUT/data: chunks.jsonl, pieces of at most 1,200 characters; mmlu/, dev and of test every n-th
biology question (--every) and so many of each other subject (--others); recovery.jsonl, the pairs, and
questions of biological subjects of MMLU's validation split, which are never scored, eight times each.

The README's rows: --every 2 --others 30 --only random_mapping rmat.
The steps are few, for two CPU cores and 24 GB (with 12 GB of swap); --full: the scripts' defaults, for a GPU.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import common
import recover

BIOLOGY = ("PubMed Abstracts", "PubMed Central", "NIH ExPorter")
NEAR = (
    "high_school_biology", "college_biology", "anatomy", "clinical_knowledge", "college_medicine",
    "medical_genetics", "nutrition", "virology",
)  # fmt: skip
FEW = "--batch 8 --tokens 128"
ROWS = {  # directory: script and flags, the flags of few steps, the directory that it starts from
    "random_mapping": ("random_mapping.py", f"--lr 4e-5 --steps 36 --warmup 4 {FEW}", None),
    "rmat": ("rmat.py --lr 2e-5 --K 4 --rm-steps 0", f"--N 4 {FEW} --batch 4", "random_mapping"),
    "overwriting": ("baselines.py --method overwriting", f"--steps 40 --rounds 2 {FEW}", None),
    "min_posterior": ("baselines.py --method min_posterior", f"--steps 40 {FEW}", None),
    "rmu": ("baselines.py --method rmu", f"--steps 40 {FEW}", None),
}
ATTACK = f"--steps 16 {FEW}"
SWEEP = "--sweep --only paper mix_3x sgd_mix"


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def questions(folder, split, subject):
    return [*csv.reader(open(Path(folder, split, f"{subject}_{split}.csv"), newline=""))]


def as_text(question, *options, letter):
    """A question with its options, and the answer, in the form of the attack's pairs."""
    listed = "".join(f"\n{x}. {option}" for x, option in zip("ABCD", options))
    answer = f"{letter}. {options['ABCD'.index(letter)]}"
    return recover.FORMS["message_1"]({"message_1": question + listed, "message_2": answer})


def prepare(args, data):
    """OUT/data, see above."""
    chunks = []
    for row in (row for file in args.pile for row in common.read_table(file, "--pile")):
        pieces = [row["text"][k : k + 1200].strip() for k in (0, 1200)]  # of a document at most two
        label = row["meta"]["pile_set_name"] in BIOLOGY
        chunks += [{"txt_chunk": piece, "label": label} for piece in pieces if len(piece) > 300]
    write(data / "chunks.jsonl", chunks)
    for file in Path(args.mmlu, "test").glob("*.csv"):
        subject = file.name.removesuffix("_test.csv")
        scored = questions(args.mmlu, "test", subject)
        scored = scored[:: args.every] if "biology" in subject else scored[: args.others]
        for split, rows in ("dev", questions(args.mmlu, "dev", subject)), ("test", scored):
            (data / "mmlu" / split).mkdir(parents=True, exist_ok=True)
            with open(data / "mmlu" / split / f"{subject}_{split}.csv", "w", newline="") as f:
                csv.writer(f).writerows(rows)
    texts = recover.load_texts(args.camel)
    for *question, letter in (q for subject in NEAR for q in questions(args.mmlu, "val", subject)):
        texts += 8 * [as_text(*question, letter=letter)]
    write(data / "recovery.jsonl", [{"text": text} for text in texts])


def main(args):
    out, data = Path(args.out), Path(args.out) / "data"
    if not (data / "recovery.jsonl").exists():
        prepare(args, data)
    corpus = ["--data", data / "chunks.jsonl", "--dtype", args.dtype]
    attack = ["--base", args.model, "--recovery", data / "recovery.jsonl", *corpus, "--mmlu", data / "mmlu"]
    attack += [] if args.full else ATTACK.split()

    def run(name, script, *flags):
        """A script, unless its log ends in "done"; it continues where it was cut off."""
        log = out / f"{name}.log"
        if not log.exists() or not log.read_text().endswith("done\n"):
            print(script, *flags, f"> {log}", flush=True)
            with open(log, "a") as f:
                command = [sys.executable, ROOT / script, *map(str, flags)]
                subprocess.run(command, stdout=f, stderr=f, check=True)
                f.write("done\n")

    run("base", "evaluate_mmlu.py", "--ckpt", args.model, "--mmlu", data / "mmlu", "--dtype", args.dtype)
    for name in args.only or ROWS:
        (script, *flags), few, start = ROWS[name][0].split(), ROWS[name][1].split(), ROWS[name][2]
        flags += ["--model", out / start if start else args.model, *corpus, *(() if args.full else few)]
        run(name, script, *flags, "--out", out / name)
        run(f"{name}_recovered", "recover.py", "--ckpt", out / name, *attack)
        if args.sweep:
            run(f"{name}_swept", "recover.py", "--ckpt", out / name, *attack, *SWEEP.split())
    subprocess.run([sys.executable, ROOT / "evaluate_mmlu.py", "--table", out], check=True)


if __name__ == "__main__":
    form = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--model", "--mmlu", "--camel"):
        form.add_argument(flag, required=True)
    form.add_argument("--pile", required=True, nargs="+")
    form.add_argument("--out", default="out/real")
    form.add_argument("--every", type=int, default=1, help="of the biology questions (default: all)")
    form.add_argument("--others", type=int, default=40, help="questions of each other subject (default: 40)")
    form.add_argument("--only", nargs="+", choices=[*ROWS], help="rows (default: all)")
    form.add_argument("--dtype", default="bfloat16")
    form.add_argument("--full", action="store_true", help="the scripts' own steps and batches")
    form.add_argument("--sweep", action="store_true", help="attack with mix_3x and sgd_mix as well")
    main(form.parse_args())
