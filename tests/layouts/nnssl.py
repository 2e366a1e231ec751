"""A miniature collection of nnssl: two data sets that share a subject, two sessions, a CT, a path from the environment."""

import os
from pathlib import Path

from medssl.tests.layouts._scan import Drawn, nifti, scan, write_json


def write(root: Path) -> list[Drawn]:
    os.environ.setdefault("MEDSSL_TEST_FOLDER", str(root))
    listed = (
        ("ds1", "sub-01", "ses-1", "T1w", "scans/a.nii.gz"),
        ("ds1", "sub-01", "ses-2", "T1w", "$MEDSSL_TEST_FOLDER/scans/b.nii.gz"),
        ("ds2", "sub-01", "ses-1", "FLAIR", str(root / "scans" / "c.nii.gz")),
        ("ds2", "sub-02", "ses-1", "CT", "scans/d.nii.gz"),
    )
    drawn, datasets = [], {}
    for seed, (dataset, subject, session, modality, path) in enumerate(listed):
        name = Path(path).name
        nifti(root / "scans" / name, scan(seed, 1, ct=modality == "CT")[0])
        image = {"name": name, "modality": modality, "image_info": {}, "image_path": path, "associated_masks": None}
        about = datasets.setdefault(dataset, {"dataset_index": dataset, "dataset_info": None, "subjects": {}})
        sessions = about["subjects"].setdefault(subject, {"subject_id": subject, "sessions": {}})["sessions"]
        sessions.setdefault(session, {"session_id": session, "images": []})["images"].append(image)
        patient = f"{dataset}_{subject}"
        volume = f"{patient}_{session}_{name.removesuffix('.nii.gz')}"
        drawn.append(Drawn(volume, patient, phase=modality, modality="ct" if modality == "CT" else "mr"))
    write_json(root / "pretrain_data.json", {"collection_index": 1, "collection_name": "Dataset001_Mini", "datasets": datasets})
    return drawn
