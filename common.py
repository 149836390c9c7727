"""What PyTorch and Hugging Face would give if they had it, shared by all scripts. In sections:

    runs and checkpoints   load_model, write_json, Run (directory, log, dry run)
    several GPUs           launched, connect, shard; local, whole, summed
    data                   read_rows, load_chunks, Stream
    loss and streams       in_parts, residual_streams, batch_mean, next_token_loss
    optimizer for bf16     AdamW and SGD (step, in_backward), HostCopy, check_finite
    log-probabilities      log_probs, score_rows

No method is here: no loss of one, no hyperparameter, no flag. 3.2, A.1 and so on are sections of *Toward
Robust Unlearning for LLMs* (Tamirisa et al., 2024). Everything random is a function of (seed, purpose,
step), not of earlier draws.
"""

import atexit
import codecs
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import platform
import re
import resource
import shutil
import signal
import sys
import sysconfig
import time
import weakref
import zipfile
from collections import defaultdict
from contextlib import contextmanager, suppress
from copy import deepcopy
from datetime import timedelta
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

# Pinned blocks above 16 MB get their exact size, not the next power of two. Torch reads this at first use.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "pinned_max_cached_size_mb:16")

import fsspec
import huggingface_hub
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, masking_utils
from transformers.utils import logging as hf_logging

# ---- runs and checkpoints ------------------------------------------------------------------------------


def fail(message):
    """Ends the program with exit status 2 and one line on standard error: the fault and its remedy. What
    files say may be in it, so control characters are escaped."""
    line = " ".join(str(message).split())
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    leave()
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)
    if ranks() > 1:
        os._exit(2)  # what the others wait for never comes, and leaving the process group could take as long
    raise SystemExit(2)


def say(line):
    """Prints a line of a long run, which a closed pipe or a full disk behind it must not end."""
    with suppress(OSError):
        print(line, flush=True)


def configure_libraries():
    """Silences the libraries; disables transformers' packed-sequence check, which forces a device sync; lets
    any text be printed."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without "±" shows its code


def seed_of(*key):
    """A 63-bit seed from a key such as (seed, purpose, step), the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def generator(device, *key):
    """A torch.Generator on `device`, seeded by `key`; None on meta, where nothing is drawn."""
    meta = torch.device(device).type == "meta"
    return None if meta else torch.Generator(device).manual_seed(seed_of(*key))


def check_model(name, flag="--model"):
    """Ends the program if a directory is no model: all that can be seen without loading it. name, flag: see
    load_model."""
    folder, is_hub = Path(name), re.fullmatch(r"[^./~][^/]*/[^/]+", str(name))
    if not name or not (os.path.isdir(name) or (is_hub and not os.path.exists(name))):
        what = f"{flag} {str(name):.200}: no such directory"
        fail(f"{what}; give a checkpoint directory or a hub name (owner/model)")
    if not os.path.isdir(name):
        return
    if (folder / "adapter_config.json").exists():
        merge = "AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW)"
        fail(f"{flag} {name}: a LoRA adapter, no model; merge it into its base first (peft: {merge})")
    if not (folder / "config.json").exists():
        fail(f"{flag} {name}: no config.json, so no finished checkpoint; run its script (again)")
    files = [*folder.glob("*.safetensors")]
    if not files and [*folder.glob("*.bin")]:
        convert = "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
        fail(f"{flag} {name}: .bin weights are pickles, which can run code; if you trust them: {convert}")
    try:
        if "quantization_config" in json.loads((folder / "config.json").read_text()):
            fail(f"{flag} {name}: quantized weights cannot be trained; use the model they were made from")
        for file in files:
            with safe_open(file, "pt") as f:
                kinds = {f.get_slice(key).get_dtype() for key in f.keys()}
            if others := kinds - {"F64", "F32", "F16", "BF16", "BOOL", "I64"}:  # the last two: masks, places
                fail(f"{flag} {name}: {file.name} has weights in {min(others)}; give them in bf16 or float32")
    except (OSError, ValueError, SafetensorError) as error:
        fail(f"{flag} {name}: cannot be loaded ({error!r:.200}); is the download complete?")


def load_model(name, dtype="auto", device="auto", flag="--model", meta=False, alone=False):
    """A causal language model, in eval mode, and its tokenizer; one that cannot be used ends the program.

    name    checkpoint directory (ours or any that save_pretrained wrote) or hub name
    dtype   "auto": bfloat16 on a GPU, float32 on the CPU; or a torch dtype's name
    device  "auto": the GPU if there is one (models above 2 G parameters need one); or a torch device's name
    flag    that named the model, for messages
    meta    only the config is read: the model is on the meta device, and there is no tokenizer
    alone   under torchrun: whole, as if there were no other processes; else sharded over them
    """
    configure_libraries()
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        fail(f"--device {device}: use auto, cuda, cuda:N or cpu")
    if not meta or not (Path(name) / "config.json").exists():  # a dry run needs the config alone
        check_model(name, flag)
    has_gpu, many = torch.cuda.is_available(), launched()[1] > 1 and not meta
    where = torch.device(("cuda" if has_gpu else "cpu") if device == "auto" else device)
    if many and where.type == "cuda":
        if where.index is not None:
            fail(f"--device {device}: under torchrun each process has its own GPU; use auto")
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if where.type == "cuda" and not has_gpu and not meta:
        fail(f"--device {device}: no GPU is visible here; use --device cpu, or --tiny for the miniature")
    if where.index is not None and has_gpu:
        if where.index >= (n := torch.cuda.device_count()):
            fail(f"--device {device}: {n} GPUs are visible, cuda:0 to cuda:{n - 1}; use one of them")
        torch.cuda.set_device(where)  # where streams and events are made
    if many and not alone:
        connect(where.type)
    safe = {"trust_remote_code": False}  # a checkpoint is data
    unreachable = None if Path(name).is_dir() else hub_error()
    try:
        config = AutoConfig.from_pretrained(name, **safe)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **safe)
        if large := (model.num_parameters() > 2e9 and device == "auto" and not has_gpu):
            where = torch.device("cuda")
        dtype = getattr(torch, dtype if dtype != "auto" else "float32" if where.type == "cpu" else "bfloat16")
        if meta:
            return model.to(dtype), where
        if large:
            size = f"{model.num_parameters() / 1e9:.1f} G parameters"
            fail(f"{flag} {name}: {size} need a GPU and none is visible; use --device cpu, or --tiny")
        tokenizer = AutoTokenizer.from_pretrained(name, **safe)
        more = {"use_safetensors": True, "output_loading_info": True, **safe}
        if rank() == 0:
            model, info = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **more)
        else:  # the weights come from rank 0
            model, info = model.to(dtype), {"missing_keys": (), "unexpected_keys": ()}
    except Exception as error:  # transformers, safetensors and the hub raise some twenty kinds
        remedy = "no such directory; for a hub model accept its licence on its page and run `hf auth login`"
        if Path(name).is_dir():
            remedy = "is the download complete? it needs config.json, model*.safetensors, a tokenizer"
        fail(f"{flag} {name}: cannot be loaded ({cause(unreachable or error)}); {remedy}")
    if lacking := info["missing_keys"]:
        fail(f"{flag} {name}: {len(lacking)} weights missing ({min(lacking)}, ...); complete the download")
    depth = config.get_text_config().num_hidden_layers
    found = [(int(n), key) for key in info["unexpected_keys"] for n in re.findall(r"\.(\d+)\.", key)[:1]]
    if further := [key for n, key in found if n >= depth]:
        fail(
            f"{flag} {name}: config.json says {depth} layers, the weights have {min(further)}; use their own"
        )
    V, n = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values()) + 1
    if not V / 2 <= n <= V:
        fail(f"{flag} {name}: its tokenizer has {n} tokens, the model {V}; use the model's own")
    model = model.to(where) if ranks() == 1 else shard(model, dtype, where)
    if bad := not_finite(model):
        fail(f"{flag} {name}: {bad} contains NaN or infinity; use an earlier checkpoint")
    check_forward(model.eval(), f"{flag} {name}")
    return model, tokenizer


