"""A pack in a program that uses mlx-lm: one line to load it, one to change the task; an answer."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate

from d2c_mlx.models.stock import load_stock, switch
from d2c_mlx.packs.pack import Pack, load_pack
from d2c_mlx.utils.device import on_cpu
from d2c_mlx.utils.errors import ConfigError, ModelError

__all__ = ["Question", "answer", "load", "stock_command"]


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


@dataclass(frozen=True)
class Question:
    """What `answer` is asked.

    Attributes:
        task: one of the pack's tasks.
        prompt: the user's message.
        system: the system message; None takes that of the task's calibration rows.
        max_tokens: most tokens of the answer.
    """

    task: str
    prompt: str
    system: str | None = None
    max_tokens: int = 256


def answer(pack: Pack, question: Question, directory: str) -> Iterator[str]:
    """Yield the answer to a question in pieces, greedily decoded.

    Args:
        pack: what `load_pack` verified.
        question: see `Question`.
        directory: the base model's mlx-lm directory.

    Raises:
        InputError: no such task or model, or a base whose chat template is missing or refuses the
            messages.
    """
    adapter = pack.load(question.task)
    path = pack.base_directory(directory, exact=False)
    model, tokenizer = load_stock(path)
    switch(model, adapter, pack.path)
    if on_cpu():
        # MLX's CPU backend is slow in 16 bit.
        model.set_dtype(mx.float32)
    if not tokenizer.has_chat_template:
        raise ModelError(
            f"{path}: has no chat template; use the adapter from a program of your own"
        )
    tokens = _tokens_of(pack, question, tokenizer)
    for step in stream_generate(model, tokenizer, tokens, max_tokens=question.max_tokens):
        yield step.text


def _tokens_of(pack: Pack, question: Question, tokenizer: Any) -> list[int]:  # noqa: ANN401
    messages = pack.messages(question.task, question.prompt, question.system)
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's authors
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        field, text, remedy = "prompt", question.prompt, "change it as the template asks"
        if question.system is not None:
            field, text, remedy = "system", question.system, "leave --system out"
        raise ConfigError(
            f"{field}: found {text[:40]!r}, expected what the model's chat template takes: it"
            f" refuses this ({why}); {remedy}"
        ) from None


def stock_command(pack: Pack, question: Question, directory: str) -> str:
    """The command of stock mlx-lm that answers alike, after `export` unless the pack is plain."""
    key = pack.tasks[question.task]
    folder, before = str(pack.path), ""
    if pack.storage != "plain":
        folder = f"{pack.path.resolve().name}-plain"
        path, output = shlex.quote(str(pack.path)), shlex.quote(folder)
        before = f"d2c-mlx export {path} --to mlx --output {output}\n"
    name = f"cluster-{key}" if isinstance(key, int) else key and key.removesuffix(".gguf")
    adapter = "" if name is None else f" --adapter-path {shlex.quote(f'{folder}/{name}')}"
    first = pack.messages(question.task, "", question.system)[0]
    system = (
        f" --system-prompt {shlex.quote(first['content'])}" if first["role"] == "system" else ""
    )
    return (
        f"{before}mlx_lm.generate --model {shlex.quote(directory)}{adapter}{system} --prompt"
        f" {shlex.quote(question.prompt)} --max-tokens {question.max_tokens}"
    )
