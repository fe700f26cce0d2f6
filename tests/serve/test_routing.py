"""Routing by hidden states: against states read off the whole model, and its files."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import pack_of
from helpers.command import problems_of
from helpers.damage import rehash
from helpers.tiny import LAYERS, library, task
from safetensors.numpy import load_file, save_file

from d2c_mlx import load_pack, read_adapter
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.add import add_adapter
from d2c_mlx.serve import router as routing
from d2c_mlx.serve.router import ROUTER, fit_router, load_router, route_prompts, save_router
from d2c_mlx.utils.errors import InputWarning, PackError
from d2c_mlx.utils.files import hash_tree, locked


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """A model, three adapters, their tasks with prompts of their own, the base."""
    paths = library(tmp_path_factory.mktemp("routing"), list("abc"))
    for name, words in (("a", "Write the number"), ("b", "Who is it? Answer"), ("c", "zzz q q")):
        rows = [{"prompt": f"{words} {i} of {name}", "completion": "x"} for i in range(12)]
        task(paths.tasks, name, 6, rows=rows)
    base = Model(str(paths.model))
    probes = [base.encode(n, load_task(paths.tasks / n).probe) for n in "abc"]
    return paths, base, probes


@pytest.fixture
def pack(routed, tmp_path):
    paths, base, _ = routed
    adapters = [read_adapter(paths.adapters / n, base.module_shapes) for n in "abc"]
    adapters = [replace(adapter, sources=(adapter.name,)) for adapter in adapters]
    return pack_of(base, adapters, tmp_path / "run" / "pack", budget="3")


def prompts_of(examples):
    return [row.tokens[: row.offset] for row in examples.examples]


def test_a_state_is_the_mean_of_a_prompts_tokens_whatever_the_batch(routed):
    """Beside one prompt at a time through the model's own blocks."""
    _, base, probes = routed
    prompts = [p for rows in probes for p in prompts_of(rows)] + [(7,)]
    inner = base.model.model
    for prompt, state in zip(prompts, routing.prompt_states(base.model, prompts, 1)):
        alone = np.array(inner.layers[0](inner.embed_tokens(mx.array([prompt])), "causal"))[0]
        alone = alone[1:] if len(prompt) > 1 else alone
        np.testing.assert_allclose(state, alone.mean(axis=0), atol=1e-5)


def test_prompts_of_a_task_are_routed_to_it_and_others_to_none(routed):
    paths, base, probes = routed
    router = fit_router(base.model, probes)
    assert router.n_blocks == LAYERS // 2 + 1 and router.tasks == ("a", "b", "c")
    right = 0
    for name in "abc":
        tests = base.encode(name, load_task(paths.tasks / name).test)
        states = router.states(base.model, prompts_of(tests))
        right += sum(router.matches(state)[0].task == name for state in states)
    # Of a random model's states, where a third would be chance.
    assert right >= 15 and replace(router, threshold=1.1).best(states[0]) is None


def test_one_odd_prompt_or_channel_does_not_decide(pack):
    """Some models have single hidden channels of 100,000 and more, beyond float16."""
    rng = np.random.default_rng(0)
    states = {name: np.eye(16)[k] + 0.075 * rng.normal(size=(10, 16))
              for k, name in enumerate("abc")}  # fmt: skip
    signs = np.where(np.arange(10) == 3, -1, 1)[:, None]
    odd = routing.router_from_states({**states, "a": signs * states["a"]}, 1)
    assert odd.threshold > 0.5 and odd.best(-np.ones(16)) is None
    for x in states.values():
        x[:, 9] += 1e5 + 50 * np.random.default_rng(len(x)).normal(size=len(x))
    router = routing.router_from_states(states, 1)
    again = load_router(save_router(pack, router))
    assert router.accuracy == 1 and again.centre[9] > 9e4
    np.testing.assert_allclose(again.spread, router.spread, rtol=1e-6)
    assert [again.matches(x[0])[0].task for x in states.values()] == list("abc")