def not_finite(model):
    """Name of the first parameter that contains NaN or infinity, or None."""
    names = [key for key, _ in model.named_parameters()]
    found = (j for j, p in enumerate(model.parameters()) if not torch.isfinite(local(p)).all())
    first = -agreed(-next(found, len(names)))[0]
    return names[first] if first < len(names) else None


@torch.no_grad()
def check_forward(model, what):
    """Ends the program if log-probabilities as they are computed here are not the model's own.

    Two texts with the same beginning are scored with score_rows, and their losses computed with token_losses;
    both are compared with the model's forward pass. A head that is not known here, a state that is no cache
    of keys and values, or a model that looks ahead makes them differ.
    """
    texts = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 8, 7, 6, 5]], device=model.device)
    targets = list(range(1, 9))
    try:
        own = [model(ids[None], use_cache=False).logits[0].float().log_softmax(-1).cpu() for ids in texts]
        rows = [Row(b, ids.tolist(), 5, [targets, targets]) for b, ids in enumerate(texts)]
        pairs = [(torch.tensor(x), own[b][5:7, targets].sum(0)) for b, x in score_rows(model, rows)]
        each = token_losses(model, texts, texts > 0, partial(F.cross_entropy, reduction="none"))
        pairs += [
            (x.cpu(), -p[:-1].gather(-1, ids[1:, None].cpu())[:, 0]) for x, p, ids in zip(each, own, texts)
        ]
    except Exception as error:  # of a model of another kind: any
        fail(f"{what}: {type(model).__name__} is not supported ({error!r:.100}); use a Llama-like model")
    if (far := max(float((x - y).norm() / y.norm()) for x, y in pairs)) > 0.05:  # bf16 rounds by 0.01
        why = f"its log-probabilities as computed here differ from its own by {100 * far:.0f} %"
        fail(f"{what}: {type(model).__name__} is not supported ({why}); use a Llama-like model")


def local_path(folder, value):
    """A name out of the args.json in `folder`, whose paths are relative to it, as seen from here."""
    path = Path(folder) / str(value)
    return os.path.relpath(path) if value and os.path.exists(path) else value


def write_text(path, text):
    """Writes `text` completely or not at all; of several ranks the first does."""
    if rank():
        return
    draft = Path(f"{path}.{os.getpid()}.draft")
    try:
        draft.write_text(text)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path, value):
    """Writes `value` completely or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def land(draft, folder, last=("config.json", "args.json")):
    """Moves the files of the directory `draft` to `folder` when all are on the disk, those in `last` at the
    end: what looks complete is complete."""
    files = [file for file in draft.rglob("*") if file.is_file()]
    os.umask(mask := os.umask(0))
    for file in sorted(files, key=lambda file: last.index(file.name) if file.name in last else -1):
        file.chmod(0o666 & ~mask)  # weights are written as 0600
        with open(file) as f:
            os.fsync(f.fileno())
        there = folder / file.relative_to(draft)
        there.parent.mkdir(parents=True, exist_ok=True)
        file.replace(there)
    shutil.rmtree(draft)


LOCKS = {}  # path: the open file that holds the lock


def locked(path):
    """Takes the lock file `path` for as long as this process lives; False if another process has it."""
    if path in LOCKS:
        return True
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
    LOCKS[path] = file  # a file system without locks: none are asked for
    return True


def peak_bytes():
    """Peak bytes so far: GPU memory allocated if there is a GPU, else resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


PATHS = set("model ckpt base data forget retain recovery mmlu questions out".split())  # flags
FREE = set("out name device log_every save_every only shard keep_weights".split())  # do not change the result


def differs(folder, known, args):
    """The first flag in which a run that was begun in `folder` with the arguments `known` differs from args,
    or None. Paths in `known` are relative to the folder, see Run.portable."""

    def plain(value):
        if not isinstance(value, str) or not value:
            return str(value)
        path = Path(local_path(folder, value))
        return str(path.resolve()) if path.is_absolute() or path.exists() else value

    flags = sorted(vars(args).keys() - FREE)
    return next((k for k in flags if plain(known.get(k)) != plain(vars(args)[k])), None)


