"""What PyTorch and Hugging Face would give if they had it, shared by all scripts. In sections:

    runs and checkpoints   load_model, write_json, Run (directory, log, dry run)
    data                   read_rows, load_chunks, Stream
    loss and streams       next_token_loss, token_mean, residual_streams
    optimizer for bf16     AdamW and SGD (step, in_backward), HostCopy, check_finite
    log-probabilities      log_probs, score_rows

No method is here: no loss of one, no hyperparameter, no flag. 3.2, A.1 and so on are sections of *Toward
Robust Unlearning for LLMs* (Tamirisa et al., 2024). Everything random is a function of (seed, purpose,
step), not of earlier draws.
"""

import codecs
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
from collections import defaultdict
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

# Pinned blocks above 16 MB get their exact size, not the next power of two. Torch reads this at first use.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "pinned_max_cached_size_mb:16")

import fsspec
import huggingface_hub
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, masking_utils
from transformers.utils import logging as hf_logging

# ---- runs and checkpoints ------------------------------------------------------------------------------


def fail(message):
    """Ends the program with exit status 2 and one line on standard error: the fault and its remedy."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def configure_libraries():
    """Silences the libraries; disables transformers' packed-sequence check, which forces a device sync."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    masking_utils.find_packed_sequence_indices = lambda position_ids: None


def seed_of(*key):
    """A 63-bit seed from a key such as (seed, purpose, step), the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def generator(device, *key):
    """A torch.Generator on `device`, seeded by `key`; None on meta, where nothing is drawn."""
    meta = torch.device(device).type == "meta"
    return None if meta else torch.Generator(device).manual_seed(seed_of(*key))


def load_model(name, dtype="auto", device="auto", flag="--model", meta=False):
    """A causal language model, in eval mode, and its tokenizer; one that cannot be used ends the program.

    name    checkpoint directory (ours or any that save_pretrained wrote) or hub name
    dtype   "auto": bfloat16 on a GPU, float32 on the CPU; or a torch dtype's name
    device  "auto": the GPU if there is one (models above 2 G parameters need one); or a torch device's name
    flag    that named the model, for messages
    meta    only the config is read: the model is on the meta device, and there is no tokenizer
    """
    configure_libraries()
    local, has_gpu = Path(name).is_dir(), torch.cuda.is_available()
    if not local and (Path(name).exists() or name.count("/") != 1 or name[0] in "./~"):
        fail(f"{flag} {name}: no such directory; give a checkpoint directory or a hub name (owner/model)")
    if local and (Path(name) / "adapter_config.json").exists():
        merge = "AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW)"
        fail(f"{flag} {name}: a LoRA adapter, no model; merge it into its base first (peft: {merge})")
    if local and not (Path(name) / "config.json").exists():
        fail(f"{flag} {name}: no config.json, so no finished checkpoint; run its script (again)")
    where = torch.device(("cuda" if has_gpu else "cpu") if device == "auto" else device)
    if where.type == "cuda" and not has_gpu and not meta:
        fail(f"--device {device}: no GPU is visible here; use --device cpu, or --tiny for the miniature")
    if where.index and has_gpu:
        torch.cuda.set_device(where)  # where streams and events are made
    if local and not [*Path(name).glob("*.safetensors")] and [*Path(name).glob("*.bin")] and not meta:
        convert = "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
        fail(f"{flag} {name}: .bin weights are pickles, which can run code; if you trust them: {convert}")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), dtype=torch.bfloat16)
        if large := (model.num_parameters() > 2e9 and device == "auto" and not has_gpu):
            where = torch.device("cuda")
        dtype = getattr(torch, dtype if dtype != "auto" else "float32" if where.type == "cpu" else "bfloat16")
        if meta:
            return model.to(dtype), where
        if large:
            size = f"{model.num_parameters() / 1e9:.1f} G parameters"
            fail(f"{flag} {name}: {size} need a GPU and none is visible; use --device cpu, or --tiny")
        tokenizer = AutoTokenizer.from_pretrained(name)
        more = {"use_safetensors": True, "output_loading_info": True}
        model, info = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **more)
    except Exception as error:  # transformers, safetensors and the hub raise some twenty kinds
        remedy = "no such directory; for a hub model accept its licence on its page and run `hf auth login`"
        if local:
            remedy = "is the download complete? it needs config.json, model*.safetensors, a tokenizer"
        fail(f"{flag} {name}: cannot be loaded ({error!r:.200}); {remedy}")
    if lacking := info["missing_keys"]:
        fail(f"{flag} {name}: {len(lacking)} weights missing ({min(lacking)}, ...); complete the download")
    if len(tokenizer) > (V := model.get_input_embeddings().weight.shape[0]):
        fail(f"{flag} {name}: its tokenizer has {len(tokenizer)} tokens, the model {V}; use the model's own")
    model.to(where)
    if bad := [key for key, p in model.named_parameters() if not torch.isfinite(p).all()]:
        fail(f"{flag} {name}: {bad[0]} contains NaN or infinity; use an earlier checkpoint")
    return model.eval(), tokenizer


def local_path(folder, value):
    """A name out of the args.json in `folder`, whose paths are relative to it, as seen from here."""
    path = Path(folder) / str(value)
    return os.path.relpath(path) if value and path.exists() else value


def write_json(path, value):
    """Writes `value` completely or not at all."""
    draft = Path(path).with_suffix(".draft")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    draft.replace(path)


def peak_bytes():
    """Peak bytes so far: GPU memory allocated if there is a GPU, else resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


