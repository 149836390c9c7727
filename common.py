"""What the scripts share: checkpoints, text to batches, MMLU, the paper's scores, a run's log and its memory foretold.

No method lives here: no loss, no optimizer, no default of a hyperparameter. Sections are those of *Toward Robust
Unlearning for LLMs* (Tamirisa et al., 2024). Everything random is a function of (seed, purpose, step) alone, so a step
does not depend on how many draws came before it.
"""

import csv
import hashlib
import json
import logging
import math
import os
import platform
import re
import resource
import shutil
import sys
import sysconfig
import time
import weakref
import zipfile
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, masking_utils
from transformers.utils import logging as hf_logging

FORGET = (
    "high_school_biology",
    "college_biology",
)  # the forget subjects; the retain set is every other one (A.1)
SUBJECTS = """abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology
college_chemistry college_computer_science college_mathematics college_medicine college_physics computer_security
conceptual_physics econometrics electrical_engineering elementary_mathematics formal_logic global_facts
high_school_biology high_school_chemistry high_school_computer_science high_school_european_history
high_school_geography high_school_government_and_politics high_school_macroeconomics high_school_mathematics
high_school_microeconomics high_school_physics high_school_psychology high_school_statistics high_school_us_history
high_school_world_history human_aging human_sexuality international_law jurisprudence logical_fallacies
machine_learning management marketing medical_genetics miscellaneous moral_disputes moral_scenarios nutrition
philosophy prehistory professional_accounting professional_law professional_medicine professional_psychology
public_relations security_studies sociology us_foreign_policy virology world_religions""".split()


def fail(message):
    """Ends the program with exit status 2 and one line on standard error: the fault and its remedy."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def hush():
    """Keeps the libraries' own warnings and retries off the screen: a fault is one line, and it is ours."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def never_packed():
    """Spares transformers its look, at every pass, for several texts packed in a row: it would wait for the device."""
    masking_utils.find_packed_sequence_indices = lambda position_ids: None