def read_log(out):
    """The entries of OUT/metrics.jsonl, [dict]; what a kill or someone else left there is passed over."""
    path, found = Path(out) / "metrics.jsonl", []
    for line in path.read_bytes().decode(errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            good = isinstance(entry, dict) and isinstance(entry.get("phase"), str)
            found += [entry] if good and type(entry.get("step")) is int else []
    return found


def no_log(*_, **__):
    """Logs nothing: what a method does by itself, see Run.log."""


def all_steps(steps, *state):
    """1 .. steps: what a method does by itself, see Run.steps_left."""
    return range(1, steps + 1)


class Run:
    """One run of a script: loads model and data, keeps the log, writes the checkpoint directory args.out.

    args  parsed flags; each script has those that are read here

    What is needed to go on after the program was cut off is in OUT/state until the run is done: run.json, its
    arguments, and the last saved state. With args.dry_run the same calls run the script on the meta device
    (tensors with shapes and no data) while its memory is counted: `training` prints it and ends the program.
    """

    def __init__(self, args):
        self.args, self.out, self.state = args, Path(args.out), Path(args.out) / "state"
        self.start, self.clock = time.time(), {}  # clock: when each phase began, for its pace
        self.texts = None  # {"forget": [..], "retain": [..]}
        self.inputs = {}  # digests of texts and weights, which a rerun must find again
        self.kept, self.last_saved = {"done": {}}, time.time()  # kept: facts.json of the last save
        self.stop, self.unwritten = 0, ""  # the signal that came; lines that metrics.jsonl has not taken
        self.retain = 0.0  # the last loss on the retain set
        self.live, self.between = None, 0  # a dry run's count; its bytes on a GPU between steps
        self.disk = 0  # bytes of a save
        self.ranks = launched()[1]
        if args.dry_run and launched()[0]:
            raise SystemExit(0)  # rank 0 says it
        self.inputs["number of processes"] = self.ranks
        if not args.dry_run:
            try:
                self.check_out()
            except (OSError, UnicodeEncodeError) as error:
                why = getattr(error, "strerror", "its name is not UTF-8")
                fail(f"--out {str(self.out):.80}: {why}; choose another directory")
        if torch.cuda.is_available() and args.device != "cpu":
            header = Path(sysconfig.get_paths()["include"]) / "Python.h"
            compilers = map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))
            if not header.exists() or not any(compilers):  # the update rule is compiled for the GPU
                fail("no C compiler or no Python.h; install them (Debian: apt install gcc python3-dev)")

    def check_out(self):
        """Only a new directory is written into, or one where this run was cut off."""
        begun, remedy = self.state / "run.json", "choose another --out, or delete that directory first"
        str(self.out).encode()
        if not self.args.out or (self.out.exists() and not self.out.is_dir()):
            fail(f"--out {self.out}: not a directory; choose another --out")
        if (self.out / "args.json").exists():
            shutil.rmtree(self.state, ignore_errors=True)  # of one that was killed when all else was done
            fail(f"--out {self.out} is a finished run; {remedy}")
        if not begun.exists():
            if self.out.exists() and {path.name for path in self.out.iterdir()} - {"state"}:
                fail(f"--out {self.out}: not empty, and no run was cut off there; choose another --out")
            return
        try:
            known = json.loads(begun.read_text())
            script, flag = known["script"], differs(self.out, known["arguments"], self.args)
            for folder in self.saves():  # the last is newest
                self.kept = json.loads((folder / "facts.json").read_text()) | {"folder": folder}
                done = self.kept["done"]
                if done[self.kept["phase"]] < 1 or {type(n) for n in done.values()} != {int}:
                    raise ValueError("done")
                self.start = time.time() - self.kept["seconds"]
        except (ValueError, TypeError, KeyError, AttributeError):
            fail(f"--out {self.out}: {self.state} is broken; {remedy}")
        other = [f"by {script}"] if script != Path(sys.argv[0]).name else []
        other += [f"with another --{flag.replace('_', '-')}"] if flag else []
        other += [f"with other {k}" for k, v in self.inputs.items() if known.get("inputs", {}).get(k, 1) != v]
        if other:
            fail(f"--out {self.out} was begun {other[0]}; {remedy}")
        self.lock()

    def saves(self):
        """Folders of complete saves, oldest first; there are two while the older one is being removed."""
        found = (path.parent for path in self.state.glob("*/facts.json"))
        return sorted(folder for folder in found if re.fullmatch(r"\d{6}", folder.name))

    def lock(self):
        if not launched()[0] and not locked(self.state / "lock"):
            fail(f"--out {self.out}: another process is writing there; wait for it, or choose another --out")

    def load(self, name, flag="--model"):
        """The model of a checkpoint directory or hub name, with activation checkpointing on a GPU."""
        args, self.name = self.args, name
        try:
            facts = Path(name) / "args.json"
            known = dict(json.loads(facts.read_text())) if facts.exists() else {}
            if not isinstance(known.get("base") or "", str):
                raise TypeError("base is no name")
        except (ValueError, TypeError, OSError) as error:
            fail(f"{flag} {name}: args.json cannot be read ({error}); delete it if the model is not ours")
        self.base = local_path(name, known.get("base")) or name
        self.model, found = load_model(name, args.dtype, args.device, flag, meta=args.dry_run)
        self.tokenizer, self.place = (None, found.type) if args.dry_run else (found, self.model.device.type)
        if self.place == "cuda":
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.model.micro_batch = args.micro_batch
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
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", args.tokens)
        if args.tokens > limit:
            fail(f"--tokens {args.tokens}: the model's context is {limit} tokens; lower it")
        if batch % self.ranks:
            fail(f"--batch: {batch} texts of the {purpose} set for {self.ranks} processes; give a multiple")
        if not args.dry_run:
            if (key := f"texts ({purpose})") not in self.inputs:
                self.inputs[key] = seed_of(texts)
            return Stream(texts, self.tokenizer, batch=batch, tokens=args.tokens, seed=args.seed, **more)
        ids = torch.empty(batch // self.ranks, args.tokens, dtype=torch.int64, device="meta")
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
            shapes = {p.shape for p in self.model.parameters()}
            with LiveBytes([*self.model.parameters(), *self.model.buffers()], shapes) as self.live:
                yield
            raise SystemExit(self.report())
        self.check_disk(checkpoints * self.size)
        if not rank():
            self.begin()
        barrier()
        where = f"{self.model.device} | {tokens} tokens per step | writes {self.out}"
        where = f"{self.ranks} x {where}" if self.ranks > 1 else where
        print(f"{self.describe()} | {where}", flush=True)
        self.last = self.last_saved = time.time()
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except FloatingPointError as error:
            self.rescue(error)
        finally:
            for n, handler in handlers.items():
                signal.signal(n, handler)

    def begin(self):
        """Makes the directory, or finds that this very run was cut off there."""
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            self.lock()
            own = [local(p).flatten()[:64].tolist() for p in self.model.parameters()]
            self.inputs["weights"] = seed_of(own)
            self.check_out()  # again: another process may have come and gone, and now the inputs are known
            if not (self.state / "run.json").exists():
                known = {"script": Path(sys.argv[0]).name, "arguments": self.portable_arguments(self.out)}
                write_json(self.state / "run.json", known | {"inputs": self.inputs})
            if "folder" not in self.kept and not [*self.out.glob("*/args.json")]:  # nothing to go on from
                (self.out / "metrics.jsonl").write_text("")
        except OSError as error:
            fail(f"--out {self.out}: cannot be written ({error.strerror}); choose another directory")

    def check_disk(self, need, more=""):
        there = next(p for p in (self.out, *self.out.absolute().parents) if p.exists())
        if shutil.disk_usage(there).free < 1.05 * need:
            size = f"{1.05 * need / 1e6:.0f} MB"
            fail(f"--out {self.out}: the disk has less than {size}; free some, or use another{more}")

    def rescue(self, error):
        """Ends the program with the weights as they are in OUT/last_good, if they are finite."""
        bad, where = not_finite(self.model), self.out / "last_good"
        kept = f"; {bad} is not finite either, so no weights were kept"
        try:
            if not bad:
                self.land_model(where)
                kept = f"; the weights before that step are in {where}"
        except (OSError, SafetensorError) as full:
            kept = f"; the weights before that step cannot be written ({full})"
        fail(f"{error}{kept}; try a smaller --lr, with another --out")

    def steps_left(self, steps, *state, phase="step"):
        """Yields the steps to do: 1 .. steps, or those that are left where the run was cut off before.

        state  lists of tensors that, beside the weights that train, the next step depends on
        phase  of the run, as for `log`

        After each step it saves weights and state, if --save-every minutes have passed or a signal (SIGINT,
        SIGTERM) asks for it, which then ends the program. A second signal ends it at once.
        """
        args, state = self.args, [[p for p in self.model.parameters() if p.requires_grad], *state]
        self.disk = sum(x.numel() * x.element_size() for x in sum(state, []))
        if args.dry_run:
            yield from range(1, steps + 1)
            return
        first = self.kept["done"].get(phase, 0)
        if first and self.kept["phase"] == phase:
            self.restore(state, first < steps)
            say(f"goes on after {phase} {first} of {steps}, saved in {self.state}")
        self.trim_log(phase, first)
        if args.save_every:
            there = int("folder" in self.kept)  # the save before stays until the next is whole
            self.check_disk((2 - there) * self.disk + self.size, ", or --save-every 0")
            for n in (signal.SIGINT, signal.SIGTERM):
                signal.signal(n, self.on_signal)
        for i in range(first + 1, steps + 1):
            yield i
            self.kept["done"][phase] = i
            late = 0 < 60 * args.save_every < time.time() - self.last_saved
            late, stop = agreed(late, self.stop)
            if i < steps and (late or stop):  # after the last one something else is written
                self.keep(phase, state)
            if i < steps and stop:
                say(f"stopped after {phase} {i} of {steps}; the same command goes on from there")
                raise SystemExit(128 + stop)

    def on_signal(self, number, _):
        if self.stop and ranks() == 1:  # torchrun repeats a scheduler's signal, and kills after 30 s
            os._exit(128 + number)
        self.stop = number
        if ranks() == 1:  # torchrun sends it also when another process has ended
            line = "this step is finished and saved first; a second signal ends the program at once"
            os.write(2, f"\n{line}\n".encode())

    def keep(self, phase, state):
        """Saves the tensors in `state` completely or not at all; the save before stays until then."""
        if bad := not_finite(self.model):
            raise FloatingPointError(f"{bad} is not finite after {phase} {self.kept['done'][phase]}")
        self.last_saved, draft = time.time(), self.state / "draft"
        facts = {"phase": phase, "done": self.kept["done"], "seconds": time.time() - self.start}

        def begin():
            if self.unwritten:
                raise OSError("metrics.jsonl cannot be written")
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()

        def write():
            for n, tensors in enumerate(state):  # file by file: from a GPU each is copied to the host whole
                save_file({str(j): local(x).detach() for j, x in enumerate(tensors)}, draft / self.file(n))

        def finish():
            write_json(draft / "facts.json", facts)
            before = self.saves()
            number = int(before[-1].name) + 1 if before else 1
            land(draft, self.state / f"{number:06}", last=["facts.json"])
            for folder in before:
                shutil.rmtree(folder)

        for act in (begin, write, finish):  # of several ranks each writes its share, rank 0 does the rest
            error = None
            try:
                if not rank() or act is write:
                    act()
            except (OSError, SafetensorError) as found:
                error = found
            if agreed(error is not None)[0]:
                if not rank():
                    shutil.rmtree(draft, ignore_errors=True)
                    why = error or "another process cannot write"
                    print(
                        f"the state cannot be saved ({why}); the one before, if any, is kept", file=sys.stderr
                    )
                return

    def file(self, n):
        """Where this rank saves the n-th list of tensors."""
        return f"{n}.safetensors" if self.ranks == 1 else f"{n}-{rank()}-of-{self.ranks}.safetensors"

    @torch.no_grad()
    def restore(self, state, plausible):
        """Loads the last save into the tensors in `state`. plausible: is its step one of this phase's?"""
        try:
            if not plausible:
                raise ValueError("more steps than there are")
            for n, tensors in enumerate(state):
                with safe_open(self.kept["folder"] / self.file(n), "pt") as f:
                    for j, x in enumerate(tensors):
                        local(x).copy_(f.get_tensor(str(j)))
            if bad := not_finite(self.model):
                raise ValueError(f"{bad} is not finite")
        except (OSError, ValueError, SafetensorError, RuntimeError) as error:
            fail(f"--out {self.out}: its saved state is broken ({error!r:.100}); delete {self.out}")

    def trim_log(self, phase, first):
        """Drops from metrics.jsonl what is to come again, later steps of this phase, and what is no entry."""
        if rank():
            return
        lines = {(e["phase"], e["step"]): json.dumps(e) + "\n" for e in read_log(self.out)}
        lines = [x for (p, i), x in lines.items() if i <= first or p not in (phase, "accuracy")]
        with suppress(OSError):  # a full disk: a line may be there twice
            write_text(self.out / "metrics.jsonl", "".join(lines))

    def phase(self, phase="step"):
        """Arguments `log` and `steps_left` of a method that is this phase of the run."""
        return {"log": partial(self.log, phase=phase), "steps_left": partial(self.steps_left, phase=phase)}

    def describe(self):
        dtype, n = str(self.model.dtype).removeprefix("torch."), self.model.num_parameters()
        return f"{self.name} | {n / 1e6:.2f} M parameters | {dtype}"

    def log(self, step, steps, phase="step", **values):
        """Every --log-every steps and at the last one: an object in metrics.jsonl and a line on the screen.

        values  numbers or 0-d tensors; copied from the device here and only here
        """
        if self.live:
            self.between = max(self.between, self.live.on_each(self.ranks))
            return
        first, start = self.clock.setdefault(phase, (step - 1, self.last))
        self.last = time.time()
        if step % self.args.log_every and step != steps:
            return
        values = {k: float(summed(v) if isinstance(v, torch.Tensor) else v) for k, v in values.items()}
        self.retain = values.get("retain", 0.0)
        self.write(phase=phase, step=step, **values)
        shown, gb = " | ".join(f"{k} {v:.3f}" for k, v in values.items()), peak_bytes() / 1e9
        pace = (time.time() - start) / max(step - first, 1)
        eta = f"{eta / 60:.0f} min" if (eta := pace * (steps - step)) >= 90 else f"{eta:.0f} s"
        say(f"{phase} {step}/{steps} | {shown} | {pace:.2f} s/step | {gb:.1f} GB | eta {eta}")

    def write(self, **values):
        """Appends one object, with the seconds since the start, to metrics.jsonl. What a full disk does not
        take is written with the next one: no reason to lose a training."""
        if rank():
            return
        path = self.out / "metrics.jsonl"
        self.unwritten += json.dumps({**values, "seconds": round(time.time() - self.start, 2)}) + "\n"
        try:
            size = path.stat().st_size if path.exists() else 0
            try:
                with open(path, "a") as f:
                    f.write(self.unwritten)
                self.unwritten = ""
            except OSError:
                os.truncate(path, size)  # no half lines
                raise
        except OSError as error:
            print(f"not logged yet: {error}", file=sys.stderr)

    def save(self, phase="", weights=True, **facts):
        """Writes weights, tokenizer and, last, args.json: it says that the checkpoint is complete.

        phase    name of a part of the run that is over: a checkpoint of its own, OUT/PHASE
        weights  False: only args.json
        facts    what later stages need to know, beside what is listed below
        """
        folder = self.out / phase
        if self.args.dry_run:
            return
        if weights and (bad := not_finite(self.model)):
            fail(f"{bad} is not finite after the last step; try a smaller --lr, with another --out")
        names = {"parent": self.name, "base": self.base, **facts}
        if getattr(self.args, "forget", None):
            names["data"] = None  # two corpora instead, named in arguments
        device = torch.cuda.get_device_name() if self.place == "cuda" else platform.machine() + " cpu"
        device = f"{self.ranks} x {device}" if self.ranks > 1 else device
        facts = {
            "script": Path(sys.argv[0]).name, "phase": phase, "arguments": self.portable_arguments(folder),
            **{k: self.portable(folder, v) for k, v in names.items()}, "tiny": self.args.tiny,
            "seed": self.args.seed, "device": device, "dtype": str(self.model.dtype).removeprefix("torch."),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "seconds": round(time.time() - self.start, 1), "peak_bytes": peak_bytes(),
        }  # fmt: skip
        try:
            self.land_model(folder, facts, weights)
            if not phase and not rank():
                shutil.rmtree(self.state)
        except (OSError, SafetensorError) as error:
            fail(f"--out {folder}: cannot be written ({error}); then run the same command again to go on")
        if self.retain > (chance := math.log(self.model.get_input_embeddings().weight.shape[0])):
            loss = f"{self.retain:.1f} nats, chance {chance:.1f}"
            print(f"DAMAGED: the loss on the retain set ended at {loss}; try a smaller --lr, another --out")

    def land_model(self, folder, facts=None, weights=True):
        """Writes weights, tokenizer and, if given, args.json to a draft first and then to `folder`."""
        state_dict = gathered(self.model) if weights and ranks() > 1 else None
        if rank():
            return barrier()
        draft = self.state / "draft"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        if weights:
            self.model.save_pretrained(draft, state_dict=state_dict)
            self.tokenizer.save_pretrained(draft)
        if facts:
            write_json(draft / "args.json", facts)
        land(draft, folder)
        barrier()

    def load_finished(self, phase):
        """Loads the weights of OUT/PHASE into the model, where a run that was cut off has left them; False if
        there are none."""
        if self.args.dry_run:
            return False
        if not (self.out / phase / "args.json").exists():
            if self.kept.get("phase", phase) != phase:
                fail(f"{self.out / phase} is gone, which this run went on from; delete {self.out}")
            return False
        dtype, where = str(self.model.dtype).removeprefix("torch."), "cpu"
        where = where if ranks() == 1 else self.args.device
        there, _ = load_model(self.out / phase, dtype, where, "--out")
        with torch.no_grad():
            for p, q in zip(self.model.parameters(), there.parameters()):
                local(p).copy_(local(q))
        print(f"goes on after {phase}, finished in {self.out / phase}", flush=True)
        return True

    def portable_arguments(self, folder):
        return {k: self.portable(folder, v) if k in PATHS else v for k, v in vars(self.args).items()}

    def portable(self, folder, value):
        """A path relative to `folder`, so that the directory can be moved or published; other names as is."""
        exists = isinstance(value, (str, Path)) and value and Path(value).exists()
        return os.path.relpath(value, folder) if exists else value

    def report(self):
        """Prints what a dry run counted, under torchrun for one of its GPUs; returns the exit status, 1 if it
        does not fit."""
        gpu, n, live = self.place == "cuda", self.ranks, self.live
        peak, local_ranks = live.peaks[n], int(os.environ.get("LOCAL_WORLD_SIZE", n))
        rows = {"weights": self.size / n, "between steps": self.between}
        if n > 1:
            rows["gathered"] = self.gathered_bytes()
            peak += rows["gathered"]
        have = {"host memory": memory_limit(), "GPU": 0}
        if torch.cuda.is_available():
            have["GPU"] = torch.cuda.get_device_properties(0).total_memory
        here = have["GPU"] > 0 or not gpu  # else it is to run elsewhere
        print(self.describe() + (f" | on each of {n}" if n > 1 else ""))
        for what, size in (rows | {"peak": peak}).items():
            print(f"{self.place:6}{what:20}{size / 1e9:9.3f} GB")
        print(f"{'host':6}{'copies':20}{HostCopy.reserved / n / 1e9:9.3f} GB")
        if self.args.save_every:
            need = 1.05 * (2 * self.disk + self.size)
            print(f"{'disk':6}{'saves and result':20}{need / 1e9:9.3f} GB in {self.out}")
        # and Python and torch; what is on a GPU comes to the host, file by file, when it is saved
        need = {"host memory": local_ranks * (HostCopy.reserved / n + 1e9 + (0 if gpu else peak))}
        if gpu:
            need["host memory"] += self.size
            need["GPU"] = peak + 1.5e9  # and CUDA's context
        for name, size in need.items():
            fits = f"of {have[name] / 1e9:.0f}: {'it fits' if size <= have[name] else 'it does not fit'}"
            print(f"{name}: needs {math.ceil(size / 1e9)} GB {fits if here else '(no GPU here)'}")
        if gpu and n == 1 and need["GPU"] > 80e9:
            print(self.advice())
        return int(here and any(size > have[name] for name, size in need.items()))

    def gathered_bytes(self):
        """What FSDP2 holds beside shards, at most: what is outside of the layers and a table of its size; of
        the layers the one in use, the next, a gradient, and one in float32 that is being reduced."""
        each = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(self.model)]
        outside, size = self.model.num_parameters() - sum(each), self.model.dtype.itemsize
        return 2 * outside * size + max(each) * (3 * size + 4)

    def advice(self, card=80e9):
        """The least number of GPUs that is enough, by what this dry run on one has counted."""
        more = self.gathered_bytes() + 1.5e9
        each = {n: peak + self.size / n + more for n, peak in self.live.peaks.items() if n > 1}  # a gradient
        enough = [n for n in each if each[n] <= card and self.args.batch % n == 0]
        if not enough:
            return f"no number of 80 GB GPUs that divides --batch {self.args.batch} is enough; give another"
        n = enough[0]
        return f"80 GB GPUs: {n}, with at most {math.ceil(each[n] / 1e9)} GB on each (torchrun, see README)"