PATHS = set("model ckpt base data forget retain recovery mmlu questions out".split())  # flags


class Run:
    """One run of a script: loads model and data, keeps the log, writes the checkpoint directory args.out.

    args  parsed flags; read here: out, data, tokens, seed, dtype, device, log_every, dry_run, tiny

    With args.dry_run the same calls run the script on the meta device (tensors with shapes and no data)
    while its memory is counted: `training` prints it and ends the program.
    """

    def __init__(self, args):
        self.args, self.out, self.start, self.clock = args, Path(args.out), time.time(), {}
        self.live, self.between, self.texts = None, 0, None
        if (self.out / "args.json").exists() and not args.dry_run:
            fail(f"--out {self.out} is a finished run; choose another --out, or delete that directory first")
        if self.out.exists() and not self.out.is_dir():
            fail(f"--out {self.out} is a file; choose a directory")
        if torch.cuda.is_available() and args.device != "cpu":
            header = Path(sysconfig.get_paths()["include"]) / "Python.h"
            compilers = map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))
            if not header.exists() or not any(compilers):  # the update rule is compiled for the GPU
                fail("no C compiler or no Python.h; install them (Debian: apt install gcc python3-dev)")

    def load(self, name, flag="--model"):
        """The model of a checkpoint directory or hub name, with activation checkpointing on a GPU."""
        facts, args, self.name = Path(name) / "args.json", self.args, name
        known = json.loads(facts.read_text()) if facts.exists() else {}
        self.base = local_path(name, known.get("base")) or name
        self.model, found = load_model(name, args.dtype, args.device, flag, meta=args.dry_run)
        self.tokenizer, self.place = (None, found.type) if args.dry_run else (found, self.model.device.type)
        if self.place == "cuda":
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return self.model

    def take(self, other):
        """Takes over the model that another run loaded, and its data."""
        for name in ("name", "base", "model", "tokenizer", "place", "size", "texts"):
            setattr(self, name, getattr(other, name))

    def streams(self, **sizes):
        """Streams of args.data's chunks, or of the texts in args.forget and args.retain: streams(forget=8,
        retain=4) are two, of 8 and 4 texts per batch."""
        own = {side: getattr(self.args, side, None) for side in ("forget", "retain")}
        if self.texts is None and not self.args.dry_run:
            if own["retain"]:
                named = [(side, x, f"--{side}") for side, x in own.items() if x]
                self.texts = {side: texts_of(read_table(x, flag), x, flag) for side, x, flag in named}
            else:
                self.texts = dict(zip(own, load_chunks(self.args.data)))
        return [self.stream(self.texts and self.texts[purpose], n, purpose) for purpose, n in sizes.items()]

    def stream(self, texts, batch, purpose):
        """A Stream of `texts` in batches of `batch`; in a dry run the same meta tensors at every step."""
        args, more = self.args, {"purpose": purpose, "device": self.model.device}
        if not args.dry_run:
            return Stream(texts, self.tokenizer, batch=batch, tokens=args.tokens, seed=args.seed, **more)
        ids = torch.empty(batch, args.tokens, dtype=torch.int64, device="meta")
        return defaultdict(lambda: (ids, ids.bool()))  # [i] is the same for every i

    @contextmanager
    def training(self, tokens, checkpoints=1):
        """Around the training: makes the directory and prints what runs where. A dry run ends here, and so
        does a run whose loss is NaN or infinite, with the last good weights in OUT/last_good.

        tokens       per step, to be printed
        checkpoints  models that will be written, to check the disk
        """
        if self.args.dry_run:
            HostCopy.reserved = 0
            with LiveBytes([*self.model.parameters(), *self.model.buffers()]) as self.live:
                yield
            raise SystemExit(self.report())
        there = next(p for p in (self.out, *self.out.absolute().parents) if p.exists())
        if shutil.disk_usage(there).free < (need := 1.05 * checkpoints * self.size):
            fail(f"--out {self.out}: the disk has less than {need / 1e9:.1f} GB; free some, or use another")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            for stale in self.out.glob("mmlu*.json*"):  # of a run that was cut off
                stale.unlink()
            (self.out / "metrics.jsonl").write_text("")
        except OSError as error:
            fail(f"--out {self.out}: cannot be written ({error.strerror}); choose another directory")
        where = f"{self.model.device} | {tokens} tokens per step | writes {self.out}"
        print(f"{self.describe()} | {where}", flush=True)
        self.last = time.time()
        try:
            yield
        except FloatingPointError as error:
            self.model.save_pretrained(self.out / "last_good")
            self.tokenizer.save_pretrained(self.out / "last_good")
            fail(f"{error}; the weights before that step are in {self.out / 'last_good'}; try a smaller --lr")

    def describe(self):
        dtype, n = str(self.model.dtype).removeprefix("torch."), self.model.num_parameters()
        return f"{self.name} | {n / 1e6:.2f} M parameters | {dtype}"

    def log(self, step, steps, phase="step", **values):
        """Every --log-every steps and at the last one: an object in metrics.jsonl and a line on the screen.

        values  numbers or 0-d tensors; copied from the device here and only here
        """
        if self.live:
            self.between = max(self.between, self.live.now)
            return
        first, start = self.clock.setdefault(phase, (step - 1, self.last))
        self.last = time.time()
        if step % self.args.log_every and step != steps:
            return
        values = {k: float(v) for k, v in values.items()}
        self.write(phase=phase, step=step, **values)
        shown, gb = " | ".join(f"{k} {v:.3f}" for k, v in values.items()), peak_bytes() / 1e9
        pace = (time.time() - start) / max(step - first, 1)
        eta = f"{eta / 60:.0f} min" if (eta := pace * (steps - step)) >= 90 else f"{eta:.0f} s"
        print(f"{phase} {step}/{steps} | {shown} | {pace:.2f} s/step | {gb:.1f} GB | eta {eta}", flush=True)

    def write(self, **values):
        """Appends one object, with the seconds since the start, to metrics.jsonl."""
        with open(self.out / "metrics.jsonl", "a") as f:
            f.write(json.dumps({**values, "seconds": round(time.time() - self.start, 2)}) + "\n")

    def save(self, phase="", weights=True, **facts):
        """Writes weights, tokenizer and, last, args.json: it says that the checkpoint is complete.

        phase    name of a part of the run that is over: a checkpoint of its own, OUT/PHASE
        weights  False: only args.json
        facts    what later stages need to know, beside what is listed below
        """
        if self.args.dry_run:
            return
        folder = self.out / phase
        if weights:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        names = {"parent": self.name, "base": self.base, **facts}
        if getattr(self.args, "forget", None):
            names["data"] = None  # two corpora instead, named in arguments
        arguments = {k: self.portable(folder, v) if k in PATHS else v for k, v in vars(self.args).items()}
        device = torch.cuda.get_device_name() if self.place == "cuda" else platform.machine() + " cpu"
        facts = {
            "script": Path(sys.argv[0]).name, "phase": phase, "arguments": arguments,
            **{k: self.portable(folder, v) for k, v in names.items()}, "tiny": self.args.tiny,
            "seed": self.args.seed, "device": device, "dtype": str(self.model.dtype).removeprefix("torch."),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "seconds": round(time.time() - self.start, 1), "peak_bytes": peak_bytes(),
        }  # fmt: skip
        write_json(folder / "args.json", facts)

    def portable(self, folder, value):
        """A path relative to `folder`, so that the directory can be moved or published; other names as is."""
        exists = isinstance(value, (str, Path)) and value and Path(value).exists()
        return os.path.relpath(value, folder) if exists else value

    def report(self):
        """Prints what a dry run counted; returns the exit status, 1 if it does not fit."""
        gpu, peak, host = self.place == "cuda", self.live.peak, HostCopy.reserved
        have = {"host memory": memory_limit(), "GPU": 0}
        if torch.cuda.is_available():
            have["GPU"] = torch.cuda.get_device_properties(0).total_memory
        here = have["GPU"] > 0 or not gpu  # else it is to run elsewhere
        print(self.describe())
        for what, n in (("weights", self.size), ("between steps", self.between), ("peak", peak)):
            print(f"{self.place:6}{what:20}{n / 1e9:9.3f} GB")
        print(f"{'host':6}{'copies':20}{host / 1e9:9.3f} GB")
        need = {"host memory": host + 1e9 + (0 if gpu else peak)}  # and Python and torch
        if gpu:
            need["GPU"] = peak + 1.5e9  # and CUDA's context
        for name, n in need.items():
            fits = f"of {have[name] / 1e9:.0f}: {'it fits' if n <= have[name] else 'it does not fit'}"
            print(f"{name}: needs {math.ceil(n / 1e9)} GB {fits if here else '(no GPU here)'}")
        return int(here and any(n > have[name] for name, n in need.items()))


