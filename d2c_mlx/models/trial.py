"""A trial of a received model's tokenizer and chat template, in a child process with bounds.

A template is a program, and a tokenizer is a list of replacements: either may run for ever, fill
the memory or end the process.
"""

import subprocess
from pathlib import Path

from d2c_mlx.utils.child import bounded
from d2c_mlx.utils.errors import ModelError

# Files that decide what a trial does.
TRIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Seconds of a core and bytes that it may take; real ones take a second and some hundred MB.
_SECONDS, _MEMORY = 10, 3 << 30
# An error in words is left to the caller, who tells its place. transformers renders alike, but its
# import takes forty times as long.
_CODE = """
import json, pathlib, re
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
folder = pathlib.Path(sys.argv[1])
text = "Write 3 words:\\n\\tone, two and  three."
def refuse(message):
    raise ValueError(message)
try:
    path = folder / "chat_template.jinja"
    if path.exists():
        source = path.read_text()
    else:
        source = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    if isinstance(source, list):
        source = {template["name"]: template["template"] for template in source}
    source = source["default"] if isinstance(source, dict) else source
    source = re.sub(r"{%-?\\s*(end)?generation\\s*-?%}", "", source)
    loops = ["jinja2.ext.loopcontrols"]
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
    jinja.filters["tojson"] = lambda value, **_: json.dumps(value)
    jinja.globals.update(raise_exception=refuse, strftime_now=lambda form: form)
    turns = [{"role": role, "content": text} for role in ("user", "assistant", "user")]
    text = jinja.from_string(source).render(messages=turns, add_generation_prompt=True, tools=None,
                                            bos_token="<s>", eos_token="</s>")
except MemoryError:
    sys.exit(1)
except Exception:
    pass
if len(text) > 1_000_000:
    sys.exit(1)
try:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.decode(tokenizer.encode(text).ids)
except MemoryError:
    sys.exit(1)
except Exception:
    pass
"""


def try_texts(directory: Path) -> str:
    """Render and tokenize a short conversation as a model's files ask; returns "good".

    Raises:
        ModelError: it takes too long or too much memory, or ends the process.
    """
    command = [*bounded(_CODE, _SECONDS, _MEMORY), str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=6 * _SECONDS)
        failed = done.returncode != 0
    except subprocess.TimeoutExpired:
        failed = True
    if failed:
        raise ModelError(
            f"{directory}: its tokenizer or chat template takes more than {_SECONDS} s,"
            f" {_MEMORY >> 30} GB or a million characters for a short conversation, or ends its"
            " process; take the model from its publisher"
        )
    return "good"
