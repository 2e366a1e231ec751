"""The command line. It parses words and prints answers; what is done lies in platform/. Torch and ray load inside commands."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from medssl import __version__
from medssl.platform.errors import RunError, UsageError

app = typer.Typer(
    name="medssl",
    help="Did self-supervised pretraining really help your medical segmentation? Pretrain, fine-tune, repeat, and be told "
    "what can and cannot be told apart.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Prepare, check and look at data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")
cluster_app = typer.Typer(help="Files that bring up a cluster, and sweeps that run on one.", no_args_is_help=True)
app.add_typer(cluster_app, name="cluster")

Files = Annotated[list[Path] | None, typer.Option("-p", "--preset", help="YAML files or names of presets, stacked.")]
Overrides = Annotated[list[str] | None, typer.Option("-o", "--override", help="One setting by dotted name: key=value.")]
DataName = Annotated[str, typer.Option("--data", help="A data set, a prepared set, or a folder of scans.")]
From = Annotated[str | None, typer.Option("--from", help="A pretraining's id, or a file of weights; without it, from scratch.")]
Dims = Annotated[
    int | None,
    typer.Option(min=2, max=3, help="3: train on whole volumes, 2: on slices (default); short for -o network.spatial_dims=3."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
At = Annotated[str | None, typer.Option("--address", help="The cluster's dashboard; default: http://127.0.0.1:8265.")]
Workers = Annotated[int | None, typer.Option(help="Processes that read volumes; default: one per core.")]


def main() -> None:
    """Entry point: errors that a user can act on become one sentence and an exit code."""
    try:
        app()
    except (UsageError, RunError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    log: Annotated[str, typer.Option("--log", help="Messages on the console: debug, info, warning or error.")] = "warning",
) -> None:
    from medssl.platform import logs

    logs.console(log)
    if "://" in os.environ.get("MEDSSL_RUNS", ""):  # a store that other machines write, too
        from medssl.platform.site import Site

        Site.here().refresh()


def _print(value: Any, as_json: bool, text: str) -> None:
    typer.echo(json.dumps(value, indent=1) if as_json else text)


def _dimensioned(overrides: list[str] | None, spatial_dims: int | None) -> list[str]:
    return [*(overrides or []), *([f"network.spatial_dims={spatial_dims}"] if spatial_dims else [])]


def _aside(text: str) -> None:
    """What is told on the way goes to standard error: standard output holds the answer."""
    typer.echo(text, err=True)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, devices, memory, folders, and what this processor really executes."""
    from medssl.platform import doctor

    found = doctor.examine()
    _print(found, as_json, doctor.describe(found))


@app.command()
def methods(as_json: Json = False) -> None:
    """The methods, networks, hooks, presets, search spaces and data sets that can be named."""
    from medssl.platform import find

    kinds = {kind: {name: find.summary(kind, name) for name in find.names(kind)} for kind in find.FOLDERS}
    lines = []
    for kind, entries in kinds.items():
        plural = f"{kind}es" if kind == "bench" else f"{kind}s"
        lines += [f"{plural} ({find.FOLDERS[kind]}/)", *(f"  {name:<25} {text}" for name, text in entries.items())]
    _print(kinds, as_json, "\n".join(lines))


@data_app.command("list")
def data_list(as_json: Json = False) -> None:
    """Data sets that can be named, and those that are prepared."""
    from medssl.platform import catalogue

    entries = catalogue.entries()
    _print(entries, as_json, catalogue.describe(entries))