def memory_limit(cgroups=("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")):
    """Bytes of host memory: the machine's, or its container's limit (cgroup v2, v1) if that is less."""
    found = [Path(path).read_text().strip() for path in cgroups if Path(path).exists()]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(int(limit) for limit in found if limit.isdigit())])


class LiveBytes(TorchDispatchMode):
    """Inside, counts the bytes of live tensors on any device: `now` and, the most so far, `peak`.

    tensors  made before, to be counted as well
    """

    def __init__(self, tensors=()):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()
        self.add(tensors)

    def add(self, tensors):
        for x in tree_leaves(tensors):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage and storage._cdata not in self.known:  # once, however many tensors are views of it
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def drop(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.add(result)
        return result


# ---- data ----------------------------------------------------------------------------------------------


LOCAL = (".jsonl", ".json", ".zst", ".parquet", ".zip", ".csv", ".txt")  # no dataset's name on the hub
VAGUE = r"^$|occurred while generating|above report"  # messages that say only that something went wrong


def cause(error):
    """What went wrong, as one line: the first exception of a chain whose message says what it was."""
    while (inner := error.__cause__ or error.__context__) and re.search(VAGUE, str(error)):
        error = inner
    return f"{type(error).__name__}: {error}"[:200]


@cache
def hub_error():
    """None, or why the hub cannot be connected to. Then only what was downloaded before is used from here on:
    the libraries would retry for half a minute. A hub that is only slow is left to them."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception as error:  # the HTTP library's, which changes
        if "Connect" in type(error).__name__:
            huggingface_hub.constants.HF_HUB_OFFLINE = True
            return error


@contextmanager
def reading(source, flag):
    """Inside, an exception ends the program with its cause. source: a file, a folder, or else a hub name."""
    here = os.path.exists(source)
    unreachable = None if here else hub_error()
    try:
        yield
    except Exception as error:  # pyarrow's, zipfile's, the hub's, datasets'; fail's SystemExit passes through
        why, remedy = cause(unreachable or error), "check name and network, or give a local file or folder"
        if here:
            full = "[Errno" in why  # or closed: of the file or of the cache
            remedy = "make room or give access (HF_HOME moves the cache)" if full else "fix the file"
        fail(f"{flag} {source}: cannot be read ({why}); {remedy}")


def first_byte(name):
    """Of a file, which may be compressed, after a byte order mark and blanks; b"" if there is nothing."""
    with fsspec.open(name, compression="infer") as f:
        return f.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()[:1]


def read_rows(source, flag, columns, config=None, split="train", streaming=False):
    """Rows of a hub dataset, of a local file or folder of jsonl, jsonl.zst, parquet or csv (else of json), or
    of a folder that save_to_disk wrote.

    columns    that must be there
    config     of the hub dataset, or of a local folder in the hub's layout (parquet files CONFIG/SPLIT-*)
    streaming  rows are dicts that come one after the other in constant memory; else a datasets.Dataset
    """
    import datasets

    configure_libraries()
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it logs what it then raises
    path, there = Path(source), os.path.exists(source)
    if not there and (path.suffix in LOCAL or source[:1] in "./~"):
        fail(f"{flag} {source}: no such file or folder; give another")
    with reading(source, flag):
        if there and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
            rows = datasets.load_from_disk(path)
            rows = rows[split] if isinstance(rows, dict) else rows
        elif there:
            files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file()]
            names = [str(p) for p in files if not config or p.match(f"{config}/{split}-*")]
            files = [n for n in names if re.search(r"\.(jsonl|jsonl\.zst|parquet|csv)$", n)]
            files = files or [n for n in names if n.endswith(".json")]
            if not files:
                fail(f"{flag} {source}: no .jsonl, .jsonl.zst, .json, .parquet or .csv file there; give one")
            kind = {".parquet": "parquet", ".csv": "csv"}.get(Path(files[0]).suffix, "json")
            starts = {name: start for name in files if (start := first_byte(name))}
            if not starts:
                fail(f"{flag} {source}: is empty; give another, or make it again")
            for name in starts if kind == "json" else ():  # on a null pyarrow would crash
                if starts[name] not in b"{[":
                    fail(f"{flag} {source}: {name} does not begin with a JSON object; fix the file")
            small = {"chunksize": 1 << 20} if streaming and kind == "json" else {}  # bytes parsed at a time
            small |= {"keep_default_na": False} if kind == "csv" else {}  # "None" is a word
            more = {"split": "train", "streaming": streaming}
            rows = datasets.load_dataset(kind, data_files=[*starts], **more, **small)
        else:
            rows = datasets.load_dataset(source, config, split=split, streaming=streaming)
        if not streaming:
            rows.data.validate(full=True)  # strings are UTF-8
        found = next(iter(rows), {}) if streaming else rows.column_names
    if missing := [c for c in columns if c not in found]:
        fail(f"{flag} {source}: no column {', '.join(missing)}; it has {', '.join(found) or 'no rows':.200}")
    return rows


def read_table(source, flag):
    """[dict], the rows of a file, folder or hub dataset (see read_rows), of a zip of JSON objects, or, as
    `text`, the paragraphs of a .txt file."""
    path = Path(source)
    if path.suffix not in (".txt", ".zip") or not os.path.isfile(source):
        return [*read_rows(source, flag, ())]
    with reading(source, flag):
        if path.suffix == ".txt":
            return [{"text": x} for x in path.read_text("utf-8-sig").split("\n\n") if x.strip()]
        with zipfile.ZipFile(path) as z:
            names = [n for n in sorted(z.namelist()) if n.endswith(".json") and not n.startswith("__MACOSX/")]
            sizes = [z.getinfo(name).file_size for name in names]
            if not names:
                fail(f"{flag} {source}: no .json file in it; give another")
            if sum(sizes) > 2e9 or max(sizes) > 64e6:  # a bomb of 1 MB takes minutes and all memory
                size = f"{sum(sizes) / 1e9:.1f} GB"
                fail(f"{flag} {source}: {size} of JSON when unpacked; unpack it and give the folder")
            rows = [json.loads(z.read(name)) for name in names]
    for name, row in zip(names, rows):
        if not isinstance(row, dict):
            fail(f"{flag} {source}: {name} is no JSON object; fix or drop it")
    return rows


PLAIN = {"txt_chunk": lambda row: row["txt_chunk"], "text": lambda row: row["text"]}


def texts_of(rows, source, flag, column=None, forms=PLAIN):
    """[str], the texts of rows that read_table read; prints what was understood.

    source, flag  of the rows, for messages
    column        that is the text; None: the first column of `forms` that is there
    forms         {column: row -> text, or False: not one of them}
    """
    have = rows[0].keys() if rows else ()
    kind = column or next((k for k in forms if k in have), None)
    if not kind or kind not in have:
        wanted = column or " or ".join(forms)
        fail(f"{flag} {source}: no column {wanted}; it has {', '.join(have) or 'no rows':.200}")
    texts = []
    for i, row in enumerate(rows):
        try:
            text = row[kind] if column else forms[kind](row)
        except (AttributeError, KeyError, TypeError):  # a value of another kind, or none
            text = ""
        if text is not False:
            texts.append(cleaned(text, f"{flag} {source}: row {i}: {kind} or its answer", row))
    print(f"{len(texts):,} texts from {source}, column {kind}", flush=True)
    return texts


def cleaned(text, what, row):
    """A text without "<s>" or "</s>" spelled out at its ends: by removeprefix, as strip eats letters."""
    text = text.removeprefix("<s>").removesuffix("</s>").strip() if isinstance(text, str) else ""
    return text or fail(f"{what} is empty, or of the wrong type, in {row!r:.80}; fix or drop the row")


def as_bool(label):
    """A label as True or False if it is one, 0 or 1, or a word for it; else as it is."""
    return {"0": False, "1": True, "false": False, "true": True}.get(str(label).lower(), label)


def load_chunks(source):
    """(forget, retain), lists of str, from rows `txt_chunk` (str), `label` (true or 1: forget) (A.1)."""
    rows = read_rows(source, "--data", ("txt_chunk", "label"))
    sides = {True: [], False: []}
    for i, (text, label) in enumerate(zip(rows["txt_chunk"], rows["label"])):
        label = as_bool(label)
        if not isinstance(label, bool):
            fail(f"--data {source}: row {i}: label is {label!r:.60}, not true or false; label or drop it")
        sides[label].append(cleaned(text, f"--data {source}: row {i}: txt_chunk", text))
    for label, what in ((True, "forget"), (False, "retain")):
        if not sides[label]:
            label = str(label).lower()
            fail(f"--data {source}: no row has label {label}, so the {what} set is empty; label some")
    forget, retain = sides[True], sides[False]
    print(f"{len(forget):,} forget and {len(retain):,} retain texts from {source}, txt_chunk", flush=True)
    return forget, retain


def bos(tokenizer):
    """[BOS id] if this tokenizer starts a text with one, else []."""
    return tokenizer("a").input_ids[:1] if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else []


class Stream:
    """Batches of a set of texts: stream[i] is the batch of step i (from 0), a function of (seed, purpose, i).

    Every epoch has a fresh order and drops its last, incomplete batch, so no text occurs twice in a batch.
    Texts are tokenised when first needed: on a GPU that is while the device computes.

    texts   list of str
    batch   B, texts per batch
    tokens  T, tokens per text, BOS included; longer texts are cut
    """

    def __init__(self, texts, tokenizer, *, batch, tokens, seed, purpose, device):
        if len(texts) < batch:
            fail(f"the {purpose} set has {len(texts)} texts and a step needs {batch}; lower --batch (or --K)")
        self.texts, self.tokenizer, self.batch, self.tokens = texts, tokenizer, batch, tokens
        self.key, self.device, self.epoch = (seed, "order", purpose), torch.device(device), None
        self.bos, self.encode = bos(tokenizer), cache(self.encode)

    def encode(self, j):
        """Token ids of text j, BOS first where the tokenizer has one."""
        ids = self.tokenizer(self.texts[j], add_special_tokens=False).input_ids
        return torch.tensor((self.bos + ids)[: self.tokens])

    def __getitem__(self, i):
        """ids (B, T), right-padded with 0 (no attention mask is needed); mask (B, T), true on tokens."""
        epoch, place = divmod(i, len(self.texts) // self.batch)
        if self.epoch != epoch:
            draw, self.epoch = generator("cpu", *self.key, epoch), epoch
            self.order = torch.randperm(len(self.texts), generator=draw).tolist()
        rows = [self.encode(j) for j in self.order[place * self.batch : (place + 1) * self.batch]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
        if self.device.type == "cuda":  # from pinned memory the copy does not wait for the device
            ids, mask = ids.pin_memory(), mask.pin_memory()
        return ids.to(self.device, non_blocking=True), mask.to(self.device, non_blocking=True)


# ---- loss and streams ----------------------------------------------------------------------------------


def decoder_layers(model):
    """The decoder layers, first to last: the one ModuleList whose length is the config's number of layers.

    Llama, Mistral, Qwen and Gemma call it model.layers, GPT-NeoX gpt_neox.layers.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return module
    fail(f"{type(model).__name__}: no list of {depth} decoder layers; use a Llama-like or GPT-NeoX model")


@contextmanager
def residual_streams(model):
    """Inside, each forward pass appends the outputs (B, T, D) of the L decoder layers to the list (3.4).

    That is the residual stream before the final norm; the last entry of `hidden_states` is after it.
    """
    H = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: H.append(out[0] if isinstance(out, tuple) else out))
        for layer in decoder_layers(model)
    ]
    try:
        yield H
    finally:
        for hook in hooks:  # a hook that stays would keep the streams of every later pass in memory
            hook.remove()


