"""Data by name: a data set of platform/datasets/, a prepared set in the data folder, or a folder of scans."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medssl.platform import find, splits
from medssl.platform.config import override
from medssl.platform.errors import UsageError
from medssl.platform.geometry import PRESETS, may_filter
from medssl.platform.site import Site
from medssl.platform.splits import Split
from medssl.platform.store import Store

if TYPE_CHECKING:
    from medssl.platform import ingest, quality

Say = Callable[[str], None]


def folder(source: str) -> Path:
    """Where the prepared set of a source lies: the data folder, under the source's own name."""
    return Site.here().data / Path(source).name


def is_prepared(source: str) -> bool:
    return (folder(source) / "manifest.json").exists()


def open_store(source: str, say: Say) -> Store:
    """The prepared set of a source, prepared now if it is not yet."""
    return Store.open(folder(source)) if is_prepared(source) else prepare(source, say=say)


def prepare(
    source: str,
    *,
    preset: str | None = None,
    changes: Mapping[str, Any] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    workers: int | None = None,
    name: str | None = None,
    address: str | None = None,
    say: Say,
) -> Store:
    """Prepare a source under its own or the given name, write down the splits that papers publish of it, and draw one.

    address   a Ray cluster whose nodes all see the scans and the data folder under the same paths; None: this machine
    """
    from medssl.platform import ingest, scans

    name, source = name or Path(source).name, _known(source)
    with _hands(address) as work:
        store = ingest.prepare(
            source,
            folder(name),
            preset=preset,
            changes=changes,
            workers=workers,
            overwrite=overwrite,
            progress=_telling(f"preparing {name}", say),
            map_unordered=work,
        )
    missing, read = [], scans.folder_of(source)
    if read and (others := scans.left_out(read, preset)):
        say(f"{others} scans left out: the preset is not for their modality; prepare them by --preset ct or mr, and a --name")
    for each in scans.published(read) if read else []:
        try:
            splits.save(each, store)
        except UsageError as error:  # not all of the published patients are in this folder
            missing.append(str(error))
    if missing:
        say(f"{len(missing)} published splits left out: {missing[0]}")
    try:
        split(store, f"seed-{seed}")
    except UsageError as error:  # too few labelled patients to train on, but enough to be looked at
        say(f"no split drawn: {error}")
    return store


@contextlib.contextmanager
def _hands(address: str | None) -> "Iterator[ingest.MapUnordered]":
    """How volumes are worked on: in processes of this machine, or by tasks on a cluster."""
    from medssl.platform import ingest

    if address is None:
        yield ingest.in_processes
        return
    from medssl.platform.trials import connected

    with connected(address):
        yield ingest.on_ray


def _telling(what: str, say: Say) -> Callable[[int, int, str], None]:
    """A line with the time that is left, now and then: at once, every ten seconds, and at the end."""
    begun = told = time.monotonic()
    kind, before = "", 0  # what is counted now, and how much of it an earlier run had done

    def tell(done: int, total: int, of: str) -> None:
        nonlocal told, begun, kind, before
        now = time.monotonic()
        if new := of != kind:
            begun, kind, before = now, of, done
        if new or done == total or now - told >= 10:
            told = now
            left = f", about {(now - begun) / (done - before) * (total - done):.0f} s left" if before < done < total else ""
            say(f"{what}: {done} of {total} {of}{left}")

    return tell


def check(source: str, workers: int | None, say: Say = lambda text: None) -> "quality.Report":
    """Everything that is wrong with or strange about the scans of a source, or a prepared set."""
    from medssl.platform import ingest, quality

    known = _known(source)
    if known not in find.names("dataset") and not Path(known).is_dir():
        known = str(folder(source))
    told = _telling(f"checking {Path(source).name}", say)
    return quality.check(known, workers=workers, progress=told, map_unordered=ingest.in_processes)


def remember(name: str, overwrite: bool, **said: Any) -> None:
    """Write down where scans of one's own are, so that `name` is their source from now on. Raises UsageError."""
    from medssl.platform.datasets import folders

    if name in find.names("dataset") or Path(name).name != name:
        raise UsageError(f'"{name}" cannot be the name of a set of your own: it is a data set\'s, or a path; choose another')
    where = folders.Where(name=name, **said)
    root = folder(name) / "source"
    if is_prepared(name) and not overwrite and not (folders.matches(root) and folders.where(root) == where):
        raise UsageError(f"{folder(name)} was prepared from other folders or classes; prepare it anew with --overwrite")
    folders.remember(root, where)


def _known(source: str) -> str:
    """`source`, if there is such a data set or folder, or where its scans are remembered; else UsageError, the nearest name."""
    if (folder(source) / "source" / "folders.json").is_file() and not Path(source).is_dir():
        return str(folder(source) / "source")
    if source not in find.names("dataset") and not Path(source).is_dir() and not folder(source).is_dir():
        known = [*find.names("dataset"), *(file.parent.name for file in Site.here().data.glob("*/manifest.json"))]
        raise UsageError(f'no data set, prepared set or folder "{source}"; {find.nearest(source, known)}')
    return source


