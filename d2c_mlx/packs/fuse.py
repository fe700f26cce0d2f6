"""One task of a pack baked into the base model, for programs that load no adapters."""

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import cholesky
from threadpoolctl import threadpool_limits

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.checks import check_adapter
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.evaluate.capture import input_activations
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import LEAST_GAIN, Scorer
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.fused import FusedModel, round_compensated
from d2c_mlx.models.model import Model
from d2c_mlx.models.resolve import resolve_model
from d2c_mlx.models.stock import dense_weight, linear_shapes, load_stock
from d2c_mlx.models.tasks import answer_prompts, load_task
from d2c_mlx.packs.overwrite import check_output, mark
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.utils.errors import BudgetError, ModelError, PackError
from d2c_mlx.utils.files import write_dir
from d2c_mlx.utils.parsing import json_or_none

# Share of the gain that rounding should keep, and tokens whose inputs are read where it does not.
_ENOUGH, _MOST_TOKENS = 0.98, 2048

Json = dict[str, Any]


def fuse_task(
    pack: Path, output: Path, task: str, bits: int, most: int, tasks: Path | None, model: str | None
) -> Json:
    """Write the base model with one task's adapter in its weights, as an mlx-lm directory.

    `task` may be "" for the only one, and `most` bytes 0 for no limit. In `tasks` calibration rows
    decide, and held-out rows judge if there are any; the adapter answers rows without an answer.
    Without it nothing is measured. `model` is the pack's base in any bits, see `resolve_model`.

    Returns:
        `how` it was rounded, and `nbytes`; by base, adapter and ways to round, `losses` in nats per
        target token, and `kept`, shares of the gain; `present`, see `check_fused`.

    Raises:
        InputError: what cannot be fused; nothing is written.
    """
    source = load_pack(pack)
    task = task or ("" if len(source.tasks) > 1 else next(iter(source.tasks)))
    adapter = source.load(task)
    if adapter is None:
        raise PackError(f"{source.path}: the base model serves {task} as it is; fuse another task")
    check = partial(check_output, output, "fuse", [("pack", source.path)], model=model)
    check()
    base = Model(str(source.base_directory(model, exact=False)))
    check_adapter(adapter, base.module_shapes, source.path)
    sets = _rows(base, adapter, tasks / task) if tasks else []
    scorer = Scorer(Engine(base))
    losses = dict(zip(("base", "adapter"), scorer.losses([(None, sets), (adapter, sets)])))
    sizes, packed = dict[str, int](), Json()

    def kept(how: str, i: int) -> float:
        base, adapter, rounded = (losses[name][i] for name in ("base", "adapter", how))
        return float((base - rounded) / max(base - adapter, LEAST_GAIN))

    with write_dir(output, lambda _: check()) as temporary:
        for how in (
            ("to nearest", "error compensation", "8 bits for some") if bits < 16 else ("16 bit",)
        ):
            fused = FusedModel(base.path, adapter, bits)
            if how == "error compensation":
                packed = _compensated(base, adapter, sets[0], fused)
            fused.packed = dict(packed)
            if how == "8 bits for some":
                fused.widen(most - sizes["error compensation"])
            sizes[how] = fused.save(temporary / how)
            if 0 < most < sizes[how]:
                raise BudgetError(f"max_bytes: found {most:,}, {bits} bits take {sizes[how]:,}")
            (losses[how],) = Scorer(Engine(Model(str(temporary / how)))).losses([(None, sets)])
            if not sets or kept(how, 0) >= _ENOUGH or (packed and not most):
                break
        how = min(sizes, key=lambda name: losses[name][:1].tolist())
        shutil.copytree(temporary / how, temporary, dirs_exist_ok=True)
        for name in sizes:
            shutil.rmtree(temporary / name)
        mark(temporary, "fuse")
    return {
        "how": how,
        "nbytes": sizes[how],
        "losses": {name: float(x[-1]) for name, x in losses.items() if sets},
        "kept": {name: kept(name, -1) for name in losses if sets},
        "present": check_fused(str(output), adapter, str(base.path)),
    }


