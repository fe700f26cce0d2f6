"""The pipeline: adapters, a few examples per task and a budget -> a pack, and its measurements.

    convert -> probe -> cluster -> merge (-> refine) -> pack -> bench -> report
    convert -> probe -> plan             (-> refine) -> pack -> bench -> report    (budget in bytes)

Where there are prompts, adapters `answer` them before `probe`. Without rows `probe` is left out,
weights alone decide, and `bench` compares weights.

Each stage reads artifacts of the run directory and writes its own; a stage whose inputs did not
change is not repeated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

from d2c_mlx.cluster.d2c import d2c
from d2c_mlx.cluster.estimates import STRENGTHS
from d2c_mlx.cluster.partition import (
    Clusters,
    kmeans,
    measured_regret,
    merge_all,
    random_partition,
)
from d2c_mlx.cluster.search import cluster_by_weights, search_by_estimates
from d2c_mlx.evaluate.distributed import leading_rank
from d2c_mlx.merge.library import measure_losses
from d2c_mlx.merge.merging import merge as merge_members
from d2c_mlx.merge.merging import method_of, problem_of, quick_method_of
from d2c_mlx.packs.overwrite import mark
from d2c_mlx.phone.tables import read_phone
from d2c_mlx.plugins import CLUSTERINGS, MERGE_METHODS, cluster_by, find
from d2c_mlx.report.report import render_html, render_markdown
from d2c_mlx.run.bench_stage import clusterings, compare_losses, compare_weights
from d2c_mlx.run.config import RANDOM_PARTITIONS, SEARCHES, RunConfig, stages_of
from d2c_mlx.run.directory import changed_options, without_plan
from d2c_mlx.run.inputs import Inputs, opening
from d2c_mlx.run.pack_stage import pack_info, pack_merges, pack_plan
from d2c_mlx.run.records import check_pack, expect_pack, peaks
from d2c_mlx.run.refine_stage import refine_inputs, refine_merges, refine_plan
from d2c_mlx.run.session import Session, Stage
from d2c_mlx.utils.errors import warn
from d2c_mlx.utils.files import write_dir, write_json, write_text
from d2c_mlx.utils.lock import locked
from d2c_mlx.utils.progress import say

__all__ = ["STAGES", "run", "settled_stages"]


def run(
    config: RunConfig, until: str = "report", quiet: bool = False, inputs: Inputs | None = None
) -> Session:
    """Run every stage up to and including `until`; what is already done is kept.

    Like make, a stage first runs the stages before it that are not done. So no stage can fail for
    want of an earlier one. Nothing is loaded for a run that is finished. Under `mlx.launch` only
    rank 0 may call this; the others call `distributed.run_worker`.

    Args:
        config: options of the run.
        until: a key of `STAGES`.
        quiet: show no progress.
        inputs: loaded for these options already, as several runs share them; None loads them.

    Returns:
        The session, through which artifacts are read.

    Raises:
        InputError: bad input, all problems at once; nothing is written.
        D2CError: a stage failed, or another process is at work in the run directory.
    """
    with leading_rank() as group:
        session = Session(config, quiet, group, inputs)
        if session.directory.is_finished(config, stages_of(config, until)):
            return session
        session.load()
        for changed in changed_options(config):
            say(f"the pack in {session.output} will be replaced: {changed}", quiet)
        say(opening(session.inputs), quiet)
        wanted = settled_stages(session, until)
        with locked(session.output):
            if "pack" in wanted:
                check_pack(session.output)
            session.keep_options()
            for name in wanted:
                session.run(STAGES[name](session))
            done = stages_of(config, until)
            session.directory.remember_finish(config, done, session.copies)
    return session


def settled_stages(session: Session, until: str) -> list[str]:
    """The stages up to `until`; a budget with room for all adapters is not planned but copied."""
    stages = stages_of(session.config, until)
    return without_plan(stages) if session.copies else stages


def convert(session: Session) -> Stage:
    """Write the input adapters in mlx-lm's layout, exactly -> `adapters/<name>/`."""
    inputs = session.inputs

    def body() -> None:
        with write_dir(session.path("adapters")) as directory:
            for adapter in inputs.adapters:
                adapter.save(directory / adapter.name, inputs.base.n_layers)
            mark(directory, "run")

    options = [[adapter.name, adapter.base, adapter.digest] for adapter in inputs.adapters]
    return Stage("convert", options, [], ["adapters"], body)


