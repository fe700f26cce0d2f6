"""A pack in a program that uses mlx-lm: one line to load it, one to change the task; an answer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate

from d2c_mlx.models.stock import load_stock, switch
from d2c_mlx.packs.pack import Pack, load_pack
from d2c_mlx.utils.device import on_cpu
from d2c_mlx.utils.errors import ConfigError, ModelError


def load(
    pack: str | Path | Pack, task: str | None = None, model: str | None = None
) -> tuple[Any, Any]:
    """Load a pack's base model as `mlx_lm.load` does, with the adapter of a task attached.

    To change the task later, call `Pack.switch`.

    Args:
        pack: its directory or its run's, which is verified first, or a `Pack` from `load_pack`.
        task: one of `pack.tasks`; None attaches no adapter.
        model: the pack's base model: an mlx-lm directory, a `.gguf` file, or a Hugging Face id (the
            only one that may use the network). None works if the base is the embedded default.

    Returns:
        The mlx-lm model and its tokenizer.

    Raises:
        InputError: no such pack, task or model, or adapters of another base model.
    """
    if not isinstance(pack, Pack):
        pack = load_pack(pack)
    adapter = None if task is None else pack.load(task)
    loaded, tokenizer = load_stock(pack.base_directory(model, exact=False))
    switch(loaded, adapter, pack.path)
    return loaded, tokenizer


def answer(
    pack: Pack,
    task: str,
    prompt: str,
    model: str | None = None,
    system: str | None = None,
    max_tokens: int = 256,
) -> Iterator[str]:
    """Yield the answer to a prompt in pieces, greedily decoded.

    Args:
        pack: what `load_pack` verified.
        task: one of its tasks.
        prompt: the user's message.
        model: the base model, as for `load`.
        system: the system message; None takes that of the task's calibration rows.
        max_tokens: most tokens of the answer.

    Raises:
        InputError: no such task or model, or a base whose chat template is missing or refuses the
            messages.
    """
    loaded, tokenizer = load(pack, task, model)
    if on_cpu():
        # MLX's CPU backend is slow in 16 bit.
        loaded.set_dtype(mx.float32)
    if not tokenizer.has_chat_template:
        raise ModelError("the model has no chat template; use the adapter from a program of yours")
    messages = pack.messages(task, prompt, system)
    try:
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's authors
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        field = "prompt" if system is None else "system"
        remedy = "change it as the template asks, or leave it out"
        raise ConfigError(f"{field}: the chat template refuses it ({why}); {remedy}") from None
    for step in stream_generate(loaded, tokenizer, tokens, max_tokens=max_tokens):
        yield step.text