@data_app.command("prepare")
def data_prepare(
    source: Annotated[str, typer.Argument(help="A data set's name, a folder of scans, or a new name for --images.")],
    images: Annotated[Path | None, typer.Option(help="Your own scans: NIfTI, DICOM, pictures.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Their labels, under the same names.")] = None,
    datalist: Annotated[Path | None, typer.Option(help="A MONAI datalist instead, its paths below --images or itself.")] = None,
    subject_regex: Annotated[
        str | None, typer.Option(help="What in a scan's path says whose it is: '(p[0-9]+)'; default: each its own.")
    ] = None,
    classes: Annotated[str, typer.Option(help="What the ids 1, 2 … of --labels are: liver,spleen.")] = "foreground",
    stacks: Annotated[bool, typer.Option("--stacks", help="A folder of pictures below --images is one volume.")] = False,
    preset: Annotated[
        str | None, typer.Option(help="How to prepare: a name that data list shows; default: what the data set says.")
    ] = None,
    override: Annotated[list[str] | None, typer.Option("-o", help="One field of the preset: spacing_mm=[1,1,1].")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split by patients.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Prepare anew where another preparation lies.")] = False,
    workers: Workers = None,
    name: Annotated[str | None, typer.Option(help="What the prepared set is called; default: the folder's name.")] = None,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster whose nodes all see the scans and MEDSSL_DATA; default: this machine.")
    ] = None,
) -> None:
    """Read volumes, resample, normalise, and store their slices with a split by patients."""
    from medssl.platform import catalogue

    if images or datalist:
        paths = {"images": images, "labels": labels, "datalist": datalist}
        said = {key: None if path is None else str(path.resolve()) for key, path in paths.items()}
        more = {"subject_regex": subject_regex, "classes": tuple(classes.split(",")), "stacks": stacks}
        catalogue.remember(name or source, overwrite, **said, **more)
        source = name or source
    elif labels or subject_regex:
        raise UsageError("--labels and --subject-regex belong to --images or --datalist; say where the scans are")
    changes = dict(map(catalogue.preset_change, override or []))
    store = catalogue.prepare(
        source,
        preset=preset,
        changes=changes,
        seed=seed,
        overwrite=overwrite,
        workers=workers,
        name=name,
        address=address,
        say=_aside,
    )
    typer.echo(catalogue.summary(store))


@data_app.command("check")
def data_check(source: str, as_json: Json = False, workers: Workers = None) -> None:
    """Look at every scan and list all that is wrong, then all that is strange. Exit code 1 when something is wrong.

    Damaged and missing files, grids that differ, values that mean nothing, the same scan twice, patients in two parts; and as
    warnings what is not annotated and what is far from the other volumes. The rules and the form of --json stand at the head
    of platform/quality.py.
    """
    from medssl.platform import catalogue

    report = catalogue.check(source, workers=workers, say=_aside)
    _print(report.as_json(), as_json, report.describe())
    if report.errors:
        raise typer.Exit(1)


@data_app.command("split")
def data_split(
    source: str,
    name: Annotated[str, typer.Argument(help="A rule, or a file; see above.")] = "seed-0",
    as_json: Json = False,
) -> None:
    """Draw a split of a prepared set by its name, keep it, and show its patients. Trainings take it as -o data.split=NAME.

    \b
    seed-N               0.7, 0.1 and 0.2 of the labelled patients train, select and test
    fold-I-of-K-seed-N   tests on the I-th (from 0) of K folds, which together are all labelled patients
    …-by-site            the same, every site shared out in proportion; also -by-group, -by-phase
    official             the parts that the data set publishes
    FILE.json            {"train": [...], "val": [...], "test": [...]}: names of patients or volumes
    FILE.csv             the same as columns patient (or volume) and part
    """
    from medssl.platform import catalogue

    split = catalogue.split(catalogue.open_store(source, say=_aside), name)
    parts = {part: list(getattr(split, part)) for part in ("train", "val", "test", "labelled")}
    lines = [f"{part} ({len(patients)}): {', '.join(patients)}" for part, patients in parts.items()]
    _print({"name": split.name, **parts}, as_json, "\n".join([f"split {split.name}", *lines]))


@data_app.command("card")
def data_card(
    source: str,
    output: Annotated[
        str, typer.Option("--format", help="html, with its pictures inside, or md, with them beside it.")
    ] = "html",
    out: Annotated[Path | None, typer.Option(help="The file; default: card.html or card.md in the set's folder.")] = None,
) -> None:
    """Write what a prepared set holds: counts, spacings, intensities, classes, sample slices, licence, quality, hashes."""
    from medssl.platform import card, catalogue

    typer.echo(str(card.write(catalogue.open_store(source, say=_aside), output, out)))


@data_app.command("download")
def data_download(name: Annotated[str, typer.Argument(help="A data set that lies open, such as Task04_Hippocampus.")]) -> None:
    """Fetch and unpack a data set that lies open. Typed again, it goes on; of others it tells the page to register at."""
    from medssl.platform import download
    from medssl.platform.site import Site

    path = download.download(name, Site.here().data / "downloads", say=_aside)
    typer.echo(f"{path}\nnext: medssl data prepare {path}")