def memory_limit(cgroups=("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")):
    """Bytes of host memory: the machine's, or its container's limit (cgroup v2, v1) if that is less."""
    found = [Path(path).read_text().strip() for path in cgroups if Path(path).exists()]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(int(limit) for limit in found if limit.isdigit())])


class LiveBytes(TorchDispatchMode):
    """Inside, counts the bytes of live tensors on any device: `now` and, the most so far, `peak`; `peaks`: by
    number of GPUs, the most on each.

    tensors  made before, to be counted as well
    shapes   of what is sharded over several GPUs: weights, and with them gradients and moments
    """

    def __init__(self, tensors=(), shapes=()):
        super().__init__()
        self.now, self.sharded, self.known, self.shapes = 0, 0, {}, shapes
        self.peaks = dict.fromkeys(sorted({*(1 << k for k in range(9)), launched()[1]}), 0)
        self.add(tensors)

    @property
    def peak(self):
        return self.peaks[1]

    def on_each(self, n):
        return self.now - self.sharded + self.sharded / n

    def add(self, tensors):
        before = self.now
        for x in tree_leaves(tensors):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage and storage._cdata not in self.known:  # once, however many tensors are views of it
                size = storage.nbytes()
                self.known[storage._cdata] = size if x.shape in self.shapes else 0
                self.now, self.sharded = self.now + size, self.sharded + self.known[storage._cdata]
                weakref.finalize(storage, self.drop, storage._cdata, size)
        for n in self.peaks if self.now > before else ():
            self.peaks[n] = max(self.peaks[n], self.on_each(n))

    def drop(self, key, size):
        self.now, self.sharded = self.now - size, self.sharded - self.known.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.add(result)
        return result