def answer(session: Session) -> Stage:
    """Let task adapters answer prompts -> `answered/`: the rows of the run, or more of them."""
    inputs = session.inputs

    def body() -> None:
        inputs.asked.write(inputs.base, session.adapters, partial(mark, kind="run"))
        inputs.take_answers()

    options = [inputs.base.fingerprint, inputs.asked.prompts, *inputs.base.generation]
    return Stage("answer", options, ["adapters"], ["answered"], body)


def probe(session: Session) -> Stage:
    """Measure each task's adapter, at a few strengths, on its calibration rows -> `losses.json`."""
    inputs = session.inputs

    def body() -> None:
        table = measure_losses(session.library)
        # For the report; four digits, so that no machine's rounding shows.
        cosines = session.library.similarity.round(4).tolist()
        write_json(session.path("losses.json"), {**table.to_json(), "similarity": cosines})
        vars(session).pop("library")  # It has no losses yet.

    options = [inputs.base.fingerprint, [rows.digest for rows in inputs.probes], STRENGTHS]
    return Stage("probe", options, ["adapters"], ["losses.json"], body)


def plan(session: Session) -> Stage:
    """Plan a budget in bytes: which adapters and merges, at which bits -> `plan.json`, `planned/`.

    The chosen adapters are kept in their stored form, so that `pack` rounds nothing again.
    """
    c, inputs = session.config, session.inputs

    def body() -> None:
        found = session.planner.search()
        with write_dir(session.path("planned")) as directory:
            inputs.capacity.storage.write(directory, found.adapters)
            mark(directory, "run")
        write_json(session.path("plan.json"), found.content)

    options = [inputs.base.fingerprint, [p.digest for p in inputs.probes], _merge_options(c),
               inputs.capacity.max_bytes, c.format]  # fmt: skip
    return Stage("plan", options, ["adapters", *_losses(c)], ["plan.json", "planned"], body)


def cluster(session: Session) -> Stage:
    """Choose which adapters to merge, by D2C and by the baselines -> `clusters.json`."""
    c, inputs = session.config, session.inputs
    k, n = inputs.capacity.n_clusters, len(inputs.names)
    if k == n > 1:
        warn(
            f"budget: {c.budget} has room for all adapters ({n}), so none has to be merged; give"
            " less for a smaller pack"
        )

    given = inputs.clusters
    plugin = None if given or c.search in SEARCHES else find(CLUSTERINGS, c.search)

    def body() -> None:
        problem = problem_of(session.library, c.merging)
        labels = cluster_by(plugin, problem, k, c.seed) if plugin else given
        if labels:
            stopped = c.search if plugin else "given"
            regret = measured_regret(problem, labels) if c.has_rows else None
            found = Clusters("d2c", labels, regret, stopped=stopped)
        elif not c.has_rows:
            found = cluster_by_weights(problem, k)
        elif c.search == "estimates":
            found = search_by_estimates(problem, k, c.seed)
        else:
            found = d2c(problem, k, seed=c.seed)
        methods = {
            "d2c": [found],
            "kmeans": [kmeans(problem.features, k, c.seed)],
            # One random partition may be lucky: `bench` reports the mean over several.
            "random": [random_partition(n, k, c.seed + i) for i in range(RANDOM_PARTITIONS)],
            "merge-all": [merge_all(n)],
        }
        content = {
            "adapters": inputs.names,
            "n_clusters": k,
            "methods": {
                name: [dataclasses.asdict(clustering) for clustering in clusterings]
                for name, clusterings in methods.items()
            },
        }
        write_json(session.path("clusters.json"), content)

    # Merge methods that cluster alike share one clustering, so it is not made again.
    quick = quick_method_of(session.library, c.merging)
    options = [inputs.base.fingerprint, [p.digest for p in inputs.probes], k,
               _merge_options(c, quick), c.search]  # fmt: skip
    options += [given] if given else [plugin.identity] if plugin else []
    return Stage("cluster", options, ["adapters", *_losses(c)], ["clusters.json"], body)


def merge(session: Session) -> Stage:
    """Merge each D2C cluster -> `merged/<k>/`, and `merges.json` with members and scales."""
    inputs, options = session.inputs, session.config.merging

    def body() -> None:
        (clustering,) = clusterings(session)["d2c"]
        if "layerwise" in session.unused:
            warn(
                "merge_method: blocks of this architecture cannot be run one at a time, so clusters"
                f" are merged by {method_of(session.library, options)} instead of layerwise"
            )
        merges = []
        with write_dir(session.path("merged")) as directory:
            for k, members in enumerate(clustering.groups):
                merged = merge_members(session.library, members, options)
                merged.adapter.save(directory / str(k), inputs.base.n_layers)
                names = [inputs.names[i] for i in members]
                merges.append({"members": names, "method": merged.method, "scale": merged.scale})
            mark(directory, "run")
        write_json(session.path("merges.json"), merges)

    key = [inputs.base.fingerprint, _merge_options(session.config)]
    reads = ["adapters", *_losses(session.config), *_answers(session.config), "clusters.json"]
    return Stage("merge", key, reads, ["merged", "merges.json"], body)