def seed_of(*key):
    """A 63-bit seed from a key such as (seed, purpose, step): the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def generator(device, *key):
    """A torch.Generator on `device`, seeded by `key`; None on meta, where nothing is drawn."""
    meta = torch.device(device).type == "meta"
    return None if meta else torch.Generator(device).manual_seed(seed_of(*key))


# ---- checkpoint directories ------------------------------------------------------------------------------------------


def load_model(name, dtype="auto", device="auto", flag="--model"):
    """A causal language model and its tokenizer from a checkpoint directory or the hub; one line if they are unfit.

    name    a directory that save_pretrained wrote (ours or anyone's), or a hub name
    dtype   "auto" is bfloat16 on a GPU and float32 on the CPU; or a torch dtype's name
    device  "auto" is the GPU if there is one; a model of over 2 G parameters then needs one
    flag    the flag that named it, for the message
    """
    hush()
    never_packed()
    local = Path(name).is_dir()
    if local and not (Path(name) / "config.json").exists():
        fail(f"{flag} {name}: no config.json, so no finished checkpoint; run the script that writes it (again)")
    if not local and (Path(name).exists() or name.count("/") != 1 or name[0] in "./~"):
        fail(f"{flag} {name}: no such directory; give a checkpoint directory or a hub name (owner/model)")
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if where.type == "cuda" and not torch.cuda.is_available():
        fail(f"--device {device}: no GPU is visible here; use --device cpu, or --tiny for the miniature")
    precision = {"auto": torch.float32 if where.type == "cpu" else torch.bfloat16}.get(dtype) or getattr(torch, dtype)
    try:
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > 2e9 and device == "auto" and where.type == "cpu":
            fail(
                f"{flag} {name}: {size / 1e9:.1f} G parameters want a GPU and none is here; use --tiny, or --device cpu"
            )
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=precision, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # transformers, safetensors and the hub raise some twenty kinds; one line for each
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        remedy = (
            "is the download complete? a checkpoint is config.json, model*.safetensors and the tokenizer's files"
            if local
            else "no such directory here; for a hub model accept its licence on its page and run `hf auth login`"
        )
        fail(f"{flag} {name}: cannot be loaded ({reason}); {remedy}")
    if info["missing_keys"]:
        fail(f"{flag} {name}: {len(info['missing_keys'])} weights are missing, such as {min(info['missing_keys'])}")
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        fail(
            f"{flag} {name}: its tokenizer has {len(tokenizer)} tokens, the model fewer; use the model's own tokenizer"
        )
    model.to(where)
    for key, p in model.named_parameters():
        if not torch.isfinite(p).all():
            fail(f"{flag} {name}: {key} holds NaN or infinity; take the checkpoint before it")
    return model.eval(), tokenizer


def decoder_layers(model):
    """The decoder layers, first to last: the one ModuleList as long as the config says the model is deep.

    Llama, Mistral, Qwen and Gemma call it model.layers, GPT-NeoX gpt_neox.layers. Their outputs are the residual
    stream; the last entry of `hidden_states` is not (it is taken after the final norm).
    """
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return module
    fail(f"{type(model).__name__}: no list of {depth} decoder layers found; Llama-like and GPT-NeoX models have one")


def read_args(ckpt):
    """args.json of a checkpoint directory, {} if it has none (a checkpoint that another program wrote)."""
    path = Path(ckpt) / "args.json"
    return json.loads(path.read_text()) if path.exists() else {}


class Run:
    """A run's directory: metrics.jsonl while it goes, weights and at the very end args.json when it is done.

    args   parsed arguments; args.out is the directory. A finished run (args.json) there ends the program.
    """

    def __init__(self, args):
        self.args, self.out, self.start = args, Path(args.out), time.time()
        if (self.out / "args.json").exists():
            fail(f"--out {self.out} holds a finished run; choose another --out, or delete that directory first")
        if self.out.exists() and not self.out.is_dir():
            fail(f"--out {self.out} is a file; choose a directory")
        if torch.cuda.is_available() and args.device != "cpu":
            header = Path(sysconfig.get_paths()["include"]) / "Python.h"
            if not header.exists() or not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
                fail("the update rule is compiled for the GPU and finds no C compiler or no Python.h; "
                     "install them (Debian: apt install gcc python3-dev)")  # fmt: skip

    def open(self, model, tokens):
        """Checks the disk, makes the directory, prints what runs where.  tokens: tokens a step, for the print."""
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        there = next(path for path in (self.out, *self.out.absolute().parents) if path.exists())
        if shutil.disk_usage(there).free < 1.05 * size:
            fail(
                f"--out {self.out}: the checkpoint takes {size / 1e9:.1f} GB and the disk has less; free some, or move"
            )
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            for stale in self.out.glob("mmlu*.json*"):  # of a run that was cut off
                stale.unlink()
            (self.out / "metrics.jsonl").write_text("")
        except OSError as error:
            fail(f"--out {self.out}: cannot be written ({error.strerror}); choose another directory")
        p = next(model.parameters())
        self.device, self.dtype, self.clock = p.device, str(p.dtype).removeprefix("torch."), {}
        self.idle = time.time()  # since when the next phase may have been running
        print(
            f"{self.device} | {self.dtype} | {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters | "
            f"{tokens} tokens a step | writes {self.out}",
            flush=True,
        )

    def log(self, step, steps, phase="step", **values):
        """Every --log-every steps, and at the last: one object in metrics.jsonl, one line on the screen.

        values  scalars or 0-d tensors; fetched from the device here and only here
        """
        first, start = self.clock.setdefault(phase, (step - 1, self.idle))
        self.idle = time.time()
        if step % self.args.log_every and step != steps:
            return
        values = {k: float(v) for k, v in values.items()}
        pace = (time.time() - start) / max(step - first, 1)
        self.write(phase=phase, step=step, **values)
        shown = " | ".join(f"{k} {v:.3f}" for k, v in values.items())
        eta = pace * (steps - step)
        eta = f"{eta / 60:.0f} min" if eta >= 90 else f"{eta:.0f} s"
        print(
            f"{phase} {step}/{steps} | {shown} | {pace:.2f} s/step | {peak_bytes() / 1e9:.1f} GB | eta {eta}",
            flush=True,
        )

    def write(self, **values):
        """Appends one object, with the seconds since the start, to metrics.jsonl."""
        with open(self.out / "metrics.jsonl", "a") as f:
            f.write(json.dumps({**values, "seconds": round(time.time() - self.start, 2)}) + "\n")

    def save(self, model, tokenizer, **facts):
        """Writes weights, tokenizer and last args.json, whose presence says that the run is whole.

        facts  parent, base, data ...: what later stages need to know (script, arguments, versions are added)
        """
        write_model(model, tokenizer, self.out)
        facts = {
            "script": Path(sys.argv[0]).name,
            "arguments": {k: v for k, v in vars(self.args).items()},
            **facts,
            "seed": self.args.seed,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else platform.machine() + " cpu",
            "dtype": self.dtype,
            "versions": {m: sys.modules[m].__version__ for m in ("torch", "transformers", "numpy") if m in sys.modules},
            "seconds": round(time.time() - self.start, 1),
            "peak_bytes": peak_bytes(),
        }
        write_json(self.out / "args.json", facts)

    def rescue(self, model, tokenizer, error):
        """After a loss that is no number: writes the last good weights beside the run and ends the program."""
        write_model(model, tokenizer, self.out / "last_good")
        fail(f"{error}; the weights before it are in {self.out / 'last_good'}; try a smaller --lr")


def write_model(model, tokenizer, folder):
    """save_pretrained of both: safetensors that transformers, vLLM and lm-evaluation-harness load."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_json(path, value):
    """Writes `value` whole or not at all."""
    draft = Path(path).with_suffix(".draft")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    draft.replace(path)


def peak_bytes():
    """Peak bytes so far: of GPU memory allocated if there is a GPU, else of this process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class LiveBytes(TorchDispatchMode):
    """Inside, counts the bytes of all tensors alive, on whatever device: `now` and, the most so far, `peak`.

    tensors  made before, that count as well
    """

    def __init__(self, tensors=()):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()
        for x in tensors:
            self.add(x)

    def add(self, x):
        storage = x.untyped_storage()  # counted once, however many tensors view it
        if (key := storage._cdata) not in self.known:
            self.known.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, storage.nbytes())

    def drop(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.add(x)
        return result


class Blank:
    """A Stream whose batches have a shape and no data: `size` texts of `length` tokens on the meta device."""

    def __init__(self, size, length):
        self.batch = torch.empty(size, length, dtype=torch.int64, device="meta")

    def __getitem__(self, i):
        return self.batch, self.batch.bool()


def dry_run(args, name, step, *, trained=lambda model: model.parameters(), copies, host=None, rest="activations"):
    """Prints what a run will hold, group by group, and whether it fits; ends the program (status 1: it does not).

    The model is made on the meta device from its config, all that is downloaded, and does one step there: the method's
    own code on tensors without data, whose lives are counted.

    name     the model's, a hub name or a directory with a config.json
    step     step(model): one step of the method, with Blank streams
    trained  trained(model): the parameters that learn
    copies   {group: how many bytes a byte of trained weights} held on the device beside the weights
    host     the same, held in host memory
    rest     what the remainder of the peak is
    """
    hush()
    never_packed()
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0][:160]
        fail(f"--dry-run {name}: no config ({reason}); run `hf auth login`, or give a folder with config.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    size = sum(p.numel() for p in model.parameters())
    gpu = args.device != "cpu" and (torch.cuda.is_available() or size > 2e9 or args.device != "auto")
    dtype = torch.bfloat16 if (gpu if args.dtype == "auto" else args.dtype == "bfloat16") else torch.float32
    model.to(dtype)
    if gpu:
        model.activation_checkpointing_enable({"use_reentrant": False})
    whole = size * dtype.itemsize
    sizes = [p.numel() * dtype.itemsize for p in trained(model)]
    groups = {"weights": whole} | {name: n * sum(sizes) for name, n in copies.items()}
    pinned = sum(1 << (n - 1).bit_length() for n in sizes)  # torch rounds pinned memory up to a power of two
    away = {name: n * (pinned if gpu else sum(sizes)) for name, n in (host or {}).items()}
    live = LiveBytes([*model.parameters(), *model.buffers()])
    with live:
        step(model)
    groups |= {rest: live.peak - sum(groups.values()), "peak": live.peak}
    print(f"{name} | {size / 1e6:.2f} M parameters | {str(dtype).removeprefix('torch.')}")
    for place, held in (("GPU" if gpu else "CPU", groups), ("host", away)):
        for name, n in held.items():
            print(f"{place:5}{name:50}{n / 1e9:9.3f} GB")
    need = {"host memory": sum(away.values()) + (0 if gpu else live.peak) + 1e9}  # and what torch and CUDA take
    need |= {"the GPU": live.peak + 1.5e9} if gpu else {}
    have = {"host memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}
    if gpu and torch.cuda.is_available():
        have["the GPU"] = torch.cuda.get_device_properties(0).total_memory
    elif gpu:
        have = {}  # it is to run elsewhere
    for name, n in need.items():
        here = f" of {have[name] / 1e9:.0f}: {'it fits' if n <= have[name] else 'it does not fit'}" if have else ""
        print(f"{name}: takes {math.ceil(n / 1e9)} GB{here}")
    if gpu and not have:
        print("no GPU here to compare with")
    raise SystemExit(int(any(n > have.get(name, n) for name, n in need.items())))


# ---- text ------------------------------------------------------------------------------------------------------------


def read_rows(source, flag, columns, config=None, split="train", streaming=False):
    """Rows of a hub dataset, or of a local file or folder of jsonl, jsonl.zst or parquet (or else of json).

    columns    that must be there
    config     of the hub dataset, or of a local folder in the hub's layout (parquet files under CONFIG/SPLIT-*)
    streaming  rows come one after the other in constant memory, as dicts; else a datasets.Dataset
    """
    import datasets

    hush()
    datasets.disable_progress_bars()
    path = Path(source)
    try:
        if path.exists():
            files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file()]
            if config:
                files = [p for p in files if p.match(f"{config}/{split}-*")]
            names = [str(p) for p in files]
            files = [n for n in names if re.search(r"\.(jsonl|jsonl\.zst|parquet)$", n)]
            files = files or [n for n in names if n.endswith(".json")]
            if not files:
                fail(f"{flag} {source}: no .jsonl, .jsonl.zst, .json or .parquet file there")
            kind = "parquet" if files[0].endswith(".parquet") else "json"
            small = {"chunksize": 1 << 20} if streaming and kind == "json" else {}  # bytes parsed at a time
            rows = datasets.load_dataset(kind, data_files=files, split="train", streaming=streaming, **small)
        elif path.suffix in (".jsonl", ".json", ".zst", ".parquet", ".zip") or source[0] in "./~":
            fail(f"{flag} {source}: no such file or folder")
        else:
            rows = datasets.load_dataset(source, config, split=split, streaming=streaming)
        found = rows.column_names or next(iter(rows), {}).keys()
    except Exception as error:  # pyarrow's, the hub's and datasets' own; SystemExit from fail passes through
        reason = (str(error).strip() or repr(error)).splitlines()[0][:160]
        remedy = "mend the file" if path.exists() else "check the name and the network, or give a local file or folder"
        fail(f"{flag} {source}: cannot be read ({reason}); {remedy}")
    if missing := [c for c in columns if c not in found]:
        fail(f"{flag} {source}: no column {', '.join(missing)}; it has {', '.join(found) or 'no rows'}")
    return rows


def load_chunks(source):
    """Forget and retain text from labelled chunks (A.1): rows `txt_chunk` (str), `label` (bool, true: forget).

    A "<s>" or "</s>" written out at a chunk's ends goes, by removeprefix and removesuffix: strip would eat letters.
    Returns (forget, retain), two lists of str.
    """
    rows = read_rows(source, "--data", ("txt_chunk", "label"))
    sides = {True: [], False: []}
    for i, (text, label) in enumerate(zip(rows["txt_chunk"], rows["label"])):
        if not isinstance(label, bool):
            fail(f"--data {source}: row {i}: label is {label!r}, not true or false; label it, or drop the row")
        text = text.removeprefix("<s>").removesuffix("</s>").strip() if isinstance(text, str) else ""
        if not text:
            fail(f"--data {source}: row {i}: txt_chunk is empty; drop the row")
        sides[label].append(text)
    for label, what in ((True, "forget"), (False, "retain")):
        if not sides[label]:
            fail(f"--data {source}: no row has label {str(label).lower()}, so the {what} set is empty; label some")
    return sides[True], sides[False]


def load_pairs(source):
    """The recovery set (A.1): CAMEL's question-answer pairs as texts "message_1, blank line, message_2".

    source  camel-ai/biology on the hub (a flat zip of one-object JSON files), such a zip, a folder of json, or jsonl
    """
    path = Path(source)
    if not path.exists() and source.count("/") == 1 and not path.suffix:
        hush()
        try:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(source, source.split("/")[1] + ".zip", repo_type="dataset"))
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:160]
            fail(f"--recovery {source}: not to be had from the hub ({reason}); give a local zip, folder or jsonl")
    if path.suffix == ".zip" and path.exists():
        try:
            with zipfile.ZipFile(path) as z:
                rows = [json.loads(z.read(name)) for name in sorted(z.namelist()) if name.endswith(".json")]
        except (zipfile.BadZipFile, ValueError) as error:
            fail(f"--recovery {source}: a broken zip or JSON ({error}); download it again")
    else:
        rows = read_rows(source, "--recovery", ("message_1", "message_2"))
    texts = []
    for i, row in enumerate(rows):
        if not (row.get("message_1") and row.get("message_2")):
            fail(f"--recovery {source}: pair {i} lacks message_1 or message_2; drop it")
        texts.append(f"{row['message_1']}\n\n{row['message_2']}")
    return texts or fail(f"--recovery {source}: no pairs in it")


def bos(tokenizer):
    """[the BOS id] if this tokenizer begins a text with one, else []."""
    return tokenizer("a").input_ids[:1] if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else []


class Stream:
    """Batches of a text set: stream[i] is step i's, a function of (seed, purpose, i).

    A text is tokenised when its turn comes. As no step waits for the device, that is while it is at the step before.

    texts   list of str; every epoch takes them in a fresh order and drops the incomplete batch at its end, so that no
            text stands twice in one batch
    size    B, texts a batch
    length  T, tokens a text at most, BOS among them; longer texts are cut
    """

    def __init__(self, texts, tokenizer, *, size, length, seed, purpose, device):
        if len(texts) < size:
            fail(f"the {purpose} set has {len(texts)} texts and one step takes {size}; lower --batch (or --K)")
        self.texts, self.tokenizer, self.size, self.length = texts, tokenizer, size, length
        self.key, self.device, self.cache = (seed, "order", purpose), device, {}

    def encode(self, j):
        """Token ids of text j, BOS first where the tokenizer has one."""
        if j not in self.cache:
            ids = self.tokenizer(self.texts[j], add_special_tokens=False).input_ids
            self.cache[j] = torch.tensor((bos(self.tokenizer) + ids)[: self.length])
        return self.cache[j]

    def __getitem__(self, i):
        """ids (B, T) int64, right-padded with 0, and mask (B, T) bool, true on tokens. i counts from 0."""
        epoch, place = divmod(i, len(self.texts) // self.size)
        if getattr(self, "epoch", None) != epoch:
            self.order = torch.randperm(len(self.texts), generator=generator("cpu", *self.key, epoch)).tolist()
            self.epoch = epoch
        rows = [self.encode(j) for j in self.order[place * self.size : (place + 1) * self.size]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
        pinned = torch.device(self.device).type == "cuda"  # from other memory a copy waits for the device
        return tuple((x.pin_memory() if pinned else x).to(self.device, non_blocking=True) for x in (ids, mask))


# ---- MMLU (A.1) ------------------------------------------------------------------------------------------------------


def read_questions(path):
    """[(question, [four choices], answer 0..3)] of one headerless CSV; csv, since pandas reads "None" as missing."""
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows = list(csv.reader(f))
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--mmlu {path}: cannot be read ({error}); the folder needs dev/SUBJECT_dev.csv and test/SUBJECT_test.csv")
    for i, row in enumerate(rows):
        if len(row) != 6 or row[5] not in ("A", "B", "C", "D"):
            fail(f"--mmlu {path}: row {i}: expected question, four choices and a letter A to D, got {row[-1:]}")
    return [(row[0], row[1:5], "ABCD".index(row[5])) for row in rows]


def load_mmlu(source, split="test", subjects=None):
    """MMLU as {subject: (five dev questions, the split's questions)}, a question being (text, choices, answer 0..3).

    source    cais/mmlu on the hub, a folder in its layout (all/*.parquet), or of the original CSVs: dev/, test/, val/
    split     "test" or "validation"
    subjects  names to load; None: every subject of the folder (57 in the real one, fewer is said), each with both parts
    """
    mmlu = {}
    if Path(source).is_dir() and not any(Path(source).glob("all/*.parquet")):
        short = {"validation": "val"}.get(split, split)
        found = {
            f.name[: -len(f"_{kind}.csv")] for kind in ("dev", short) for f in Path(source).glob(f"{kind}/*_{kind}.csv")
        }
        for name in subjects or sorted(found | set(FORGET)):
            files = [Path(source) / kind / f"{name}_{kind}.csv" for kind in ("dev", short)]
            if lacking := [str(f) for f in files if not f.exists()]:
                fail(f"--mmlu {source}: {lacking[0]} is missing; complete it (--subjects scores a part)")
            mmlu[name] = tuple(read_questions(f) for f in files)
    else:
        for place, part in enumerate(("dev", split)):
            for row in read_rows(source, "--mmlu", ("question", "subject", "choices", "answer"), "all", part):
                mmlu.setdefault(row["subject"], ([], []))[place].append(
                    (row["question"], row["choices"], row["answer"])
                )
        names = subjects or SUBJECTS
        if lacking := [name for name in names if not all(mmlu.get(name, ((),)))]:
            fail(f"--mmlu {source}: no questions of {lacking[0]}; use the whole set (--subjects scores a part)")
        mmlu = {name: mmlu[name] for name in names}
    for name, (shots, _) in mmlu.items():
        if len(shots) < 5:
            fail(f"--mmlu {source}: {name} has {len(shots)} dev questions and five shots need five; complete it")
    if len(mmlu) < len(SUBJECTS):
        print(f"MMLU: {len(mmlu)} of the {len(SUBJECTS)} subjects ({source})", flush=True)
    return {name: (shots[:5], questions) for name, (shots, questions) in mmlu.items()}


def prompt(subject, shots, question, form):
    """The few-shot prompt of one question, up to "Answer:", and its four continuations.

    letter  options are listed, continuations are " A" to " D" (the standard protocol, A.1)
    cloze   no list; continuations are the options' texts (lm-evaluation-harness: mmlu_continuation)
    """

    def ask(q, choices):
        if form == "cloze":
            return f"Question: {q.strip()}\nAnswer:"
        return q.strip() + "".join(f"\n{letter}. {c}" for letter, c in zip("ABCD", choices)) + "\nAnswer:"

    what = "multiple choice questions" if form == "letter" else "questions"
    text = f"The following are {what} (with answers) about {subject.replace('_', ' ')}.\n\n"
    for q, choices, answer in shots:
        text += f"{ask(q, choices)} {'ABCD'[answer] if form == 'letter' else choices[answer]}\n\n"
    ends = [" A", " B", " C", " D"] if form == "letter" else [f" {c}" for c in question[1]]
    return text + ask(*question[:2]), ends


def plan(tokenizer, subject, shots, questions, form):
    """The forward passes that score one subject: rows (question, options, ids, start, targets).

    A row's hidden states from position `start` on predict targets (n, options): n = 1 and all four options where
    every option is one token (letters), else n tokens of one option. A continuation's ids are those of prompt +
    continuation with the prompt's cut off: Llama-2 makes two tokens of " A" alone.
    """
    rows, head = [], bos(tokenizer)
    texts = [prompt(subject, shots, q, form) for q in questions]
    prompts = tokenizer([t for t, _ in texts], add_special_tokens=False).input_ids
    longer = tokenizer([t + e for t, ends in texts for e in ends], add_special_tokens=False).input_ids
    tails = [whole[len(prompts[i // 4]) :] for i, whole in enumerate(longer)]
    if not all(tails):
        fail(f"the tokenizer joins an answer of {subject} to its prompt; it cannot be scored with this tokenizer")
    single = all(len(t) == 1 for t in tails)
    for j, ids in enumerate(prompts):
        start, mine = len(head + ids) - 1, tails[4 * j : 4 * j + 4]
        if single:
            rows.append((j, [0, 1, 2, 3], head + ids, start, [[t[0] for t in mine]]))
        else:
            rows += [(j, [o], head + ids + t[:-1], start, [[i] for i in t]) for o, t in enumerate(mine)]
    return rows


def soft_cap(model, x):
    """Logits as the model caps them, where it does (Gemma 2)."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    return cap * torch.tanh(x / cap) if cap else x


def logits(model, hidden):
    """Next-token logits (n, V), float32, from last hidden states (n, D): the model's own, for some positions only."""
    return soft_cap(model, model.get_output_embeddings()(hidden).float())


def log_probs(model, hidden, targets):
    """log p (n, c) of targets (n, c) from last hidden states (n, D); the head's rows in float32, as bf16 logits tie."""
    head = model.get_output_embeddings()
    found = (head.weight[targets].float() @ hidden.float()[:, :, None]).squeeze(-1)  # (n, c)
    if head.bias is not None:
        found = found + head.bias[targets].float()
    return soft_cap(model, found) - logits(model, hidden).logsumexp(-1, keepdim=True)


def run_rows(model, rows, budget):
    """Scores the rows of one subject; yields (question, options, their log-probabilities).

    The longest token prefix that all prompts share (description and shots) is computed once; suffixes follow in
    right-padded batches of at most `budget` tokens, prefix counted, on copies of its cache. The mask is causal and one
    for all rows: pads come after all that is read. Where layers differ (sliding windows) the model makes its own.
    """
    device, windows = model.device, getattr(model.config.get_text_config(), "sliding_window", None)
    contexts = [ids[: start + 1] for _, _, ids, start, _ in rows]
    P = min(len(os.path.commonprefix(contexts)), min(map(len, contexts)) - 1)
    cache = DynamicCache()
    if P:
        model.base_model(torch.tensor([contexts[0][:P]], device=device), past_key_values=cache, use_cache=True)
    past = [(layer.keys, layer.values) for layer in cache.layers]
    rows = sorted(rows, key=lambda row: len(row[2]))
    while rows:
        B = max(b for b in range(1, len(rows) + 1) if b == 1 or b * len(rows[b - 1][2]) <= budget)
        batch, rows = rows[:B], rows[B:]
        ids = [torch.tensor(row[2][P:]) for row in batch]
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
        copy = DynamicCache([(k.expand(B, -1, -1, -1), v.expand(B, -1, -1, -1)) for k, v in past])
        T, mask = ids.shape[1], None
        if not windows:
            mask = torch.full((1, 1, T, P + T), -torch.inf, dtype=model.dtype, device=device).triu(P + 1)
        hidden = model.base_model(ids, past_key_values=copy, attention_mask=mask, use_cache=True).last_hidden_state
        where = [(b, row[3] - P + n) for b, row in enumerate(batch) for n in range(len(row[4]))]
        b, t = torch.tensor(where, device=device).T
        targets = torch.tensor([line for row in batch for line in row[4]], device=device)
        scores, at = log_probs(model, hidden[b, t], targets).cpu(), 0
        for j, options, _, _, lines in batch:
            yield j, options, scores[at : at + len(lines)].sum(0).tolist()
            at += len(lines)


@torch.inference_mode()
def score_mmlu(model, tokenizer, mmlu, form="letter", budget=None):
    """Scores a model on MMLU, five shots (A.1). The result does not depend on batch, order or cache.

    mmlu      {subject: (shots, questions)} from load_mmlu
    form      "letter": log-probabilities of A to D; "cloze": of the options' texts, compared by byte
    budget    tokens in flight, prefix counted; None: 32768 on a GPU, 2048 on the CPU
    Returns (summary, answers): mmlu.json's object, accuracies in 0..1, and mmlu.jsonl's, one object a question.
    """
    was_training = model.training
    model.eval()
    answers, budget = [], budget or (32768 if model.device.type == "cuda" else 2048)
    with tqdm(
        total=sum(len(q) for _, q in mmlu.values()), desc=f"MMLU {form}", unit="q", leave=False, disable=None
    ) as bar:
        for subject, (shots, questions) in mmlu.items():
            found = [[0.0] * 4 for _ in questions]
            for j, options, scores in run_rows(model, plan(tokenizer, subject, shots, questions, form), budget):
                for option, score in zip(options, scores):
                    found[j][option] = score
                bar.update(len(options) / 4)
            for j, (logprobs, (_, choices, answer)) in enumerate(zip(found, questions)):
                size = [1] * 4 if form == "letter" else [max(len(c.encode()), 1) for c in choices]
                best = max(range(4), key=lambda o: logprobs[o] / size[o])
                answers.append({"subject": subject, "index": j, "logprobs": [round(x, 6) for x in logprobs]})
                answers[-1] |= {"prediction": "ABCD"[best], "answer": "ABCD"[answer]}
    model.train(was_training)
    return summarise(answers) | {"protocol": protocol(mmlu, form)}, answers


def protocol(mmlu, form):
    """What a score was measured with; two scores compare only if theirs are equal. `questions` is a digest of them."""
    return {"format": form, "shots": 5, "questions": f"{seed_of(mmlu):016x}"}


def summarise(answers):
    """mmlu.json's accuracies from answers: macro (the mean of subjects, the paper's) and micro, forget and retain.

    Standard errors are of the sampling of questions: sqrt(p (1 - p) / (n - 1)) a subject, summed in quadrature.
    """
    subjects = {}
    for a in answers:
        subjects.setdefault(a["subject"], []).append(a["prediction"] == a["answer"])
    result = {}
    for side in ("forget", "retain"):
        hits = [h for name, h in subjects.items() if (name in FORGET) == (side == "forget")]
        flat = [x for h in hits for x in h]
        parts = [(sum(h) / len(h), len(h)) for h in hits]
        spread = sum(p * (1 - p) / max(n - 1, 1) for p, n in parts)
        micro = sum(flat) / len(flat) if flat else None
        result[side] = {
            "acc": sum(p for p, _ in parts) / len(parts) if parts else None,
            "se": math.sqrt(spread) / len(parts) if parts else None,
            "n": len(flat),
            "micro": micro,
            "micro_se": math.sqrt(micro * (1 - micro) / max(len(flat) - 1, 1)) if flat else None,
        }
    result["subjects"] = {name: {"acc": sum(h) / len(h), "n": len(h)} for name, h in subjects.items()}
    letters = Counter(a["prediction"] for a in answers)
    result["letters"] = {x: letters[x] / max(len(answers), 1) for x in "ABCD"}
    return result


def scores_name(form):
    """File stem of a format's scores: mmlu for letters, mmlu_cloze for cloze; both may stand in one directory."""
    return "mmlu" if form == "letter" else f"mmlu_{form}"


def scores_dir(name):
    """Where a model's scores are kept: its checkpoint directory, or out/OWNER--MODEL for a name on the hub."""
    return Path(name) if Path(name).is_dir() else Path("out") / name.replace("/", "--")


def kept_scores(name, mmlu, form):
    """The summary kept for a model if it was measured with these questions in this format, else None."""
    path = scores_dir(name) / (scores_name(form) + ".json")
    summary = json.loads(path.read_text()) if path.exists() else {}
    return summary if summary.get("protocol") == protocol(mmlu, form) else None


def write_scores(folder, summary, answers):
    """Writes mmlu.json and mmlu.jsonl (or mmlu_cloze.*) into a checkpoint directory."""
    stem = Path(folder) / scores_name(summary["protocol"]["format"])
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    write_json(stem.with_suffix(".json"), summary)


def show_scores(summary):
    """One line: forget and retain accuracy in percent with standard errors, and the histogram of predictions."""
    parts = []
    for side in ("forget", "retain"):
        s = summary[side]
        parts.append(f"{side} {100 * s['acc']:.1f} ± {100 * s['se']:.1f} (n {s['n']})" if s["n"] else f"{side} -")
    letters = " ".join(f"{x} {100 * share:.0f}" for x, share in summary["letters"].items())
    return " | ".join(parts) + f" | predicted % {letters}"


def paper_scores(init, theta, recovered):
    """The paper's row of Table 1 (3.2), in percent, with standard errors.

    init, theta, recovered  {"forget": {"acc", "se"}, "retain": {...}} in 0..1 of θ_init (the base model), θ, θ'
    Score_U = (F_init - F) + (R - R_init);  Score_R = F_init - F';  Composite = (Score_U + Score_R) / 2.
    Errors add in quadrature as if accuracies were independent; they share their questions, so this overstates them.
    """
    (F0, f0), (R0, r0), (F, f), (R, r), (F2, f2), (R2, r2) = (
        (100 * s[side]["acc"], 100 * s[side]["se"]) for s in (init, theta, recovered) for side in ("forget", "retain")
    )
    score_u, score_r = (F0 - F) + (R - R0), F0 - F2
    row = {
        "forget": (F, f),
        "retain": (R, r),
        "score_u": (score_u, math.hypot(f0, f, r, r0)),
        "forget_recovered": (F2, f2),
        "retain_recovered": (R2, r2),
        "score_r": (score_r, math.hypot(f0, f2)),
        "composite": ((score_u + score_r) / 2, math.hypot(2 * f0, f, r, r0, f2) / 2),
    }
    return {k: x for name, (value, se) in row.items() for k, x in ((name, value), (name + "_se", se))}