def split(store: Store, name: str) -> Split:
    """A split of a prepared set by its name, drawn or read on first use; splits.py says which names there are."""
    return splits.named(store, name)


def preset_change(text: str) -> tuple[str, Any]:
    """One `-o` of `data prepare`; lists become tuples."""
    name, value = override(text)
    return name, tuple(value) if isinstance(value, list) else value


def entries() -> dict[str, Any]:
    """Data sets that can be named, and prepared ones with their counts."""
    prepared = {}
    for manifest in sorted(Site.here().data.glob("*/manifest.json")):
        store = Store.open(manifest.parent)
        prepared[manifest.parent.name] = {
            "volumes": len(store.volumes),
            "patients": len(store.patients),
            "slices": sum(volume.slices for volume in store.volumes),
            "classes": list(store.classes[1:]),
            "licence": store.licence,
            "quantisation": store.quantisation | {"dtype": store.preset.dtype},
            "content": store.content_hash,
        }
    known = {
        name: {
            "what": find.summary("dataset", name),
            "licence": find.constant("dataset", name, "LICENCE", ""),
            "obtain": find.constant("dataset", name, "OBTAIN", ""),
        }
        for name in find.names("dataset")
    }
    return {"known": known, "presets": {name: asdict(preset) for name, preset in PRESETS.items()}, "prepared": prepared}


def describe(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = ["known by name: `medssl data prepare NAME` shows the form of the folder to give"]
    for name, about in found["known"].items():
        lines.append(f"  {name:<20} {about['what']}")
        lines += [f"  {'':<20} {about['licence']}; {about['obtain']}"] if about["obtain"] else []
    lines += [f"presets, for data prepare --preset: {', '.join(found['presets'])} (platform/geometry.py)"]
    lines += [f"prepared in {Site.here().data}"]
    for name, about in found["prepared"].items():
        counts = f"{about['patients']} patients, {about['volumes']} volumes, {about['slices']} slices"
        stored = f"{about['quantisation']['dtype']}{_within(about['quantisation'])}"
        lines.append(f"  {name:<20} {counts}, {len(about['classes'])} classes, {stored}, {about['licence']}")
    return "\n".join(lines if found["prepared"] else [*lines, "  none yet: medssl data prepare phantom"])


def _within(quantisation: Mapping[str, Any]) -> str:
    return f" within {quantisation['max']:.2g} (rms {quantisation['rms']:.2g})" if "max" in quantisation else ""


def losses(store: Store) -> list[str]:
    """A line for each thing that the prepared form no longer says of the scans: rounding, labels cut off, slices left out."""
    lines = []
    cut = [volume for volume in store.volumes if volume.lost.get("label_voxels")]
    if cut:
        part = {volume.volume: volume.lost["label_voxels"] / volume.lost["label_voxels_of"] for volume in cut}
        worst = max(part, key=lambda name: part[name])
        lines.append(
            f"labels cut off by the box or the crop in {len(cut)} volumes, most in {worst}: {part[worst]:.1%} of its foreground"
        )
    if store.preset.slice_content or store.preset.slice_foreground:
        left = sum(volume.geometry["slices"] - volume.slices for volume in store.volumes if "kept" in volume.geometry)
        whole = sum(not may_filter(volume.labelled, volume.part) for volume in store.volumes)
        lines.append(f"{left} slices left out; {whole} volumes that a split may put into its test part keep all of theirs")
    said = store.quantisation
    if said:
        unit = "of a standard deviation" if store.preset.zscore else "of the range 0 to 1"
        own = ""
        if store.preset.window and not store.preset.zscore:
            width = store.preset.window[1] - store.preset.window[0]
            name = "levels of 255" if store.preset.window == PRESETS["picture"].window else "HU"
            own = f": {width * said['max']:.2g} {name} (rms {width * said['rms']:.2g})"
        lines.append(f"stored as {store.preset.dtype}{_within(said)} {unit} from float32{own}")
    return lines


def summary(store: Store) -> str:
    """What a prepared set holds, with its splits; last, what it no longer says of the scans."""
    slices = sum(volume.slices for volume in store.volumes)
    counts = f"{len(store.volumes)} volumes of {len(store.patients)} patients, {slices} slices"
    lines = [f"{store.root}: {counts}, content {store.content_hash}"]
    for file in sorted((store.root / "splits").glob("*.json")):
        parts = splits.load(store, file.stem)
        train = f"{len(parts.train)} train ({len(parts.labelled)} labelled)"
        lines.append(f"split {parts.name}: {train}, {len(parts.val)} val, {len(parts.test)} test patients")
    return "\n".join([*lines, *losses(store)])