# ---- several GPUs --------------------------------------------------------------------------------------
#
# torchrun starts a process, called a rank, per GPU. FSDP2 shards weights, gradients and moments over them by
# rows, as DTensors; `local` is this rank's part of one. Each rank computes its rows of every batch, and its
# share of every loss: the shares add up, and so do their gradients. Rank 0 alone prints and writes.


def launched():
    """(rank, number of ranks) as torchrun says; (0, 1) without it."""
    here = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if here else (0, 1)


if launched()[0]:
    sys.stdout = open(os.devnull, "w")


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


@cache
def connect(kind):
    """Joins the processes that torchrun started; kind: "cuda" or "cpu", of their devices."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=timedelta(hours=1))
    atexit.register(disconnect)
    sys.excepthook = ended


def disconnect():
    """At the end. A process that leaves earlier than the others can abort them."""
    try:
        dist.barrier()
        dist.destroy_process_group()
    except RuntimeError:  # another one has not come so far, and has told why
        os._exit(1)


def ended(kind, error, trace):
    """One line in place of a traceback where the cause is that another process has ended."""
    leave()
    if not re.search("(?i)closed by peer|reset by peer|broken pipe|remote process|aborted", str(error)):
        return sys.__excepthook__(kind, error, trace)
    why = " ".join(str(error).split())[:150]
    print(f"{Path(sys.argv[0]).name}: another process has ended, so this one does ({why})", file=sys.stderr)


def leave():
    """Before the message with which the program ends: rank 0 gives it, and torchrun ends the others when it
    sees that; a fault of this rank alone is told five seconds later."""
    atexit.unregister(disconnect)
    if launched()[0]:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)


@cache
def mesh(kind):
    """All ranks' devices of a kind, "cuda" or "cpu"."""
    return dist.init_device_mesh(kind, (ranks(),))


