"""llama.cpp from Python, where it is installed: `pip install llama-cpp-python` compiles it."""

from functools import cache

F32 = 0  # LLAMA_FTYPE_ALL_F32 and GGML_TYPE_F32


@cache
def llama_cpp():
    """The module `llama_cpp`, its log dropped.

    Raises:
        SystemExit: it is not installed; in one line.
    """
    try:
        import llama_cpp as module
    except ModuleNotFoundError:
        raise SystemExit("llama.cpp is not here: pip install llama-cpp-python") from None
    # Kept beside the module: C calls it as long as the process lives.
    module.silent = module.llama_log_callback(lambda level, text, user_data: None)
    module.llama_log_set(module.silent, None)
    return module