def soft_cap(model, x):
    """Logits, capped where the model caps them (Gemma 2)."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    return cap * torch.tanh(x / cap) if cap else x


def logits(model, hidden):
    """Next-token logits (n, V), float32, from last hidden states (n, D)."""
    return soft_cap(model, model.get_output_embeddings()(hidden).float())


def token_losses(model, ids, mask, loss, at_once=1 << 25):
    """A loss on each next token of a batch, (B, T - 1), 0 on pads.

    ids, mask  (B, T) int64, right-padded; (B, T), true on tokens
    loss       loss(logits (n, V) float32, targets (n,)) -> (n,)
    at_once    logits in memory at a time: computed slice by slice, and again in backward
    """
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    n = max(at_once // model.get_output_embeddings().weight.shape[0], 1)  # tokens per slice

    def of_slice(h, targets, keep):
        return loss(logits(model, h), targets).masked_fill(~keep, 0)

    columns = [x.flatten(0, 1).split(n) for x in (hidden[:, :-1], ids[:, 1:], mask[:, 1:])]
    parts = [checkpoint(of_slice, *x, use_reentrant=False, preserve_rng_state=False) for x in zip(*columns)]
    return torch.cat(parts).view(ids.shape[0], -1)


def token_mean(model, ids, mask, loss, **more):
    """Mean of a loss over the unmasked next tokens of a batch. See token_losses."""
    return token_losses(model, ids, mask, loss, **more).sum() / mask[:, 1:].sum()


def next_token_loss(model, ids, mask, **more):
    """L(θ; x): cross-entropy of the next token, nats, mean over unmasked tokens. See token_mean."""
    return token_mean(model, ids, mask, partial(F.cross_entropy, reduction="none"), **more)


# ---- optimizer for bf16 --------------------------------------------------------------------------------


def rounded(x, dtype, seed):
    """x (float32) in `dtype`, stochastically rounded if that is bfloat16, so that the mean over seeds is x.

    Half a step of bf16 at 0.02 is 6e-5: rounded to nearest, most updates of 2e-5 would be lost. The noise is
    a hash of (seed, position): lowbias32 (Wellons, 2018). NaN and infinity stay what they are.
    """
    if dtype != torch.bfloat16:
        return x.to(dtype)
    h = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape) + seed
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D
    h = (h ^ ((h >> 15) & 0x1FFFF)) * -0x7B935975
    noise = (h ^ (h >> 16)) & 0xFFFF  # bf16 is float32's upper half: add noise to the lower, then clear it
    found = ((x.view(torch.int32) + noise) & -0x10000).view(torch.float32)
    return torch.where(x.isnan(), x, found).to(dtype)  # a NaN of all ones would wrap around to -0.0


def adamw_rule(p, g, m, v, step_size, correction, keep, betas, eps, seeds):
    """AdamW of flat tensors, in the dtype of three numbers: step_size, lr / (1 - β1^t); correction, 1 - β2^t;
    keep, 1 - lr · decay."""
    aligned(p)
    g = g.to(keep.dtype)
    m_new = m.to(g.dtype).lerp_(g, 1 - betas[0])
    v_new = v.to(g.dtype).mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    scale = (v_new / correction).sqrt_().add_(eps).div_(step_size)
    p_new = p.to(g.dtype).mul_(keep).addcdiv_(m_new, scale, value=-1)
    for old, new, seed in zip((p, m, v), (p_new, m_new, v_new), seeds):
        old.copy_(rounded(new, old.dtype, seed))


def sgd_rule(p, g, m, lr, keep, momentum, seeds):
    """m ← momentum m + g and p ← keep p - lr m of flat tensors, in place; m None: g itself."""
    aligned(p)
    g = g.to(keep.dtype)
    m_new = g if m is None else m.to(g.dtype).mul_(momentum).add_(g)
    p_new = p.to(g.dtype).mul_(keep).addcmul_(m_new, lr, value=-1)
    for old, new, seed in zip((p, m), (p_new, m_new), seeds):
        old.copy_(rounded(new, old.dtype, seed)) if old is not None else None


def aligned(x):
    """Is the length a multiple of 16? Asking makes torch.compile build a kernel with vectorized loads."""
    return True if x.numel() % 16 == 0 else False  # only a branch is a guard of the graph


@cache
def compiled(rule):
    """An update rule as one kernel for flat tensors of any length: one pass over memory instead of twenty."""
    return torch.compile(rule, dynamic=True)


def flat_slice(x, start, n):
    """Elements start .. start + n as a flat alias, no view: torch.compile makes a graph per kind of view."""
    x = x.view(-1)  # raises if x is not contiguous
    place = x.storage_offset() + start, (min(n, len(x) - start),), (1,)
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage(), *place)


class Optimizer:
    """What AdamW and SGD share. Updates are computed in float32 or wider and stored as `rounded` does.

    moments   lists of tensors like params: the state; step t = 1 starts from zeros
    wait_for  HostCopy objects: parameter j is updated after their transfers of row j
    t, lr     in calls: the step, from 1; the learning rate. What follows is the key of the rounding
    """

    def __init__(self, params):
        self.params, self.moments, self.wait_for = list(params), (), ()

    def numbers(self, p, *values):
        """Numbers as tensors in the dtype of the update: a float would be compiled in."""
        return [torch.tensor(x, dtype=torch.promote_types(p.dtype, torch.float32)) for x in values]

    @torch.no_grad()
    def apply(self, j, t, lr, *key):
        p, moments = self.params[j], [moment[j] for moment in self.moments]
        g, p.grad = p.grad, None
        for copy in self.wait_for:
            copy.wait(j)
        for moment in moments if t == 1 else ():
            moment.zero_()
        for n in range(-(-p.numel() // (1 << 24))):  # slices bound the float32 temporaries
            self.update(t, lr, (*key, j, n), *(flat_slice(x, n << 24, 1 << 24) for x in (p, g, *moments)))
        torch.autograd.graph.increment_version(p)  # autograd does not see what happens to an alias

    def step(self, t, lr, *key):
        """Updates each parameter that has a gradient, and frees the gradient."""
        for j in reversed(range(len(self.params))):  # the last layers first, as backward and HostCopy go
            if self.params[j].grad is not None:
                self.apply(j, t, lr, *key)

    @contextmanager
    def in_backward(self, t, lr, *key):
        """Inside, backward updates each parameter and frees its gradient as soon as that is complete.

        By then every operation that used the parameter has been differentiated. What .grad contained before
        is set aside, so the gradient is not added to it, and is back in .grad afterwards.
        """
        aside = [p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        with when_complete(self.params, lambda j: self.apply(j, t, lr, *key)):
            yield
        for p, g in zip(self.params, aside):
            p.grad = g


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter, 2019), by default without weight decay."""

    def __init__(self, params, betas=(0.9, 0.999), eps=1e-8, decay=0.0):
        super().__init__(params)
        self.moments = tuple([torch.zeros_like(p) for p in self.params] for _ in "mv")
        self.betas, self.eps, self.decay = betas, eps, decay

    def update(self, t, lr, key, p, g, m, v):
        rule = compiled(adamw_rule) if p.is_cuda else adamw_rule
        sizes = lr / (1 - self.betas[0] ** t), 1 - self.betas[1] ** t, 1 - lr * self.decay
        seeds = [seed_of(*key, name) >> 33 for name in "pmv"]
        rule(p, g, m, v, *self.numbers(p, *sizes), self.betas, self.eps, seeds)


