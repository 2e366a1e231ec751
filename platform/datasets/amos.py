"""AMOS22: abdominal CT (500 scans) and MR (100), fifteen organs.

    amos22/
      dataset.json
      imagesTr/amos_0001.nii.gz   labelsTr/amos_0001.nii.gz   200 CT and 40 MR to train on
      imagesVa/amos_0008.nii.gz   labelsVa/amos_0008.nii.gz   100 CT and 20 MR: here the official test part
      imagesTs/amos_0002.nii.gz                               100 CT and 20 MR without labels: for pretraining

Numbers below 500 are CT, from 500 on MR. Ji et al., "AMOS: a large-scale abdominal multi-organ benchmark", NeurIPS 2022,
https://doi.org/10.48550/arXiv.2206.08023; https://zenodo.org/records/7155725 and (with the test images)
https://zenodo.org/records/7262581. Later releases add labels of imagesTs in labelsTs: then both Va and Ts are labelled, and Va
becomes the official validation part.

One preset cannot suit both modalities: `ct` takes the CT scans (default), `--preset mr` the MR scans. dataset.json writes
"arota" and "postcava" for what CLASSES calls aorta and inferior vena cava.
"""

from collections.abc import Iterator
from pathlib import Path

from medssl.platform.records import Case, DataInfo

OBTAIN = "https://zenodo.org/records/7262581"
LICENCE = "CC BY 4.0 on Zenodo; OpenReview says non-commercial"
CLASSES = (
    "background",
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "oesophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
    "duodenum",
    "bladder",
    "prostate or uterus",
)


def matches(root: Path) -> bool:
    """Whether `root` holds training scans with AMOS's names; dataset.json is not needed."""
    return any(root.glob("imagesTr/amos_????.nii.gz"))


def info(root: Path) -> DataInfo:
    """The facts of AMOS22."""
    return DataInfo(
        name="amos",
        classes=CLASSES,
        channels=("CT or MR",),
        licence=LICENCE,
        citation="Ji et al. 2022, https://doi.org/10.48550/arXiv.2206.08023",
        obtain=OBTAIN,
        preset="ct",
    )


def cases(root: Path) -> Iterator[Case]:
    """Every scan of both modalities, with the official part it belongs to where that is labelled."""
    tested = (root / "labelsTs").is_dir()
    for folder, part in (("Tr", "train"), ("Va", "val" if tested else "test"), ("Ts", "test" if tested else None)):
        for image in sorted((root / f"images{folder}").glob("amos_????.nii.gz")):
            volume = image.name.removesuffix(".nii.gz")
            label = root / f"labels{folder}" / image.name
            modality = "ct" if int(volume[5:]) < 500 else "mr"
            yield Case(volume, volume, (image,), label if label.parent.is_dir() else None, part, modality=modality)  # type: ignore[arg-type]
