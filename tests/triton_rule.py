"""The update that a GPU would run, without a GPU: torch.compile's Triton source, compiled for an H100 and
run in Triton's interpreter."""

import re
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET, BLOCK = GPUTarget("cuda", 90, 32), 1024
HEAD = "import triton\nimport triton.language as tl\n"
CUDA = "from torch._inductor.runtime.triton_helpers import libdevice\n"  # which the interpreter has not
INTERPRETED = "class libdevice:\n    isnan = staticmethod(lambda x: x != x)\n"


def function(source, interpret):
    path = Path(tempfile.mkdtemp()) / "kernel.py"  # triton reads a function's source from its file
    path.write_text(HEAD + (INTERPRETED if interpret else CUDA) + source[source.index("@triton.jit") :])
    scope = {"__name__": "kernel", "__file__": str(path)}
    with mock.patch.object(triton.knobs.runtime, "interpret", interpret):
        exec(compile(path.read_text(), str(path), "exec"), scope)
    return next(v for k, v in scope.items() if k.startswith("triton_poi"))


def on_a_gpu(compiled, *args):
    """Calls a function that torch.compile made, with tensors on the CPU, as above; PTX of its kernels."""
    ptx = []

    def launch(source, *args, stream=None):
        signature = eval(re.search(r"'signature': (\{.*?\})", source)[1])
        kernel = ASTSource(function(source, False), signature, {"XBLOCK": BLOCK})
        ptx.append(triton.compile(kernel, target=TARGET).asm["ptx"])
        function(source, True)[(triton.cdiv(args[-1], BLOCK),)](*args, XBLOCK=BLOCK)

    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: TARGET))
    torch.compiler.reset()
    options = dict(cpu_backend="triton", compile_threads=1, force_disable_caches=True)
    make = lambda self, name, source, *_, **__: SimpleNamespace(run=partial(launch, source))  # noqa: E731
    with config.patch(options), mock.patch.object(AsyncCompile, "triton", make):
        compiled(*args)
    torch.compiler.reset()
    return ptx
