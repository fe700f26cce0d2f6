"""Routing by hidden states: against states read off the whole model, and its files."""

import json
import re
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from d2c_mlx_cli.main import cli
from helpers.full import no_room
from helpers.tiny import LAYERS, library, write_jsonl
from safetensors.numpy import load_file, save_file

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.add import add_adapter
from d2c_mlx.packs.export import verify
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.write import remove_tasks, write_pack
from d2c_mlx.serve.router import (
    ROUTER,
    Router,
    fit_router,
    load_router,
    prompt_states,
    route_prompts,
    router_from_states,
    save_router,
)
from d2c_mlx.utils.errors import InputError, InputWarning, PackError, TaskError
from d2c_mlx.utils.files import hash_file, hash_tree, locked


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, three adapters, their tasks with prompts of their own, the base."""
    paths = library(tmp_path_factory.mktemp("routing"), list("abc"))
    for name, words in (("a", "Write the number"), ("b", "Who is it? Answer"), ("c", "zzz q q")):
        rows = [{"prompt": f"{words} {i} of {name}", "completion": "x"} for i in range(12)]
        write_jsonl(paths.tasks / name / "probe.jsonl", rows[:6])
        write_jsonl(paths.tasks / name / "test.jsonl", rows[6:])
    base = Model(str(paths.model))
    probes = [base.encode(n, load_task(paths.tasks / n).probe) for n in "abc"]
    return paths, base, probes


@pytest.fixture
def pack(made, tmp_path):
    paths, base, _ = made
    found = [replace(read_adapter(paths.adapters / n, base.module_shapes), sources=(n,))
             for n in "abc"]  # fmt: skip
    return write_pack(
        tmp_path / "run" / "pack",
        found,
        Manifest(model="m", config_hash=base.config_hash, n_layers=LAYERS, budget="3"),
    )


def prompts_of(examples):
    return [row.tokens[: row.offset] for row in examples.examples]


def test_a_state_is_the_mean_of_a_prompts_tokens_whatever_the_batch(made):
    """Beside one prompt at a time through the model's own blocks."""
    _, base, probes = made
    prompts = [p for one in probes for p in prompts_of(one)] + [(7,)]
    together = prompt_states(base.model, prompts, 1)
    inner = base.model.model
    for prompt, state in zip(prompts, together):
        x = inner.embed_tokens(mx.array([prompt]))
        alone = np.array(inner.layers[0](x, "causal"))[0]
        alone = alone[1:] if len(prompt) > 1 else alone
        np.testing.assert_allclose(state, alone.mean(axis=0), atol=1e-5)


def test_prompts_of_a_task_are_routed_to_it_and_others_to_none(made):
    paths, base, probes = made
    router = fit_router(base.model, probes)
    assert router.n_blocks == LAYERS // 2 + 1 and router.tasks == ("a", "b", "c")
    np.testing.assert_allclose(np.linalg.norm(router.directions, axis=1), 1, atol=1e-6)
    right = 0
    for name in "abc":
        tests = base.encode(name, load_task(paths.tasks / name).test)
        states = router.states(base.model, prompts_of(tests))
        right += sum(router.matches(state)[0].task == name for state in states)
    # Of a random model's states, where a third would be chance.
    assert right >= 15
    # With its own prompt a task is nearer than without.
    own = [router.states(base.model, prompts_of(one)) for one in probes]
    assert {router.best(x).task for states in own for x in states} == set("abc")
    assert replace(router, threshold=1.1).best(own[0][0]) is None


def test_matches_are_cosines_and_the_nearest_comes_first():
    router = Router(("a", "b"), np.zeros(2), np.ones(2), np.array([[1.0, 0], [0, 1]]), 0.5, 1)
    assert [m.task for m in router.matches(np.array([0.6, 0.8]), 2)] == ["b", "a"]
    assert router.matches(np.array([0.6, 0.8]))[0].similarity == pytest.approx(0.8)
    # What the best match is below is none, ties go to the first.
    assert router.matches(np.array([1.0, 1.0]))[0].task == "a"


def clouds(n=10, noise=0.3):
    """States of three tasks around directions of their own."""
    rng = np.random.default_rng(0)
    return {name: np.eye(16)[k] + noise * rng.normal(size=(n, 16)) / 4
            for k, name in enumerate("abc")}  # fmt: skip


def test_one_odd_prompt_does_not_set_the_threshold():
    states = clouds()
    usual = router_from_states(states, 1)
    states["a"][3] = -states["a"][3]
    odd = router_from_states(states, 1)
    assert usual.threshold > 0.5 and odd.threshold > 0.5
    assert odd.best(-np.ones(16)) is None


def test_channels_are_brought_to_one_scale(pack):
    states = clouds()
    for x in states.values():
        x[:, 9] += 50 * np.random.default_rng(len(x)).normal(size=len(x))
    router = router_from_states(states, 1)
    assert router.accuracy == 1
    again = load_router(save_router(pack, router))
    np.testing.assert_allclose(again.spread, router.spread, rtol=1e-6)
    assert [again.matches(x[0])[0].task for x in states.values()] == list("abc")