def barrier():
    if ranks() > 1:
        dist.barrier()


def agreed(*numbers):
    """The largest that each of these numbers is on any rank."""
    if ranks() == 1:
        return numbers
    dist.all_reduce(found := torch.tensor(numbers), dist.ReduceOp.MAX)
    return found.tolist()


def of_ranks(value):
    """[what each rank calls this with, rank 0 first]."""
    found = [value] * ranks()
    if ranks() > 1:
        dist.all_gather_object(found, value)
    return found


def summed(x):
    """The sum of a tensor over the ranks, without gradient; a DTensor is one over all ranks already."""
    if hasattr(x, "full_tensor"):
        return x.detach().full_tensor()
    if ranks() > 1:
        dist.all_reduce(x := x.detach().clone())
    return x


def sum_gradients(params):
    """Sums up the gradients of parameters that every rank has whole; FSDP2 does it for the others."""
    for p in params if ranks() > 1 else ():
        if p.grad is not None and not hasattr(p, "to_local"):
            dist.all_reduce(p.grad)


def local(x):
    """The rows of a tensor that this rank has, an alias: all if it is no DTensor."""
    return x.to_local() if hasattr(x, "to_local") else x


def whole(x):
    """A DTensor's rows of all ranks; another tensor as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def own_rows(full, x):
    """The rows of a tensor that this rank has of x."""
    if not hasattr(x, "to_local"):
        return full
    n = -(-len(x) // ranks())  # as FSDP2 shards
    return full[rank() * n : (rank() + 1) * n]


def all_rows(x):
    """(B, ...), the rows of the whole batch in its order, from those of this rank. Differentiable."""
    if ranks() == 1:
        return x
    from torch.distributed.tensor import DTensor, Partial, Shard

    shares = DTensor.from_local(x, mesh(x.device.type), [Shard(0)])
    full = shares.full_tensor(grad_placements=[Partial()])
    return full.unflatten(0, (ranks(), -1)).transpose(0, 1).flatten(0, 1)  # see Stream


def shard(source, dtype, device):
    """A model like `source`, sharded over the ranks, with the weights that rank 0 has there.

    A decoder layer is gathered when it is used, what is outside of the layers for each call of in_parts.
    """
    # takes a second, which one GPU does not need
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config, dtype=dtype)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(dtype, torch.float32))
    model.with_weights = lambda f, *batch: f(*batch)
    for module in (*decoder_layers(model), model):
        fully_shard(module, mesh=mesh(device.type), mp_policy=policy, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # shares of a loss: their gradients are summed
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "with_weights")
    model.to_empty(device=device)
    model.tie_weights()
    model.generation_config = source.generation_config
    there = dict(chain(source.named_parameters(), source.named_buffers()))
    with torch.no_grad():
        for name, x in chain(model.named_parameters(), model.named_buffers()):
            full = whole(there[name])
            full = torch.empty_like(full, device=device) if full.is_meta else full.to(device)
            dist.broadcast(full, 0)
            local(x).copy_(own_rows(full, x))
    return model


def twin(model):
    """A copy of a model, sharded as it is."""
    if ranks() == 1:
        return deepcopy(model)
    return shard(model, model.dtype, model.device).train(model.training)


def gathered(model):
    """The state dict of a sharded model, in host memory on rank 0; the others get an empty one."""
    found, copies = {}, {}
    for name, x in model.state_dict(keep_vars=True).items():
        if id(x) not in copies:  # tied weights are one tensor
            full = whole(x.detach())
            copies[id(x)] = None if rank() else full.cpu()
        found[name] = copies[id(x)]
    return {} if rank() else found


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
    text = "" if re.search("[\ud800-\udfff]", text) else text  # halves of characters, not UTF-8
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
    """Batches of a set of texts: stream[i] is the batch of step i (from 0), a function of (seed, purpose, i);
    on several GPUs every n-th row of it.

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
        ids, mask = (x[rank() :: ranks()].contiguous() for x in (ids, mask))  # padded alike on all ranks
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


