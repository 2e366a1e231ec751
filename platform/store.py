"""A prepared data set on disk: `manifest.json` says what is in it, `slices/*.parquet` hold it, one row per slice.

    patient, volume     string
    slice_index         int32, from the lowest slice up
    position            float32, 0 at the volume's lowest slice, 1 at its highest
    image               binary, (channels, height, width) of the preset's dtype, row after row
    label               binary, (height, width) uint8 class ids, UNLABELLED where nobody annotated; null: no label at all
    height, width       int32, pixels; rows run towards the patient's right, columns towards anterior, where the preset's
                        orientation says nothing else
    channels            int32: the scan's, and in 2.5D those of the slices around, from the lowest
    spacing_mm          list of 3 float32: between rows, columns, slices
    foreground          float32, fraction of the annotated pixels that are not background; null when there are none

Rows are shuffled once over all files (a fixed seed), so that any stretch of them is a fair sample. The manifest is written
last: a folder without one is not prepared. Opening a store reads the manifest only and imports nothing heavy.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medssl.platform.errors import RunError, UsageError
from medssl.platform.geometry import Geometry, Preset
from medssl.platform.records import Part

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA = 1  # raise it when what is stored changes: stores of another schema are refused


@dataclass(frozen=True)
class VolumeRecord:
    """What the manifest says about one volume."""

    volume: str
    patient: str
    part: Part | None  # of the data set's official split
    labelled: bool
    slices: int
    height: int
    width: int
    channels: int
    spacing_mm: tuple[float, float, float]  # between rows, columns, slices
    phase: str | None
    geometry: Geometry  # how `geometry.restore` puts labels back into the scan's grid
    digest: str  # of its content, whatever file its slices lie in
    lost: Mapping[str, float] = dataclasses.field(
        default_factory=dict
    )  # by rounding and cropping, as `geometry.Prepared` has it
    site: str | None = None
    group: str | None = None
    content: str = ""  # of its pixels alone, whoever they are said to belong to; equal for a scan that is there twice


@dataclass(frozen=True)
class Store:
    """A prepared data set, opened."""

    root: Path
    name: str
    classes: tuple[str, ...]  # position is the class id; 0 is the background
    tolerance_mm: tuple[float, ...] | None
    licence: str
    citation: str
    defaults: Mapping[str, Any]  # dotted settings that suit this data set
    preset: Preset
    content_hash: str  # of volumes and classes: equal content, equal hash, whatever the order of work
    source: str  # signature of the files it was prepared from
    files: tuple[Path, ...]
    volumes: tuple[VolumeRecord, ...]  # sorted by name

    @staticmethod
    def open(root: Path) -> "Store":
        """Raises UsageError when the folder is not prepared, RunError when its manifest cannot be read."""
        root = Path(root)
        path = root / "manifest.json"
        try:
            said = json.loads(path.read_text())
        except FileNotFoundError:
            raise UsageError(f"{root} is not prepared; run medssl data prepare to make a store there") from None
        except ValueError as error:
            raise RunError(f"{path}: not readable as JSON ({error}); delete it and run medssl data prepare again") from error
        if said.get("schema") != SCHEMA:
            raise UsageError(f"{path}: schema {said.get('schema')}, expected {SCHEMA}; prepare it anew with --overwrite")
        return Store(
            root=root,
            classes=tuple(said["classes"]),
            tolerance_mm=None if said["tolerance_mm"] is None else tuple(said["tolerance_mm"]),
            preset=Preset.from_json(said["preset"]),
            files=tuple(root / "slices" / file for file in said["files"]),
            volumes=tuple(VolumeRecord(**{**each, "spacing_mm": tuple(each["spacing_mm"])}) for each in said["volumes"]),
            **{key: said[key] for key in ("name", "licence", "citation", "defaults", "content_hash", "source")},
        )

    def manifest(self) -> dict[str, Any]:
        """What `manifest.json` holds: the fields of this class, with counts for whoever reads it."""
        said = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "root"}
        counts = {"volumes": len(self.volumes), "patients": len(self.patients), "slices": sum(v.slices for v in self.volumes)}
        counts["labelled volumes"] = sum(volume.labelled for volume in self.volumes)
        said |= {"preset": dataclasses.asdict(self.preset), "defaults": dict(self.defaults), "quantisation": self.quantisation}
        said |= {
            "files": [file.name for file in self.files],
            "volumes": [dataclasses.asdict(volume) for volume in self.volumes],
        }
        return {"schema": SCHEMA, "counts": counts, **said}

    @property
    def patients(self) -> tuple[str, ...]:
        """Sorted."""
        return tuple(sorted({volume.patient for volume in self.volumes}))

    @property
    def channels(self) -> int:
        """Of every slice."""
        return self.volumes[0].channels

    @property
    def quantisation(self) -> dict[str, float]:
        """How far stored intensities are from the float32 ones: the greatest distance, and the root of the mean square.

        In the unit of the stored range 0 to 1, of the standard deviation where there is a z-score. Empty for a store that was
        prepared before this was measured.
        """
        if not all("rounding_max" in volume.lost for volume in self.volumes):
            return {}
        sizes = np.array([volume.slices * volume.height * volume.width for volume in self.volumes], float)
        squares = np.array([volume.lost["rounding_rms"] ** 2 for volume in self.volumes])
        greatest = max(volume.lost["rounding_max"] for volume in self.volumes)
        return {"max": greatest, "rms": float(np.sqrt((sizes * squares).sum() / sizes.sum()))}

    def table(
        self,
        patients: Iterable[str] | None = None,
        columns: list[str] | None = None,
        labelled: bool | None = None,
        volumes: Iterable[str] | None = None,
    ) -> "pa.Table":
        """Slices in the order of the files; None: no restriction. Raises UsageError on an unknown patient or volume."""
        import pyarrow.dataset

        kept = self.volumes
        for wanted, field in ((patients, "patient"), (volumes, "volume")):
            if wanted is not None:
                wanted = set(wanted)
                for name in sorted(wanted - {getattr(volume, field) for volume in self.volumes}):
                    raise UsageError(f'no {field} "{name}" in {self.root}; medssl data list shows what is there')
                kept = tuple(volume for volume in kept if getattr(volume, field) in wanted)
        kept = tuple(volume for volume in kept if labelled is None or volume.labelled == labelled)
        every = len(kept) == len(self.volumes)
        rows = None if every else pyarrow.dataset.field("volume").isin([volume.volume for volume in kept])
        try:
            return pyarrow.dataset.dataset([str(file) for file in self.files], format="parquet").to_table(columns, rows)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise RunError(
                f"{self.root}: a slice file is missing or broken ({error}); prepare it anew with --overwrite"
            ) from error

    def arrays(self, volume: str) -> tuple[NDArray[Any], NDArray[np.uint8] | None]:
        """One volume, stacked from its lowest slice up: image (d, c, h, w) in the storage dtype, label (d, h, w) or None."""
        record = next((each for each in self.volumes if each.volume == volume), None)
        table = self.table(volumes=[volume], columns=["slice_index", "image", "label"]).sort_by("slice_index")
        assert record is not None
        plane = (record.height, record.width)
        pixels = b"".join(table["image"].to_pylist())
        image = np.frombuffer(pixels, self.preset.dtype).reshape(record.slices, record.channels, *plane)
        if not record.labelled:
            return image, None
        return image, np.frombuffer(b"".join(table["label"].to_pylist()), np.uint8).reshape(record.slices, *plane)