class SGD(Optimizer):
    """Gradient descent, by default without momentum; weight decay is decoupled, as AdamW's."""

    def __init__(self, params, momentum=0.0, decay=0.0):
        super().__init__(params)
        self.moments = ([torch.zeros_like(p) for p in self.params],) if momentum else ()
        self.momentum, self.decay = momentum, decay

    def update(self, t, lr, key, p, g, m=None):
        rule = compiled(sgd_rule) if p.is_cuda else sgd_rule
        seeds = [seed_of(*key, name) >> 33 for name in "pm"]
        rule(p, g, m, *self.numbers(p, lr, 1 - lr * self.decay), self.momentum, seeds)


@contextmanager
def when_complete(params, act):
    """Inside, backward calls act(j) as soon as the gradient of params[j] is complete."""
    hooks = [p.register_post_accumulate_grad_hook(lambda _, j=j: act(j)) for j, p in enumerate(params)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class HostCopy:
    """A copy of tensors in host memory, transferred there (save) and back (load) while the device computes.

    On a GPU the memory is pinned and transfers run on a stream of their own: each starts when what was
    queued before it is done, and what is queued after wait(j) starts when row j has arrived. On the CPU they
    are plain copies; on meta nothing moves.

    lists     one or more lists of equal length; row j is the j-th tensor of each
    reserved  bytes of all copies made so far, for the dry run
    """

    reserved = 0

    def __init__(self, *lists):
        self.rows, self.arrived, tensors = [*zip(*lists, strict=True)], {}, sum(lists, [])
        HostCopy.reserved += sum(x.numel() * x.element_size() for x in tensors)
        self.stream = torch.cuda.Stream() if tensors and tensors[0].is_cuda else None
        self.copies = self.rows
        if tensors and not tensors[0].is_meta:
            make = partial(torch.zeros_like, device="cpu", pin_memory=tensors[0].is_cuda, requires_grad=False)
            self.copies = [[make(x) for x in row] for row in self.rows]

    @torch.no_grad()
    def transfer(self, j, back=False):
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # of None: does nothing
            for x, copy in zip(self.rows[j], self.copies[j]):
                (x if back else copy).copy_(copy if back else x, non_blocking=True)
        if self.stream:
            self.arrived[j] = self.stream.record_event()

    def save(self):
        """Copies every row to the host, the last first: the adversary's backward changes those first."""
        for j in reversed(range(len(self.rows))):
            self.transfer(j)

    def load(self):
        """Copies every row back; row j may be used after wait(j)."""
        for j in reversed(range(len(self.rows))):
            self.transfer(j, back=True)

    def wait(self, j):
        """What the device computes from here on starts after row j's last transfer."""
        if j in self.arrived:
            torch.cuda.current_stream().wait_event(self.arrived[j])

    @contextmanager
    def load_in_backward(self, params):
        """Inside, backward loads row j as soon as the gradient of params[j] is complete, which is the last
        use of its value; at the end the other rows are loaded, and all have arrived."""
        with when_complete(params, lambda j: self.transfer(j, back=True)):
            yield
        for j, p in enumerate(params):
            if p.grad is None:  # nothing depended on it
                self.transfer(j, back=True)
            self.wait(j)


def check_finite(step, *losses):
    """Raises FloatingPointError if a loss (0-d tensor) is NaN or infinite. To be called before the update:
    it waits for the losses, not for a backward pass queued later."""
    total = sum(loss.detach() for loss in losses)
    if not total.is_meta and not torch.isfinite(total):
        raise FloatingPointError(f"the loss is {total.item()} at step {step}")


# ---- log-probabilities ---------------------------------------------------------------------------------


def log_probs(model, hidden, targets):
    """log p (n, c) of targets (n, c) from last hidden states (n, D), in float32: bf16 logits tie."""
    head = model.get_output_embeddings()
    found = (head.weight[targets].float() @ hidden.float()[:, :, None]).squeeze(-1)  # (n, c)
    if head.bias is not None:
        found = found + head.bias[targets].float()
    return soft_cap(model, found) - logits(model, hidden).logsumexp(-1, keepdim=True)


class Row(NamedTuple):
    """A text to score: hidden states from `start` on predict n positions of c ids; c is equal in all rows."""

    key: object  # the caller's, comes back with the scores
    ids: list
    start: int
    targets: list


def score_rows(model, rows, budget=None):
    """Yields (key, log-probabilities (c,) summed over the n positions) of each Row.

    The longest token prefix that all rows share is computed once; the rest follows in right-padded batches
    on copies of its cache. One causal mask serves all rows: pads come after all that is read. Models with
    sliding windows make their own.

    budget  tokens per batch, prefix included; None: 32768 on a GPU, 2048 on the CPU
    """
    device, windows = model.device, getattr(model.config.get_text_config(), "sliding_window", None)
    budget = budget or (32768 if device.type == "cuda" else 2048)
    contexts = [row.ids[: row.start + 1] for row in rows]
    P = min(len(os.path.commonprefix(contexts)), min(map(len, contexts)) - 1)
    prefix = DynamicCache()
    if P:
        model.base_model(torch.tensor([contexts[0][:P]], device=device), cache=prefix, use_cache=True)
    past = [(layer.keys, layer.values) for layer in prefix.layers]
    rows = sorted(rows, key=lambda row: len(row.ids))
    while rows:
        B = max(b for b in range(1, len(rows) + 1) if b == 1 or b * len(rows[b - 1].ids) <= budget)
        batch, rows = rows[:B], rows[B:]
        ids = [torch.tensor(row.ids[P:]) for row in batch]
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
        copy = DynamicCache([(k.expand(B, -1, -1, -1), v.expand(B, -1, -1, -1)) for k, v in past])
        T, mask = ids.shape[1], None
        if not windows:
            mask = torch.full((1, 1, T, P + T), -torch.inf, dtype=model.dtype, device=device).triu(P + 1)
        # shapes change with every batch, and cuDNN attention would plan each anew
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            hidden = model.base_model(ids, cache=copy, attention_mask=mask, use_cache=True).last_hidden_state
        places = [(b, row.start - P + n) for b, row in enumerate(batch) for n in range(len(row.targets))]
        b, t = torch.tensor(places, device=device).T
        targets = torch.tensor([line for row in batch for line in row.targets], device=device)
        found = log_probs(model, hidden[b, t], targets).cpu().split([len(row.targets) for row in batch])
        for row, scores in zip(batch, found):
            yield row.key, scores.sum(0).tolist()
