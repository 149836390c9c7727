"""Table 1 on a real pretrained model, from public files:

    python tests/real/rows.py --model DIR --mmlu DIR --pile FILE .. --camel ZIP      -> out/real, resumable

--model  a checkpoint directory; ours is Qwen2.5-Coder-1.5B-Instruct (Apache 2.0, on the hub)
--mmlu   the original CSVs of Hendrycks et al. (MIT): dev, val, test
--pile   jsonl or jsonl.zst with `text` and `meta.pile_set_name`; PubMed and NIH texts are to forget
--camel  question-answer pairs in the layout of camel-ai/biology's zip

Made of them, in OUT/data: chunks.jsonl, pieces of at most 1,200 characters; mmlu/, dev and of test every n-th
biology question (--every) and --others of each other subject that is there (for the README: ten);
recovery.jsonl, the pairs, and questions of biological subjects of MMLU's validation split, which are never
scored, eight times each.

Each row is a method, and a sweep of --attackers against it. The steps are a GPU's: with `paper` alone all
rows took ten minutes of an H100, two or three at a time; --few: for two CPU cores and 24 GB (with 12 GB of
swap), an hour for each of random_mapping and rmat.
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
FEW, BASELINE = "--batch 8 --tokens 128", "baselines.py --method"
ROWS = {  # directory: script and flags, on a GPU, with --few, the directory that it starts from
    "base": ("", "", "", None),
    "random_mapping": ("random_mapping.py", "--steps 36", f"--steps 36 {FEW}", None),
    "rmat": ("rmat.py --lr 2e-5 --K 4 --rm-steps 0", "--N 20", f"--N 4 {FEW} --batch 4", "random_mapping"),
    "overwriting": (f"{BASELINE} overwriting --lr 4e-5", "--steps 240", f"--steps 40 --rounds 2 {FEW}", None),
    "min_posterior": (f"{BASELINE} min_posterior --lr 2e-5", "--steps 100", f"--steps 40 {FEW}", None),
    "rmu": (f"{BASELINE} rmu --lr 5e-5 --steer 100", "--steps 150", f"--steps 40 {FEW}", None),
}
ATTACK, ATTACK_FEW = "--steps 100 --batch 8 --eval-every 1000", f"--steps 16 {FEW}"


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
    corpus += [] if args.few else ["--save-every", 0]  # a GPU trains for less than that
    attack = ["--base", args.model, "--recovery", data / "recovery.jsonl", *corpus, "--mmlu", data / "mmlu"]
    attack += ["--sweep", "--only", *args.attackers, *(ATTACK_FEW if args.few else ATTACK).split()]

    def run(name, script, *flags):
        print(script, *flags, f"> {out / name}.log", flush=True)
        with open(out / f"{name}.log", "a") as f:
            subprocess.run([sys.executable, ROOT / script, *map(str, flags)], stdout=f, stderr=f, check=True)

    for name in args.only or ROWS:
        method, many, few, start = ROWS[name]
        script, *flags = f"{method} {few if args.few else many}".split() or [""]
        if script and not (out / name / "args.json").exists():
            flags += ["--model", out / start if start else args.model, *corpus, "--out", out / name]
            run(name, script, *flags)
        ckpt = ["--ckpt", out / name] if script else ["--ckpt", args.model, "--out", out / name]
        run(f"{name}_attacked", "recover.py", *ckpt, *attack)  # runs what is not finished
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
    form.add_argument("--few", action="store_true", help="few steps of small batches, for a CPU")
    form.add_argument("--attackers", nargs="+", default=["paper", "mix_3x", "sgd_mix"], help="of recover.py")
    main(form.parse_args())