@data_app.command("show")
def data_show(
    source: str,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("slices.png"),
    volumes: Annotated[int, typer.Option(help="How many volumes.")] = 4,
) -> None:
    """Write a PNG of slices with the contours of their labels."""
    from medssl.platform import catalogue, montage

    store = catalogue.open_store(source, say=_aside)
    montage.show(store, out, volumes)
    typer.echo(str(out))


@app.command()
def pretrain(
    method: Annotated[str, typer.Argument(help="A file of methods/.")],
    start: From = None,
    data: DataName = "phantom",
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and views; else what -p or -o say, or 0.")] = None,
    spatial_dims: Dims = None,
    index: Annotated[int, typer.Option(min=0, help="Which of the k pretrainings of a sweep's arm.")] = 0,
    files: Files = None,
    overrides: Overrides = None,
) -> None:
    """Pretrain one encoder, fresh or from given weights."""
    from medssl.platform import single

    options = _dimensioned(overrides, spatial_dims)
    typer.echo(single.pretrain(method, start, data, seed, files or [], options, say=_aside, index=index))


@app.command()
def finetune(
    start: From = None,
    data: DataName = "phantom",
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and views; else what -p or -o say, or 0.")] = None,
    spatial_dims: Dims = None,
    index: Annotated[int, typer.Option(min=0, help="Which of the k pretrainings of a sweep's arm.")] = 0,
    number: Annotated[int, typer.Option(min=0, help="Which fine-tuning of that pretraining.")] = 0,
    labelled: Annotated[int | None, typer.Option(min=1, help="Labelled patients; short for -o data.labelled=2.")] = None,
    hooks: Annotated[
        list[str] | None, typer.Option("--hook", help="A file of methods/hooks/; its settings are -o hook.NAME.….")
    ] = None,
    files: Files = None,
    overrides: Overrides = None,
) -> None:
    """Train a segmentation network, from given weights or from scratch, and score it on the test patients."""
    from medssl.platform import single

    budget = [f"data.labelled={labelled}"] if labelled else []
    stacked = [*(f"hooks.{name}={{}}" for name in hooks or []), *budget, *(overrides or [])]
    given = (start, data, seed, files or [], _dimensioned(stacked, spatial_dims))
    typer.echo(single.finetune(*given, say=_aside, index=index, number=number))


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="A fine-tuning's id.")],
    pictures: Annotated[Path | None, typer.Option(help="Folder for pictures of the best and the worst test volume.")] = None,
    as_json: Json = False,
) -> None:
    """The scores of a finished fine-tuning, per class and patient, under the metric contract."""
    from medssl.platform import single

    for path in single.pictures(run, pictures) if pictures else ():
        typer.echo(str(path), err=True)
    summary = single.evaluate_run(run)
    _print(summary, as_json, single.describe(summary))


@app.command()
def predict(
    run: Annotated[str, typer.Argument(help="A fine-tuning's id.")],
    files: Annotated[list[Path], typer.Argument(help="Scans: NIfTI, MetaImage, NRRD, DICOM folders, pictures.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the predicted label volumes.")],
) -> None:
    """Segment volumes; each answer lies in its input's own geometry."""
    from medssl.platform import single

    for path in single.predict(run, files, out, say=_aside):
        typer.echo(str(path))


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A pretraining's or a fine-tuning's id.")],
    target: Annotated[str, typer.Option("--to", help="monai, timm, nnunet or safetensors.")],
    out: Annotated[Path | None, typer.Option("--out", help="The file; default: the run's id in this folder.")] = None,
) -> None:
    """Write trained weights for another library, and print the lines of Python that load them."""
    from medssl.platform import export as exports

    typer.echo(exports.export(run, target, out))


@app.command("import-config")
def import_config(file: Annotated[Path, typer.Argument(help="A YAML file of the published PDCR and UAFS code.")]) -> None:
    """Print another code's configuration as settings for -p, and what of it cannot be kept."""
    from medssl.platform import import_config as importing

    settings, lost = importing.imported(file)
    typer.echo(importing.text(settings, lost, file, _aside), nl=False)


