"""What no command of ours wrote is refused, not replaced; what one wrote goes on as before."""

import json
import shutil

import pytest
from helpers.command import edit_config, refused
from helpers.tiny import peft_adapter


def test_what_no_run_wrote_is_not_replaced_by_one(cli, lib):
    """A user's own project, that has files of the names that a run writes."""
    project = cli.root / "project"
    peft_adapter(project / "adapters", "mine")
    for name in ("merged/7b/model.safetensors", "pack/thesis.txt", "report.md", "bench.json"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes(b"days of work")
    (line,) = refused(cli, cli.argv(budget="2", output=project))
    for name in ("adapters", "merged", "pack", "report.md", "bench.json"):
        assert f"{project / name}," in line
    # Neither records of something else, nor a config of another program, make it a run.
    (project / ".stages").mkdir()
    (project / ".stages" / "probe.json").write_text('{"inputs": 1}')
    (project / "config.yaml").write_text("[1]")
    (line,) = refused(cli, cli.argv(output=project))
    assert f"{project / '.stages'}, {project / 'config.yaml'}," in line
    # A folder of links is somebody's, too.
    shutil.rmtree(project)
    (project / "adapters").mkdir(parents=True)
    (project / "adapters" / "mine").symlink_to(lib.adapters / "alpha")
    (line,) = refused(cli, cli.argv(output=project))
    assert f"your {project / 'adapters'}, which" in line


@pytest.mark.slow
def test_other_files_beside_a_run_do_not_matter(cli, lib):
    for name in (".DS_Store", "adapters/.DS_Store", "notes.ipynb", "data/pack/rows.csv", ".git/x"):
        (cli.output / name).parent.mkdir(parents=True, exist_ok=True)
        (cli.output / name).write_bytes(b"mine")
    (cli.root / "disk").mkdir()
    (cli.output / "merged").symlink_to(cli.root / "disk")
    for options in ({"budget": "2"}, {"budget": "60%"}, {"budget": "1"}):
        assert cli(cli.argv(until="pack", **options))[0] == 0
        for name in ("adapters", "merged", "pack"):
            (cli.output / name / ".DS_Store").write_bytes(b"of a Mac")
    assert (cli.output / "data/pack/rows.csv").read_bytes() == b"mine"
    assert (cli.output / "merged").is_symlink()


@pytest.mark.slow
def test_what_was_put_into_a_run_is_not_replaced(cli, lib):
    assert cli(cli.argv(until="merge"))[0] == 0
    again = cli.argv(until="merge", budget="2")
    peft = peft_adapter(cli.output / "adapters", "mine")
    trained = shutil.copytree(cli.output / "adapters" / "beta", cli.output / "merged" / "trained")
    edit_config(trained, train=True)
    (cli.output / "merged" / "0" / "notes.txt").write_text("mine")
    (line,) = refused(cli, again)
    mine = [peft, cli.output / "merged" / "0", trained]
    assert f"would replace your {', '.join(map(str, mine))}, which no earlier run wrote" in line
    # Nor by a plan, which merges nothing in these folders.
    shutil.rmtree(peft)
    refused(cli, cli.argv(until="plan", budget="60%"))
    assert (trained / "adapters.safetensors").exists()
    # A damaged file is made anew.
    shutil.rmtree(cli.output / "merged")
    for name in ("adapter_config.json", "adapters.safetensors"):
        (cli.output / "adapters" / "beta" / name).write_bytes(b"damaged")
    assert cli(again)[0] == 0


def packs(cli):
    """A plain pack, and a compact one."""
    for output, budget in (("plain", "2"), ("bytes", "60%")):
        argv = cli.argv(until="pack", budget=budget, output=cli.root / output)
        assert cli(argv)[0] == 0
    return cli.root / "plain" / "pack", cli.root / "bytes" / "pack"


def test_packs_are_not_replaced_by_other_outputs(cli, lib):
    plain, compact = packs(cli)
    convert = ["convert", "--model", str(lib.model), "--adapters", str(lib.adapters)]
    for source, other in ((plain, compact), (compact, plain)):
        commands = [["export", str(source), "--to", "peft"]]
        commands += [["push", str(source), "org/name", "--base", "org/base"], convert]
        for command in commands:
            (line,) = refused(cli, [*command, "--output", str(other)])
            assert f"{other} is replaced as a whole, and {other}/" in line


@pytest.mark.slow
def test_a_list_of_tasks_of_the_user_is_no_mark(cli, lib):
    plain, compact = packs(cli)
    mine = cli.root / "mine"
    peft_adapter(mine, "delta")
    tasks = [["delta"], {}, {"delta": "delta"}, {"delta": {"lr": 1}}, {"delta": "cluster-0"}, 3]
    for content in map(json.dumps, [*tasks, {"delta": None}]):
        (mine / "tasks.json").write_text(content)
        for to in ("mlx", "peft"):
            (line,) = refused(cli, ["export", str(plain), "--to", to, "--output", str(mine)])
            assert f"and {mine}/" in line
    # Nor does a mark cover what an output does not name, nor what only a push writes.
    for pack in (plain, compact):
        shutil.rmtree(mine)
        unpack = ["export", str(pack), "--to", "mlx", "--output", str(mine)]
        for name in ("README.md", "manifest.json", "cluster-9/adapter_config.json"):
            assert cli(unpack)[0] == 0
            (mine / name).parent.mkdir(exist_ok=True)
            (mine / name).write_text("{}")
            (line,) = refused(cli, unpack)
            assert f"and {mine / name} in it" in line
            (mine / name).unlink()


@pytest.mark.slow
def test_earlier_outputs_are_replaced(cli, lib):
    """By the command that wrote them."""
    plain, compact = packs(cli)
    for n, pack in enumerate(map(str, (plain, compact))):
        push = ["push", pack, "org/name", "--base", "org/base"]
        gguf = ["export", pack, "--to", "gguf", "--model", str(lib.model)]
        commands = [["export", pack, "--to", "mlx"], push, ["export", pack, "--to", "peft"], gguf]
        for place, command in enumerate(commands):
            for _ in range(2):
                out = cli.root / f"out-{n}-{place if command[0] == 'push' else 'export'}"
                code, _, err = cli([*command, "--output", str(out)])
                assert code == 0, err
    convert = ["convert", "--model", str(lib.model), "--output", str(cli.root / "converted")]
    for to in ("mlx", "mlx", "peft", "peft", "mlx"):
        assert cli([*convert, "--adapters", str(lib.adapters), "--to", to])[0] == 0
    # Adapters of the same names that somebody trained.
    for source in (peft_adapter(cli.root, "trained"), cli.root / "converted" / "beta"):
        shutil.rmtree(cli.root / "converted" / "alpha")
        shutil.copytree(source, cli.root / "converted" / "alpha")
        edit_config(cli.root / "converted" / "alpha", seed=1)
        (line,) = refused(cli, [*convert, "--adapters", str(lib.adapters)])
        assert f"and {cli.root / 'converted' / 'alpha'}/" in line