def test_a_router_that_is_not_good_enough_is_said(made, pack, tmp_path):
    paths, _, _ = made
    for name in "abc":
        rows = [{"prompt": f"The same {i}", "completion": "x"} for i in range(6)]
        write_jsonl(tmp_path / "tasks" / name / "probe.jsonl", rows)
    about = {"tasks": tmp_path / "tasks", "model": str(paths.model)}
    with pytest.warns(InputWarning, match="router: .* find their task .* expected 95%"):
        route_prompts(pack.path, [], **about)


def test_kept_in_the_pack_and_read_again(made, pack):
    _, base, probes = made
    router = fit_router(base.model, probes)
    assert load_router(pack) is None
    before = {task: pack.load(task).digest for task in pack.tasks}
    kept = save_router(pack, router)
    assert kept.nbytes - pack.nbytes == (kept.path / ROUTER).stat().st_size
    assert {task: kept.load(task).digest for task in kept.tasks} == before
    again = load_router(verify(kept.path))
    assert (again.tasks, again.n_blocks) == (router.tasks, router.n_blocks)
    assert again.threshold == pytest.approx(router.threshold)
    np.testing.assert_allclose(again.directions, router.directions, atol=1e-3)
    # Another replaces it; a pack with other tasks has none.
    assert save_router(kept, router).nbytes == kept.nbytes
    assert load_router(remove_tasks(kept, ["c"])) is None


def test_channels_beyond_float16_are_kept(pack):
    """Some models have single hidden channels of 100,000 and more."""
    rng = np.random.default_rng(0)
    states = {n: rng.normal(size=(3, 32)).astype(np.float32) + 3 * i for i, n in enumerate("abc")}
    for some in states.values():
        some[:, 5] += 1e5
    router = router_from_states(states, 1)
    again = load_router(save_router(pack, router))
    assert again.centre.tolist() == router.centre.tolist() and again.centre[5] > 9e4
    assert [again.matches(some[0])[0].task for some in states.values()] == list("abc")


def test_no_room_on_the_disk_is_an_error_of_the_system(pack):
    rng = np.random.default_rng(0)
    router = router_from_states({n: rng.normal(size=(3, 5000)) for n in "abc"}, 1)
    before = hash_tree(pack.path)
    assert max(entry.nbytes for entry in pack.manifest.files.values()) < 20_000
    with pytest.raises(OSError, match="File too large"), no_room(20_000):
        save_router(pack, router)
    assert hash_tree(pack.path) == before
    assert (save_router(pack, router).path / ROUTER).stat().st_size > 20_000


def test_its_bytes_count(made, tmp_path):
    paths, base, probes = made
    one = replace(read_adapter(paths.adapters / "a", base.module_shapes), sources=("a", "b", "c"))
    about = {"model": "m", "config_hash": base.config_hash, "n_layers": LAYERS, "budget": "9MB"}
    size = write_pack(tmp_path / "pack", [one], Manifest(**about)).nbytes
    pack = write_pack(tmp_path / "pack", [one], Manifest(**about, max_bytes=size + 10))
    before = hash_tree(pack.path)
    with pytest.raises(PackError, match="over the budget of .*; give one that has room") as no:
        save_router(pack, fit_router(base.model, probes))
    assert hash_tree(pack.path) == before
    # The budget that the line names is just enough.
    command = ["route", str(pack.path), "--model", str(paths.model), "--tasks", str(paths.tasks)]
    least = re.search(r"--budget (\d+)B", str(no.value))[1]
    for budget, text in (("2", "expected bytes"), (f"{int(least) - 1}B", "over the budget")):
        done = CliRunner().invoke(cli, [*command, "--budget", budget])
        assert text in str(done.exception) and hash_tree(pack.path) == before
    CliRunner().invoke(cli, [*command, "--budget", f"{least}B"], catch_exceptions=False)
    assert load_router(load_pack(pack.path)) and load_pack(pack.path).nbytes == int(least)


def test_its_bytes_are_free_for_an_arrival(made, tmp_path):
    """Which drops it; room for an adapter and no router is enough for a slot of its own."""
    paths, base, probes = made
    found = {n: read_adapter(paths.adapters / n, base.module_shapes) for n in "abc"}
    slots = [replace(found["a"], sources=("a",)), replace(found["b"], sources=("b", "c"))]
    about = {"model": "m", "config_hash": base.config_hash, "n_layers": LAYERS, "budget": "9MB"}
    size = write_pack(tmp_path / "pack", slots, Manifest(**about)).nbytes
    exact = size + found["c"].uniform(mx.float16).nbytes(LAYERS)
    pack = save_router(
        write_pack(tmp_path / "pack", slots, Manifest(**about, max_bytes=exact)),
        fit_router(base.model, probes),
    )
    assert pack.nbytes > size
    arrival = add_adapter(pack, replace(found["c"], name="new"))
    assert (arrival.adapter, arrival.joined) == ("cluster-2", ())
    assert arrival.pack.nbytes == exact