def refine(session: Session) -> Stage:
    """Train what was merged or planned to match its members, if asked for -> `refined/`."""
    planned = session.planned
    body = partial(refine_plan if planned else refine_merges, session)
    reads = ["plan.json", "planned"] if planned else ["merged", "merges.json"]
    return Stage("refine", refine_inputs(session), ["adapters", "losses.json", *reads],
                 ["refined", "refines.json"], body, leftovers=["refining"])  # fmt: skip


def pack(session: Session) -> Stage:
    """Write the pack within the budget, merges in 16 bit or as planned -> `pack/`."""
    info, made = pack_info(session.inputs), "planned" if session.planned else "merged"
    source = "refined" if session.config.refine else made

    def ready(directory: Path) -> None:
        # They are of the pack that is replaced, and a run may end before it has others.
        for name in ("report.md", "report.html", "bench.json", "weights.json"):
            session.path(name).unlink(missing_ok=True)
        expect_pack(session.output, directory)

    write = pack_plan if session.planned else pack_merges
    reads = [source, "plan.json" if session.planned else "merges.json"]
    body = partial(write, session, source, info, ready)
    options = [info.model, info.config_hash, info.weights_hash, info.budget,
               session.inputs.capacity.total, info.origins, info.systems]  # fmt: skip
    return Stage("pack", options, reads, ["pack"], body)


def bench(session: Session) -> Stage:
    """Measure every method on the held-out rows -> `bench.json`; without any -> `weights.json`."""
    c, inputs = session.config, session.inputs
    name, compare = (
        ("bench.json", compare_losses) if c.has_rows else ("weights.json", compare_weights)
    )

    def body() -> None:
        write_json(session.path(name), compare(session))

    if not c.has_rows:
        return Stage("bench", inputs.base.fingerprint, ["adapters", "pack"], [name], body)
    options = [inputs.base.fingerprint, [rows.digest for rows in inputs.tests], _merge_options(c),
               session.baselines, *inputs.base.generation]  # fmt: skip
    beside = ["losses.json", *_answers(c), "clusters.json", "merged"]
    if session.planned:
        beside = ["plan.json", "planned"] if c.refine else []
    return Stage("bench", options, ["adapters", *beside, "pack"], [name], body)


def report(session: Session) -> Stage:
    """Render the results for people -> `report.md`, `report.html`."""
    chosen = ["plan.json"] if session.planned else ["clusters.json", "merges.json"]
    benched = "bench.json" if session.config.has_rows else "weights.json"
    refined = ["refines.json"] if session.config.refine else []
    reads = [*_losses(session.config), *chosen, *refined, "pack/manifest.json", benched]
    # The user may have put the output of `d2c-mlx phone PACK --json` there.
    phone = session.path("phone.json")
    if phone.exists():
        reads.append(phone.name)

    def body() -> None:
        artifacts = {Path(name).stem: session.read(name) for name in reads}
        artifacts["peaks"] = peaks(session.output)
        if phone.exists():
            artifacts["phone"] = read_phone(phone, of=session.path("pack"))
        for name, render in (("report.md", render_markdown), ("report.html", render_html)):
            write_text(session.path(name), render(artifacts))

    return Stage("report", None, reads, ["report.md", "report.html"], body)


STAGES: dict[str, Callable[[Session], Stage]] = {
    stage.__name__: stage
    for stage in (convert, answer, probe, plan, cluster, merge, refine, pack, bench, report)
}


def _losses(config: RunConfig) -> list[str]:
    """The losses of the stage `probe`, which needs rows."""
    return ["losses.json"] if config.has_rows else []


def _answers(config: RunConfig) -> list[str]:
    """The answers that merges read beside the rows."""
    return ["answered"] if config.unlabelled and config.tasks else []


def _merge_options(config: RunConfig, method: str | None = None) -> list[object]:
    """Options that merges depend on; `method` takes the place of the config's."""
    c = config
    plugins = [one.identity for one in c.plugins if one.group == MERGE_METHODS]
    return [method or c.merge_method, c.merge_rank, c.seed, *plugins]