@app.command()
def sweep(
    space: Annotated[str, typer.Argument(help="A file of search_spaces/, or a path to your own.")],
    data: DataName = "phantom",
    pretrainings: Annotated[int, typer.Option(min=1, help="Pretrainings per arm (k).")] = 2,
    finetunings: Annotated[int, typer.Option(min=1, help="Fine-tunings of each pretraining (m).")] = 2,
    search: Annotated[
        str | None, typer.Option(help="grid, race, tpe, gp or random; default: what the space says, else grid.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Arms that tpe, gp or random may ask for.")] = 20,
    confirm: Annotated[
        int | None,
        typer.Option(min=0, help="Fresh pretrainings of the leading arms and the control; default: 5, after a grid none."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Also print which arms no other beats in score and gpu-hours, or labels.")
    ] = None,
    time_budget: Annotated[str | None, typer.Option(help="Stop after this long: 90s, 30m, 8h.")] = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster; default: this machine.")] = None,
    wanted: Annotated[float, typer.Option(help="The difference in the metric that would matter to you.")] = 0.01,
    spatial_dims: Dims = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="What one machine costs per hour, in any one currency: money is counted in it.")
    ] = None,
    max_cost: Annotated[
        float | None, typer.Option(min=0, help="Stop when the sweep's machine-hours, earlier starts included, cost this.")
    ] = None,
    shutdown: Annotated[
        bool,
        typer.Option("--shutdown-when-done", help="Then take down the cluster that this runs on (MEDSSL_SHUTDOWN says how)."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop: hours, money, storage, power.")] = False,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="With --dry-run: measure the pace for some seconds.")] = False,
    files: Files = None,
    overrides: Overrides = None,
) -> None:
    """Run every arm of a question, repeats included, and print the leaderboard. Typed again, it does only what is missing."""
    from medssl.platform import sweep as sweeps

    given = (tuple(files or ()), tuple(_dimensioned(overrides, spatial_dims)))
    request = sweeps.Request(space, data, pretrainings, finetunings, search, trials, *given, confirm)
    if dry_run:
        planned = sweeps.dry_run(request, _aside, address=address, price=price, wanted=wanted, calibrate=calibrate)
        typer.echo(planned)
        return
    if calibrate:
        raise UsageError("--calibrate measures for a plan: add --dry-run")
    answer = sweeps.run(
        request,
        time_budget=time_budget,
        address=address,
        wanted=wanted,
        against=against,
        price=price,
        max_cost=max_cost,
        shutdown=shutdown,
        say=_aside,
    )
    typer.echo(answer)


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="A sweep; default: the newest.")] = None,
    as_json: Json = False,
    watching: Annotated[bool, typer.Option("--watch", help="Keep showing it in this terminal; Ctrl-C leaves it.")] = False,
) -> None:
    """What a sweep has finished, what is running, what it has spent, and how long it will take."""
    from medssl.platform import watch
    from medssl.platform.site import Site

    site = Site.here()
    if watching:
        watch.attach(site, site.find_sweep(name))
        return
    state = watch.state(site, site.find_sweep(name))
    _print(state, as_json, watch.describe(state))


@app.command()
def stop(name: Annotated[str | None, typer.Argument(help="A sweep; default: the newest.")] = None) -> None:
    """Ask a running sweep to stop. Typing the sweep again continues it."""
    from medssl.platform import watch
    from medssl.platform.site import Site

    typer.echo(watch.stop(Site.here().find_sweep(name)))


@app.command()
def leaderboard(
    names: Annotated[list[str] | None, typer.Argument(help="Sweeps; default: the newest.")] = None,
    output: Annotated[str, typer.Option("--format", help="table, paper, md, csv, json or html.")] = "table",
    sort: Annotated[str, typer.Option(help="mean, arm, or difference to the control, largest first.")] = "mean",
    metric: Annotated[str, typer.Option(help="dice, nsd, hd95_mm, asd_mm or legacy-slice-dice.")] = "dice",
    wanted: Annotated[float, typer.Option(help="The difference that would matter to you, in the metric's unit.")] = 0.01,
    phase: Annotated[str | None, typer.Option(help="search or confirm; default: confirm where there is one.")] = None,
    pretrainings: Annotated[
        bool,
        typer.Option("--pretrainings", help="Loss, probe and features of every pretraining instead: table, md, csv, json."),
    ] = False,
) -> None:
    """Arms with intervals, differences to the control, and what cannot be told apart.

    The unit of evidence is the pretraining: with k pretrainings against k, the smallest p an exact test can give is
    1/3 for k=2, 1/10 for k=3, 1/35 for k=4 and 1/126 for k=5.
    """
    if pretrainings:
        from medssl.platform import pretrainings as before

        for name in names or (None,):
            typer.echo(before.table(name, output))
        return
    from medssl.platform import answers

    typer.echo(answers.answer(names or [], output, metric, wanted, sort, phase))