def in_parts(model, f, *batch):
    """f(*batch) for an f that runs `model`; every forward pass of the repository is in one.

    f      of tensors (B, ...) to a tensor (B, ...) or a tuple of such, row by row; of no tensors to anything
    batch  goes to f in parts of model.micro_batch rows, if that is not 0 (--micro-batch). Of each only the
           result stays in memory: backward computes the rest again, part after part
    A model that is sharded over several GPUs has its weights inside f, and only there, see shard.
    """
    run = getattr(model, "with_weights", lambda f, *batch: f(*batch))
    size = getattr(model, "micro_batch", 0) or sys.maxsize
    if not batch or len(batch[0]) <= size:
        return run(f, *batch)

    def of_part(_, *part):
        again = torch.is_grad_enabled()  # in backward
        in_parts.left -= again
        hooks = []
        if again and ranks() > 1:  # in backward FSDP2 leaves what a forward pass gathered as it is
            layers = decoder_layers(model)
            hooks = [layer.register_forward_hook(lambda layer, *_: layer.reshard()) for layer in layers]
        try:
            return run(f, *part)
        finally:
            for hook in hooks:
                hook.remove()

    parts = [*zip(*(x.split(size) for x in batch))]
    in_parts.left += len(parts) * torch.is_grad_enabled()
    # reentrant checkpoints add to .grad, but only if an input has a gradient
    root = torch.ones((), requires_grad=True)
    found = [checkpoint(of_part, root, *x, use_reentrant=True, preserve_rng_state=False) for x in parts]
    return torch.cat(found) if isinstance(found[0], torch.Tensor) else tuple(map(torch.cat, zip(*found)))


in_parts.left = 0  # parts whose gradient is still to be computed


def layer_outputs(model, ids):
    """The outputs (B, T, D) of the L decoder layers on ids (B, T), a tuple; to be called in an f of in_parts.

    That is the residual stream before the final norm (3.4); the last of `hidden_states` is after it.
    """
    H = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: H.append(out[0] if type(out) is tuple else out))
        for layer in decoder_layers(model)
    ]
    try:
        model.base_model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:  # a hook that stays would keep the streams of every later pass in memory
            hook.remove()
    return tuple(H)


