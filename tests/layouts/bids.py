"""A miniature BIDS folder: two sessions, two suffixes, class ids, a subject without label, groups."""

from pathlib import Path

from medssl.tests.layouts._scan import Drawn, nifti, scan, write_json


def write(root: Path) -> list[Drawn]:
    write_json(root / "dataset_description.json", {"Name": "mini", "BIDSVersion": "1.9.0", "License": "CC0"})
    (root / "participants.tsv").write_text(
        "participant_id\tage\tgroup\nsub-01\t30\tcontrol\nsub-02\t40\tpatient\nsub-03\t50\tcontrol\n"
    )
    labels = root / "derivatives" / "manual"
    write_json(labels / "dataset_description.json", {"Name": "manual labels"})
    (labels / "dseg.tsv").write_text("index\tname\n1\tgrey matter\n2\twhite matter\n")
    drawn = []
    for seed, (subject, session, group) in enumerate(
        (("01", "a", "control"), ("01", "b", "control"), ("02", "a", "patient"), ("03", "a", "control"))
    ):
        stem, folder = f"sub-{subject}_ses-{session}", Path(f"sub-{subject}") / f"ses-{session}" / "anat"
        image, label = scan(seed, 3)
        nifti(root / folder / f"{stem}_T1w.nii.gz", image)
        known = subject != "03"
        if known:
            nifti(labels / folder / f"{stem}_T1w_dseg.nii.gz", label)
        drawn.append(Drawn(f"{stem}_T1w", f"sub-{subject}", label if known else None, phase="T1w", group=group, modality="mr"))
    nifti(root / "sub-02" / "ses-a" / "anat" / "sub-02_ses-a_FLAIR.nii.gz", scan(8, 3)[0])
    return [*drawn, Drawn("sub-02_ses-a_FLAIR", "sub-02", phase="FLAIR", group="patient", modality="mr")]