def test_kept_in_the_pack_and_dropped_with_a_change_of_its_tasks(command, routed, pack, tmp_path):
    """Its bytes count; reading waits for nobody, and what changes the pack says what it can do."""
    start = ["route", pack.path, "--model", routed[0].model]
    assert command(*start, "anything")[0] == 2
    # Only calibration rows are needed.
    tasks = shutil.copytree(routed[0].tasks, tmp_path / "tasks",
                            ignore=shutil.ignore_patterns("test.jsonl"))  # fmt: skip
    assert command(*start, "--tasks", tasks)[1] == f"{pack.path}: router fitted\n"
    kept = load_pack(pack.path)
    assert kept.nbytes - pack.nbytes == (kept.path / ROUTER).stat().st_size
    prompts = ["Write the number 11 of a", "zzz q q 9 of c"]
    with locked(pack.path.parent):
        rows = json.loads(command(*start, *prompts, "--json")[1])
        assert [row["matches"][0]["task"] for row in rows] == ["a", "c"]
        assert len(rows[0]["matches"]) == 3 and rows[0]["prompt"] == prompts[0]
        for words in ([*start, "--tasks", tasks], ["remove", pack.path, "a"]):
            code, _, err = command(*words)
            assert code and "another process is running here" in err and "--output" not in err
    fits = f"its router is gone, fit another with d2c-mlx route {pack.path} --tasks DIR"
    assert fits in command("remove", pack.path, "a")[1]
    assert load_router(load_pack(pack.path)) is None
    assert "router" not in command("remove", pack.path, "b")[1]


def test_a_router_that_is_not_good_enough_is_said(routed, pack, tmp_path):
    paths, base, _ = routed
    for name in "abc":
        rows = [{"prompt": f"The same {i}", "completion": "x"} for i in range(6)]
        task(tmp_path / "tasks", name, 6, rows=rows)
    with pytest.warns(InputWarning, match="router: .* find their task .* expected 95%"):
        route_prompts(pack.path, [], tasks=tmp_path / "tasks", model=str(paths.model))
    few, two = (ExampleSet("few", (Example((1, 2, 3), 2),) * n) for n in (1, 2))
    text = ExampleSet("text", (Example((1, 2, 3), 0), Example((1, 2), 0)))
    assert len(problems_of(fit_router, base.model, [few, two, text])) == 2


def test_without_room_nothing_is_changed(command, routed, tmp_path):
    """What an arrival needs, the router gives back."""
    paths, base, probes = routed
    adapters = {n: read_adapter(paths.adapters / n, base.module_shapes) for n in "abc"}
    slots = [replace(adapters["a"], sources=("a",)), replace(adapters["b"], sources=("b", "c"))]
    packed = partial(pack_of, base, slots, tmp_path / "pack", budget="9MB")
    size = packed().nbytes
    pack = packed(max_bytes=size + 10)
    before, router = hash_tree(pack.path), fit_router(base.model, probes)
    with pytest.raises(PackError, match="over the budget of .*; give one that has room") as no:
        save_router(pack, router)
    # The budget that the line names is just enough.
    words = ["route", pack.path, "--model", paths.model, "--tasks", paths.tasks, "--budget"]
    least = int(re.search(r"--budget (\d+)B", str(no.value))[1])
    for budget in ("2", f"{least - 1}B"):
        assert command(*words, budget)[0] == 2 and hash_tree(pack.path) == before
    assert command(*words, f"{least}B")[0] == 0 and load_pack(pack.path).nbytes == least
    exact = size + adapters["c"].uniform(mx.float16).nbytes(LAYERS)
    pack = save_router(packed(max_bytes=exact), router)
    arrival = add_adapter(pack, replace(adapters["c"], name="new"))
    assert (arrival.adapter, arrival.joined) == ("cluster-2", ())
    assert arrival.pack.nbytes == exact


@pytest.mark.parametrize("damage", ["shape", "nan", "tasks", "words", "cut"])
def test_a_damaged_router_is_refused(routed, pack, damage):
    _, base, probes = routed
    path = save_router(pack, fit_router(base.model, probes)).path / ROUTER
    tensors = load_file(path)
    about = {"tasks": [*"axc"] if damage == "tasks" else [*"abc"], "n_blocks": 1, "accuracy": 1,
             "threshold": "half" if damage == "words" else 0.5, "system": None}  # fmt: skip
    if damage == "shape":
        tensors["directions"] = tensors["directions"][:2]
    if damage == "nan":
        tensors["centre"][0] = np.nan
    save_file(tensors, path, metadata={"router": json.dumps(about)})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    rehash(pack.path)
    pytest.raises(PackError, load_router, load_pack(pack.path)).match("no router of this pack")