@app.command()
def report(
    name: Annotated[str | None, typer.Argument(help="A sweep; default: the newest.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file; default: report.html in the sweep's folder.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for every figure as PNG and SVG.")] = None,
    metric: Annotated[str, typer.Option(help="dice, nsd, hd95_mm, asd_mm or legacy-slice-dice.")] = "dice",
    wanted: Annotated[float, typer.Option(help="The difference that would matter to you, in the metric's unit.")] = 0.01,
) -> None:
    """One HTML file with the answer of a sweep, finished or not: verdict, figures, and how to reproduce every number."""
    from medssl.platform import report as reports

    for path in reports.write(name, out, figures, metric, wanted, say=_aside):
        typer.echo(str(path))


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Files of platform/benches/; default: all.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("-o", help="One setting of the bench named: volumes=500.")] = None,
    as_json: Json = False,
) -> None:
    """Speed as ratios: ours and a named rival in one run."""
    from medssl.platform import bench as benches
    from medssl.platform.config import override

    rows = benches.run(names or [], say=_aside, changes=dict(map(override, overrides or [])))
    _print([row.as_dict() for row in rows], as_json, benches.describe(rows))


@cluster_app.command("render")
def cluster_render(
    kind: Annotated[str, typer.Argument(help="aws, gcp, kubernetes or slurm.")],
    command: Annotated[list[str] | None, typer.Argument(help="Behind --: what a RayJob or a Slurm job shall run.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("-o", help="One setting: max=4, store=s3://bucket/medssl, sbatch.mem=64G.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print, which is all that render does.")] = False,
) -> None:
    """Print the file that brings up a cluster: for `ray up`, `kubectl apply -f` or `sbatch`."""
    from medssl.platform import cluster

    typer.echo(cluster.render(kind, changes or [], command or []), nl=False)


@cluster_app.command("submit", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def cluster_submit(
    words: Annotated[list[str], typer.Argument(help="What to run there: sweep SPACE --data D …")],
    address: At = None,
    environment: Annotated[
        list[str] | None, typer.Option("--env", help="NAME=VALUE for the job: MEDSSL_RUNS=s3://bucket/runs.")
    ] = None,
    cpus: Annotated[
        float | None, typer.Option(min=0, help="Cores that the command itself holds; a sweep holds none, its stages do.")
    ] = None,
    gpus: Annotated[float, typer.Option(min=0, help="The same in GPUs: `--gpus 1 pretrain simsiam` trains on one.")] = 0.0,
) -> None:
    """Run a command of medssl on the cluster, as a job that outlives this machine. Its own options come first.

    Files below this folder that the command names travel along; data and runs lie where the head's MEDSSL_DATA and MEDSSL_RUNS
    say, or --env.
    """
    from medssl.platform import jobs

    typer.echo(jobs.submit(words, address, environment or (), cpus, gpus))


@cluster_app.command("status")
def cluster_status(address: At = None, as_json: Json = False) -> None:
    """The jobs of medssl on the cluster."""
    from medssl.platform import jobs

    found = jobs.running(address)
    _print(found, as_json, jobs.describe(found))


@cluster_app.command("logs")
def cluster_logs(
    job: Annotated[str | None, typer.Argument(help="A job, or the beginning of its name; default: the newest.")] = None,
    address: At = None,
) -> None:
    """What a job has printed."""
    from medssl.platform import jobs

    typer.echo(jobs.logs(job, address), nl=False)


@cluster_app.command("stop")
def cluster_stop(
    job: Annotated[str | None, typer.Argument(help="A job, or the beginning of its name; default: the newest.")] = None,
    address: At = None,
) -> None:
    """End a job. Submitted again, its sweep goes on where it was."""
    from medssl.platform import jobs

    typer.echo(jobs.stop(job, address))


@cluster_app.command("down")
def cluster_down(
    address: At = None,
    sure: Annotated[bool, typer.Option("--yes", help="Also while a sweep runs; typed again, it goes on.")] = False,
) -> None:
    """Take the cluster down, its head included."""
    from medssl.platform import jobs

    typer.echo(jobs.down(address, sure=sure))


if __name__ == "__main__":
    main()