def _rows(base: Model, adapter: Adapter, directory: Path) -> list[ExampleSet]:
    """The calibration rows of a task, and its held-out rows if there are any."""
    rows = load_task(directory, tests=(directory / "test.jsonl").is_file(), prompts=True)
    if rows.asked:
        with tempfile.TemporaryDirectory() as answers:
            answer_prompts(base, [adapter], [rows], Path(answers))
            rows = rows.answered(Path(answers) / rows.name)
    return [base.encode(rows.name, kind) for kind in (rows.probe + rows.extra, rows.test) if kind]


def _compensated(base: Model, adapter: Adapter, rows: ExampleSet, fused: FusedModel) -> Json:
    """Round the linear modules of blocks by the inputs of rows: `FusedModel.packed`."""
    paths = [path for path in base.module_shapes if path in fused.forms]
    (inputs,) = input_activations(base, adapter, [rows], paths, _MOST_TOKENS)
    packed, factors = Json(), dict[int, np.ndarray]()
    with threadpool_limits(1):  # on matrices so small threads only wait for each other
        for path, x in inputs.items():
            if id(x) not in factors:  # modules with the same input share one
                gram = (x.T @ x).astype(np.float64)
                # Damped, because few rows span few directions.
                gram += (0.1 * np.trace(gram) / len(gram) + 1e-9) * np.eye(len(gram))
                factors[id(x)] = cholesky(np.linalg.inv(gram)).astype(np.float32)
            module = fused.modules[path]
            weight, dtype = np.array(dense_weight(module)), module.weight.dtype
            *parts, lost = round_compensated(weight, factors[id(x)], fused.form, dtype)
            packed[path] = [*parts, lost / np.square(x @ weight.T).sum()]
    return packed


def check_fused(model: str, adapter: Adapter | Path, base: str | None = None) -> Json:
    """How much of an adapter's update dW is in a model, quantized or not: W - W_base on dW.

    `adapter` is one of the base model, or its path; models are as for `resolve_model`.

    Returns:
        `share`: 1 is all of it, 0 is none; its standard `error` by what else is in W - W_base;
        `modules`: path -> share; and a `sentence`.

    Raises:
        InputError: one cannot be read, or they do not belong together.
    """
    (name, path), (_, plain) = resolve_model(model), resolve_model(base)
    theirs, ours = (dict(load_stock(x, lazy=True)[0].named_modules()) for x in (path, plain))
    shapes, others, sums = linear_shapes(ours.items()), linear_shapes(theirs.items()), {}
    if isinstance(adapter, Path):
        adapter = read_adapter(adapter, shapes, json_or_none(plain / "config.json"))
    for key, lora in adapter.modules.items():
        if others.get(key) != shapes[key]:
            raise ModelError(f"{path}: {key}: found {others.get(key)}, {shapes[key]} in {plain}")
        difference = dense_weight(theirs[key]) - dense_weight(ours[key])
        x, y = np.array(difference).ravel(), lora.delta().ravel()
        sums[key] = float(x @ y), float(y @ y) or 1e-30, float(x @ x), len(x)
    dot, norm, square, n = map(sum, zip(*sums.values()))
    if not np.isfinite(dot + square):
        raise ModelError(f"{path}: its weights or those of {plain} are not finite; get them anew")
    share, error = dot / norm, max(0.0, square / norm - (dot / norm) ** 2) ** 0.5 / n**0.5
    verdict = "contains" if share >= 0.9 else "has a part of" if share > 0.1 else "lacks"
    verdict = verdict if error < 0.05 else "is too noisy to tell of"
    sentence = f"{name} {verdict} {adapter.name}: {share:.1%} of its update is in the weights"
    sentence += f", give or take {2 * error:.1%} by rounding and other changes"
    modules = {key: dot / norm for key, (dot, norm, *_) in sums.items()}
    return {"share": share, "error": error, "modules": modules, "sentence": sentence}
