"""The pipeline: adapters, a few examples per task and a budget -> a pack, and its measurements.

    convert -> probe -> cluster -> merge (-> refine) -> pack -> bench -> report
    convert -> probe -> plan             (-> refine) -> pack -> bench -> report    (budget in bytes)

Where rows lack an answer, their adapters `answer` before `probe`. Without rows `probe` is left out,
weights alone decide, and `bench` compares weights.

A stage is a function of the run and the library; it returns the library as later stages see it. It
reads artifacts of the run directory and writes its own, unless they are there already.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import yaml
from jinja2 import UndefinedError

from d2c_mlx.cluster.partition import Clusters, d2c, kmeans, measured_regret, random_partition
from d2c_mlx.cluster.search import (
    STRENGTHS,
    MergeEstimates,
    estimated_partition,
    search_by_estimates,
)
from d2c_mlx.compress.plan import plan as plan_bytes
from d2c_mlx.evaluate.distributed import leading_rank
from d2c_mlx.evaluate.scorer import LossTable
from d2c_mlx.merge.library import Library, measure_losses
from d2c_mlx.merge.merging import merge as merge_members
from d2c_mlx.merge.merging import method_of, problem_of
from d2c_mlx.models.tasks import answer_prompts
from d2c_mlx.packs.overwrite import RUN_WRITES, mark
from d2c_mlx.phone.tables import read_phone
from d2c_mlx.plugins import MERGE_METHODS
from d2c_mlx.report.report import next_commands, render_html
from d2c_mlx.run.config import RANDOM_PARTITIONS, RunConfig
from d2c_mlx.run.inputs import answered, converted, opening
from d2c_mlx.run.run import Run
from d2c_mlx.run.stages import (
    MISREAD,
    clusterings,
    compare_losses,
    compare_weights,
    manifest_of,
    pack_all,
    refine_all,
    refine_key,
)
from d2c_mlx.utils.errors import PackError, warn
from d2c_mlx.utils.files import (
    locked,
    remove_dir,
    remove_stale,
    write_dir,
    write_json,
    write_text,
)
from d2c_mlx.utils.progress import say


def run(config: RunConfig, until: str = "report", quiet: bool = False) -> Run:
    """Run every stage up to and including `until`; what is already done is kept.

    Like make, a stage first runs the stages before it that are not done. So no stage can fail for
    want of an earlier one. Nothing is loaded for a run that is finished. Under `mlx.launch` only
    rank 0 may call this; the others call `distributed.run_worker`.

    Args:
        config: options of the run.
        until: a key of `STAGES`.
        quiet: show no progress.

    Returns:
        The run, through which artifacts are read.

    Raises:
        InputError: bad input, all problems at once; nothing is written.
        D2CError: a stage failed, or another process is at work in the run directory.
    """
    with leading_rank() as group:
        run = Run(config, quiet, group)
        if run.finished(until):
            return run
        library, stages = run.inputs.library, run.stages(until)
        say(opening(run.inputs), quiet)
        with locked(run.output):
            if "pack" in stages:
                run.check_pack()
            for directory in (run.output, run.path(".stages")):
                remove_stale(directory)
            # The first that is written, so that a run that is killed early can go on.
            mark(run.output, "run", dict.fromkeys(RUN_WRITES))
            options = yaml.safe_dump(run.saved_options(), sort_keys=False)
            write_text(run.path("config.yaml"), options)
            for stage in stages:
                library = STAGES[stage](run, library)
            run.remember(until)
    return run


def convert(run: Run, library: Library) -> Library:
    """Write the input adapters in mlx-lm's layout, exactly -> `adapters/<name>/`."""
    key = [[adapter.name, adapter.base, adapter.digest] for adapter in library.adapters]
    with run.stage("convert", key=key, writes=["adapters"]) as todo:
        if todo:
            with write_dir(run.path("adapters")) as directory:
                for adapter in library.adapters:
                    adapter.save(directory / adapter.name, library.base.n_layers)
                mark(directory, "run")
    return library if run.left else converted(library, run.path("adapters"))


def answer(run: Run, library: Library) -> Library:
    """Let adapters answer the prompts among their rows -> `answered/<task>/`."""
    base, prompts = library.base, [*run.inputs.prompts.values()]
    asked = [[rows.name, rows.asked] for rows in prompts]
    key = [base.fingerprint, asked]
    with run.stage("answer", key=key, reads=["adapters"], writes=["answered"]) as todo:
        if todo:
            adapters = [library.adapters[library.names.index(rows.name)] for rows in prompts]
            with write_dir(run.path("answered")) as directory:
                answer_prompts(base, adapters, prompts, directory)
                mark(directory, "run")
    return library if run.left else answered(library, run.path("answered"))