@pytest.mark.parametrize("damage", ["shape", "nan", "tasks", "words", "cut"])
def test_a_damaged_router_is_refused(made, pack, damage):
    _, base, probes = made
    pack = save_router(pack, fit_router(base.model, probes))
    path = pack.path / ROUTER
    tensors = load_file(path)
    about = {"tasks": ["a", "b", "c"], "threshold": 0.5, "n_blocks": 1,
             "accuracy": 1, "system": None}  # fmt: skip
    if damage == "shape":
        tensors["directions"] = tensors["directions"][:2]
    elif damage == "nan":
        tensors["centre"][0] = np.nan
    elif damage == "tasks":
        about["tasks"][1] = "x"
    elif damage == "words":
        about["threshold"] = "half"
    save_file(tensors, path, metadata={"router": json.dumps(about)})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    manifest = json.loads((pack.path / "manifest.json").read_text())
    manifest["files"][ROUTER] = {"nbytes": path.stat().st_size, "sha256": hash_file(path)}
    manifest["nbytes"] = sum(entry["nbytes"] for entry in manifest["files"].values())
    (pack.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PackError, match="no router of this pack"):
        load_router(load_pack(pack.path))


def test_what_cannot_be_fitted(made):
    _, base, _ = made
    one = ExampleSet("few", (Example((1, 2, 3), 2),))
    text = ExampleSet("text", (Example((1, 2, 3), 0), Example((1, 2), 0)))
    with pytest.raises(TaskError) as caught:
        fit_router(base.model, [one, text])
    assert len(caught.value.problems) == 2


def test_only_probe_rows_are_needed(made, pack, tmp_path):
    paths, _, _ = made
    for name in "abc":
        (tmp_path / "tasks" / name).mkdir(parents=True)
        rows = paths.tasks / name / "probe.jsonl"
        shutil.copyfile(rows, tmp_path / "tasks" / name / "probe.jsonl")
    route_prompts(pack.path, [], tasks=tmp_path / "tasks", model=str(paths.model))
    assert load_router(load_pack(pack.path)).tasks == ("a", "b", "c")
    (tmp_path / "tasks" / "b" / "probe.jsonl").unlink()
    with pytest.raises(InputError) as caught:
        route_prompts(pack.path, [], tasks=tmp_path / "tasks", model=str(paths.model))
    (line,) = caught.value.problems
    assert "b/probe.jsonl: missing" in line and "test.jsonl" not in line


def test_on_the_command_line(made, pack):
    paths, _, _ = made
    runner = CliRunner()
    start = ["route", str(pack.path), "--model", str(paths.model)]
    result = runner.invoke(cli, [*start, "anything"])
    assert isinstance(result.exception, InputError) and "has no router" in str(result.exception)
    result = runner.invoke(cli, [*start, "--tasks", str(paths.tasks)], catch_exceptions=False)
    assert result.output == f"{pack.path}: router fitted\n"
    prompts = ["Write the number 11 of a", "zzz q q 9 of c"]
    rows = json.loads(runner.invoke(cli, [*start, *prompts, "--json"]).output)
    assert [row["matches"][0]["task"] for row in rows] == ["a", "c"]
    assert len(rows[0]["matches"]) == 3 and rows[0]["prompt"] == prompts[0]
    result = runner.invoke(cli, [*start, *prompts, "--top", "1"], catch_exceptions=False)
    assert len(result.output.splitlines()) == 2
    # Reading it waits for nobody; what would change the pack says what it can do.
    adapter = str(paths.adapters / "a")
    with locked(pack.path.parent):
        again = json.loads(runner.invoke(cli, [*start, *prompts, "--json"]).output)
        assert again == rows
        for command in ([*start, "--tasks", str(paths.tasks)], ["remove", str(pack.path), "a"],
                        ["add", str(pack.path), f"z={adapter}"]):  # fmt: skip
            message = str(runner.invoke(cli, command).exception)
            assert "another process is running here; it may replace the pack" in message
            assert "--output" not in message
    # An arrival drops the router: it would never be chosen.
    new = replace(load_pack(pack.path).load("a"), name="new")
    assert load_router(add_adapter(load_pack(pack.path), new).pack) is None


def test_who_changes_the_tasks_is_told_that_the_router_is_gone(made, pack):
    _, base, probes = made
    runner, fits = CliRunner(), f"d2c-mlx route {pack.path} --tasks DIR"
    asks = ["remove", str(pack.path)]
    save_router(pack, fit_router(base.model, probes))
    said = runner.invoke(cli, [*asks, "a"], catch_exceptions=False).output
    assert said.endswith(f"bytes; its router is gone, fit another with {fits}\n")
    left = json.loads(runner.invoke(cli, [*asks, "b", "--json"], catch_exceptions=False).output)
    now = load_pack(pack.path)
    assert left == {"tasks": ["c"], "n_adapters": 1, "nbytes": now.nbytes}
    save_router(now, replace(fit_router(base.model, probes[2:]), tasks=("c",)))
    adapter = f"new={made[0].adapters / 'a'}"
    args = ["add", str(pack.path), adapter, "--model", str(made[0].model)]
    assert f"fit another with {fits}" in runner.invoke(cli, args, catch_exceptions=False).output
    assert "router" not in runner.invoke(cli, [*asks, "new"], catch_exceptions=False).output