def residual_streams(model, ids):
    """See layer_outputs."""
    return in_parts(model, partial(layer_outputs, model), ids)


def batch_mean(x, weight):
    """Mean of x over the batch: (x * weight).sum() / weight.sum(), 0-d. weight: of x's shape, or a mask.

    On several GPUs it is this one's share: the sum of the shares is the mean over the whole batch.
    """
    return (x * weight).sum() / summed(weight.sum())


def scaled(model, x):
    """Logits as the model changes what its head gives: scaled (Cohere, Granite) or capped (Gemma 2)."""
    config = model.config.get_text_config()
    factor = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    x = x * factor if factor != 1 else x
    return cap * torch.tanh(x / cap) if cap else x


def logits(model, hidden):
    """Next-token logits (n, V), float32, from last hidden states (n, D)."""
    return scaled(model, model.get_output_embeddings()(hidden).float())


def token_losses(model, ids, mask, loss, at_once=1 << 25):
    """A loss on each next token of a batch, (B, T - 1), 0 on pads.

    ids, mask  (B, T) int64, right-padded; (B, T), true on tokens
    loss       loss(logits (n, V) float32, targets (n,)) -> (n,)
    at_once    logits in memory at a time: computed slice by slice, and again in backward
    """
    n = max(at_once // model.get_output_embeddings().weight.shape[0], 1)  # tokens per slice

    def of_slice(h, targets, keep):
        return loss(logits(model, h), targets).masked_fill(~keep, 0)

    def of_rows(ids, mask):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
        columns = [x.flatten(0, 1).split(n) for x in (hidden[:, :-1], ids[:, 1:], mask[:, 1:])]
        slices = [
            checkpoint(of_slice, *x, use_reentrant=False, preserve_rng_state=False) for x in zip(*columns)
        ]
        return torch.cat(slices)

    return in_parts(model, of_rows, ids, mask).view(ids.shape[0], -1)


def token_mean(model, ids, mask, loss, **more):
    """Mean of a loss over the unmasked next tokens of a batch. See token_losses and batch_mean."""
    return batch_mean(token_losses(model, ids, mask, loss, **more), mask[:, 1:])


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
        p, moments = local(self.params[j]), [local(moment[j]) for moment in self.moments]
        g, self.params[j].grad = local(self.params[j].grad), None
        key = (*key, j, rank()) if rank() else (*key, j)  # shares are rounded independently of each other
        for copy in self.wait_for:
            copy.wait(j)
        for moment in moments if t == 1 else ():
            moment.zero_()
        slices = -(-p.numel() // (1 << 24))  # they bound the float32 temporaries
        for n in range(1 if p.is_meta else slices):  # in a dry run the others hold no more
            self.update(t, lr, (*key, n), *(flat_slice(x, n << 24, 1 << 24) for x in (p, g, *moments)))
        torch.autograd.graph.increment_version(
            self.params[j]
        )  # autograd does not see what happens to an alias

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
    """Inside, backward calls act(j) as soon as the gradient of params[j] is complete, or else at the end.

    On several GPUs it is always at the end: FSDP2 adds a gradient, and calls hooks, once per forward pass.
    """
    done, alone = set(), launched()[1] == 1

    def act_once(j):
        if j not in done and params[j].grad is not None:
            done.add(j)
            act(j)

    def hook(_, j):
        act_once(j) if alone and not in_parts.left else None

    hooks = [p.register_post_accumulate_grad_hook(partial(hook, j=j)) for j, p in enumerate(params)]
    try:
        yield
        for j in reversed(range(len(params))):
            act_once(j)
    finally:
        in_parts.left = 0
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
        lists = [[local(x.detach()) for x in tensors] for tensors in lists]
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
    total = total if total.is_meta else summed(total)
    if not total.is_meta and not torch.isfinite(total):
        raise FloatingPointError(f"the loss is {total.item()} at step {step}")


# ---- log-probabilities ---------------------------------------------------------------------------------


def log_probs(model, hidden, targets):
    """log p (n, c) of targets (n, c) from last hidden states (n, D), in float32: bf16 logits tie."""
    head = model.get_output_embeddings()
    found = (head.weight[targets].float() @ hidden.float()[:, :, None]).squeeze(-1)  # (n, c)
    if head.bias is not None:
        found = found + head.bias[targets].float()
    return scaled(model, found) - logits(model, hidden).logsumexp(-1, keepdim=True)


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
        ids = torch.tensor([contexts[0][:P]], device=device)
        in_parts(model, lambda: model.base_model(ids, cache=prefix, use_cache=True))
    past = [(layer.keys, layer.values) for layer in prefix.layers]
    rows = sorted(rows, key=lambda row: len(row.ids))
    while rows:
        B = max(b for b in range(1, len(rows) + 1) if b == 1 or b * len(rows[b - 1].ids) <= budget * ranks())
        batch, rows = rows[:B], rows[B:]
        mine = batch[rank() :: ranks()] or batch[:1]  # every rank takes part in every forward pass
        ids = [torch.tensor(row.ids[P:]) for row in mine]
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
        B, T, mask = *ids.shape, None
        copy = DynamicCache([(k.expand(B, -1, -1, -1), v.expand(B, -1, -1, -1)) for k, v in past])
        if not windows:
            mask = torch.full((1, 1, T, P + T), -torch.inf, dtype=model.dtype, device=device).triu(P + 1)
        places = [(b, row.start - P + n) for b, row in enumerate(mine) for n in range(len(row.targets))]
        b, t = torch.tensor(places, device=device).T
        targets = torch.tensor([line for row in mine for line in row.targets], device=device)

        def scores():
            passed = model.base_model(ids, cache=copy, attention_mask=mask, use_cache=True)
            return log_probs(model, passed.last_hidden_state[b, t], targets)

        # shapes change with every batch, and cuDNN attention would plan each anew
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            found = in_parts(model, scores).cpu().split([len(row.targets) for row in mine])
        found = of_ranks([x.sum(0).tolist() for x in found])
        for n, row in enumerate(batch):
            if not all(
                map(math.isfinite, summary := found[n % ranks()][n // ranks()])
            ):  # argmax would answer
                fail("the model's log-probabilities are NaN or infinite: its weights are damaged; use others")
            yield row.key, summary
