"""llama.cpp from Python, where it is installed: `pip install llama-cpp-py-sync` compiles nothing.

Its C functions are called as they are, not its class of models: so nothing between us and llama.cpp
can pass over an adapter.
"""

from functools import cache

import numpy as np

from d2c_mlx.utils.device import machine

F32 = 0  # LLAMA_FTYPE_ALL_F32 and GGML_TYPE_F32


@cache
def llama_cpp():
    """CFFI's `ffi` and llama.cpp's library, its log dropped.

    Raises:
        SystemExit: it is not installed; in one line.
    """
    try:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
    except ModuleNotFoundError:
        raise SystemExit("llama.cpp is not here: pip install llama-cpp-py-sync") from None
    ffi, lib = get_ffi(), get_lib()
    # Kept beside the function: C calls it as long as the process lives.
    llama_cpp.silent = ffi.callback("void(int, const char *, void *)", lambda *_: None)
    lib.llama_log_set(ffi.cast("ggml_log_callback", llama_cpp.silent), ffi.NULL)
    lib.llama_backend_init()
    return ffi, lib


def conditions():
    """The machine and the llama.cpp of a result."""
    from llama_cpp_py_sync._version import __llama_cpp_tag__

    return {"machine": machine(), "llama_cpp": __llama_cpp_tag__}


class LlamaCpp:
    """A base model in llama.cpp, which computes and caches in float32 where it can."""

    def __init__(self, model, context=1024):
        """Load a .gguf; raises SystemExit where llama.cpp does not take it."""
        ffi, lib = llama_cpp()
        self.model = lib.llama_model_load_from_file(
            str(model).encode(), lib.llama_model_default_params()
        )
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {model}")
        options = lib.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = context
        options.n_threads = options.n_threads_batch = 1
        options.type_k = options.type_v = F32
        # Flash attention rounds to float16.
        options.flash_attn_type = 0
        self.context = lib.llama_init_from_model(self.model, options)
        self.n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(context, 0, 1)

    def attach(self, path):
        """Compute with one adapter from now on, None is the base; raises SystemExit if refused."""
        ffi, lib = llama_cpp()
        some = [lib.llama_adapter_lora_init(self.model, str(path).encode())] if path else []
        if some and not some[0]:
            raise SystemExit(f"llama.cpp does not load {path}")
        if lib.llama_set_adapters_lora(self.context, some, len(some), [1.0] * len(some)):
            raise SystemExit(f"llama.cpp does not take {path}")

    def logits(self, tokens, first=0):
        """Logits after every token from the first wanted on, float32 `(tokens, vocabulary)`."""
        ffi, lib = llama_cpp()
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        batch, n = self.batch, len(tokens)
        batch.n_tokens = n
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, i >= first
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if lib.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp could not compute the logits")
        n -= first
        raw = ffi.buffer(lib.llama_get_logits(self.context), 4 * n * self.n_vocab)
        return np.frombuffer(raw, np.float32).reshape(n, self.n_vocab).copy()

    def close(self):
        """Free model and context."""
        _, lib = llama_cpp()
        lib.llama_batch_free(self.batch)
        lib.llama_free(self.context)
        lib.llama_model_free(self.model)


def in_float32(source, path):
    """Have llama.cpp write a model with float32 weights."""
    ffi, lib = llama_cpp()
    options = ffi.new("llama_model_quantize_params *", lib.llama_model_quantize_default_params())
    options.ftype, options.allow_requantize = F32, True
    if lib.llama_model_quantize(str(source).encode(), str(path).encode(), options):
        raise SystemExit(f"llama.cpp could not write {path}")
    return path