def probe(run: Run, library: Library) -> Library:
    """Measure each task's adapter, at a few strengths, on its calibration rows -> `losses.json`."""
    key = [library.base.fingerprint, [rows.digest for rows in library.calibration], STRENGTHS]
    with run.stage("probe", key=key, reads=["adapters"], writes=["losses.json"]) as todo:
        if todo:
            table = measure_losses(library)
            # For the report; four digits, so that no machine's rounding shows.
            cosines = library.similarity.round(4).tolist()
            write_json(run.path("losses.json"), {**table.to_json(), "similarity": cosines})
    if run.left:
        return library
    return library.measured(LossTable.from_json(run.read("losses.json")))


def plan(run: Run, library: Library) -> Library:
    """Plan a budget in bytes: which adapters and merges, at which bits -> `plan.json`, `planned/`.

    The chosen adapters are kept in their stored form, so that `pack` rounds nothing again.
    """
    key = [*_decisive(run, library), run.capacity.max_bytes, run.config.format]
    reads, writes = ["adapters", "losses.json"], ["plan.json", "planned"]
    with run.stage("plan", key=key, reads=reads, writes=writes) as todo:
        if todo:
            with write_dir(run.path("planned")) as directory:
                chosen = plan_bytes(library, run.capacity, directory, run.config.merging)
                mark(directory, "run")
            write_json(run.path("plan.json"), chosen.content)
    return library


def cluster(run: Run, library: Library) -> Library:
    """Choose which adapters to merge, by D2C and by the baselines -> `clusters.json`."""
    c, k, n = run.config, run.capacity.n_clusters, len(library.names)
    if k == n > 1:
        warn(
            f"budget: {c.budget.text} has room for all adapters ({n}), so none has to be merged;"
            " give less for a smaller pack"
        )
    given = run.inputs.clusters
    # Merge methods that cluster alike share one clustering, so it is not made again.
    quick = method_of(library, c.merging, quick=True)
    key = [*_decisive(run, library, quick), k, c.search, given]
    reads = ["adapters", "losses.json"]
    with run.stage("cluster", key=key, reads=reads, writes=["clusters.json"]) as todo:
        if not todo:
            return library
        problem = problem_of(library, c.merging)
        if given:
            regret = measured_regret(problem, given) if library.tasks else None
            best = Clusters("d2c", given, regret, stopped="given")
        elif not library.tasks:
            labels = estimated_partition(MergeEstimates(problem.fading, problem.similarity), k)
            best = Clusters("d2c", labels, init="weights", stopped="nothing to measure on")
        elif c.search == "estimates":
            best = search_by_estimates(problem, k, c.seed)
        else:
            best = d2c(problem, k, seed=c.seed)
        methods = {
            "d2c": [best],
            "kmeans": [kmeans(problem.features, k, c.seed)],
            # One random partition may be lucky: `bench` reports the mean over several.
            "random": [random_partition(n, k, c.seed + i) for i in range(RANDOM_PARTITIONS)],
            "merge-all": [Clusters("merge-all", (0,) * n)],
        }
        lists = {name: [dataclasses.asdict(x) for x in each] for name, each in methods.items()}
        content = {"adapters": library.names, "n_clusters": k, "methods": lists}
        write_json(run.path("clusters.json"), content)
    return library


def merge(run: Run, library: Library) -> Library:
    """Merge each D2C cluster -> `merged/<k>/`, and `merges.json` with members and scales."""
    options, key = run.config.merging, _decisive(run, library)
    reads = ["adapters", "losses.json", "answered", "clusters.json"]
    with run.stage("merge", key=key, reads=reads, writes=["merged", "merges.json"]) as todo:
        if not todo:
            return library
        chosen = method_of(library, options)
        if library.tasks and not options.method and chosen != "layerwise":
            warn(
                "merge_method: blocks of this architecture cannot be run one at a time, so clusters"
                f" are merged by {chosen} instead of layerwise"
            )
        (clustering,) = clusterings(run.read("clusters.json"))["d2c"]
        merges = []
        with write_dir(run.path("merged")) as directory:
            for k, members in enumerate(clustering.groups):
                merged = merge_members(library, members, options)
                merged.adapter.save(directory / str(k), library.base.n_layers)
                names = [library.names[i] for i in members]
                merges.append({"members": names, "method": merged.method, "scale": merged.scale})
            mark(directory, "run")
        write_json(run.path("merges.json"), merges)
    return library


def refine(run: Run, library: Library) -> Library:
    """Train what was merged or planned to match its members -> `refined/`."""
    key, reads = refine_key(run.config, library), ["adapters", "losses.json"]
    reads += ["plan.json", "planned"] if run.planned else ["merged", "merges.json"]
    with run.stage("refine", key=key, reads=reads, writes=["refined", "refines.json"]) as todo:
        if todo:
            refine_all(run, library)
    # Only after the stage is recorded: a half-removed directory would be taken for done.
    if not run.dry:
        remove_dir(run.path("refining"))
    return library


def pack(run: Run, library: Library) -> Library:
    """Write the pack within the budget, merges in 16 bit or as planned -> `pack/`."""
    about = manifest_of(run.inputs)
    source = "refined" if run.config.refine else "planned" if run.planned else "merged"

    def ready(directory: Path) -> None:
        # They are of the pack that is replaced, and a run may end before it has others.
        for name in ("report.html", "bench.json", "weights.json"):
            run.path(name).unlink(missing_ok=True)
        run.expect_pack(directory)

    key = [about.model_dump(mode="json", exclude={"dtype"}), run.capacity.total]
    reads = [source, "plan.json" if run.planned else "merges.json"]
    with run.stage("pack", key=key, reads=reads, writes=["pack"]) as todo:
        if todo:
            pack_all(run, source, about, ready)
    return library


def bench(run: Run, library: Library) -> Library:
    """Measure every method on the held-out rows -> `bench.json`; without any -> `weights.json`."""
    base = library.base
    if not library.tasks:
        with run.stage(
            "bench", key=base.fingerprint, reads=["adapters", "pack"], writes=["weights.json"]
        ) as todo:
            if todo:
                write_json(run.path("weights.json"), compare_weights(run, library))
        return library
    tests = [rows.digest for rows in library.held_out]
    key = [*_decisive(run, library), tests, run.baselines]
    merged = ["losses.json", "answered", "clusters.json", "merged"]
    planned = ["plan.json", "planned"] if run.config.refine else []
    reads = ["adapters", "pack", *(planned if run.planned else merged)]
    with run.stage("bench", key=key, reads=reads, writes=["bench.json"]) as todo:
        if todo:
            task, model = library.names[0], run.config.model
            ask, *_ = next_commands(str(run.output), task, model, run.planned)
            say(f"The pack is ready, and is measured now: {ask}", run.quiet)
            write_json(run.path("bench.json"), compare_losses(run, library))
    return library


def report(run: Run, library: Library) -> Library:
    """Render the results for people -> `report.html`."""
    reads = ["plan.json"] if run.planned else ["clusters.json", "merges.json"]
    reads += ["losses.json", "bench.json"] if library.tasks else ["weights.json"]
    reads += ["pack/manifest.json", *(["refines.json"] if run.config.refine else [])]
    # The user may have put the output of `d2c-mlx phone PACK --json` there.
    phone = run.path("phone.json")
    if phone.exists():
        reads.append(phone.name)
    # No stranger knows the snapshot, whose page would otherwise be opened as ours.
    with run.stage("report", key=run.snapshot(), reads=reads, writes=["report.html"]) as todo:
        if todo:
            artifacts = {Path(name).stem: run.read(name) for name in reads}
            artifacts["peaks"] = run.peaks()
            try:
                if phone.exists():
                    artifacts["phone"] = read_phone(phone, of=run.path("pack"))
                html = render_html(artifacts)
            except (*MISREAD, UndefinedError) as error:
                raise PackError(
                    f"{run.output}: one of {', '.join(x for x in reads if '/' not in x)} holds what"
                    f" d2c-mlx did not write ({str(error)[:200]}); delete these, then run again"
                ) from None
            write_text(run.path("report.html"), html)
    return library


STAGES: dict[str, Callable[[Run, Library], Library]] = {
    stage.__name__: stage
    for stage in (convert, answer, probe, plan, cluster, merge, refine, pack, bench, report)
}


def _decisive(run: Run, library: Library, method: str | None = None) -> list[object]:
    """What choices depend on besides artifacts; `method` takes the place of the config's."""
    config, rows = run.config, [task.digest for task in library.calibration]
    plugins = [plugin.identity for plugin in config.plugins if plugin.group == MERGE_METHODS]
    options = [method or config.merge_method, config.merge_rank, config.seed, *plugins]
    return [library.base.fingerprint, rows, *options]
