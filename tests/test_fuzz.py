"""Damaged and hostile files through `data check` and `data prepare`: each is refused in one sentence, or read.

Seeded mutations of small valid scans: bits, runs, lengths and magic numbers of headers and bodies, truncations, wrong gzip,
absurd dimensions, bombs. A process with bounded memory and time looks at each. 150 of them by default; all of them with

    MEDSSL_FUZZ=2000 python -m pytest tests/test_fuzz.py -s
"""

import gzip
import io
import json
import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest

NUMBER = int(os.environ.get("MEDSSL_FUZZ", "150"))
MEMORY = 3 << 30  # bytes of address space, of which libraries map about one
SECONDS = 20  # for one file
SHAPE = (9, 8, 5)

WORKER = """
import json, resource, signal, sys, time, traceback, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import numpy as np
import nibabel, PIL.Image, pydicom, SimpleITK
from medssl.platform import ingest, quality
from medssl.platform.errors import Problem
from medssl.platform.geometry import PRESETS
from medssl.platform.ingest import VolumeTask
from medssl.platform.records import Case, DataInfo

memory, seconds = map(int, sys.argv[1:3])
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
info = DataInfo("toy", ("background", "one", "two"), preset="mr")
for line in sys.stdin:
    image, label, out, preset = line.rstrip("\\n").split("\\t")
    signal.alarm(seconds)
    case = Case("p", "v", (Path(image),), Path(label) if label else None)
    begun, answer = time.monotonic(), {}
    try:
        seen = quality.look(quality.Task(case, info, PRESETS[preset], 1 << 30))
        answer["check"] = [str(problem) for _, problem in seen.problems]
        try:
            ingest.ingest_volume(VolumeTask(case, info, PRESETS[preset], Path(out), limit=1 << 30))
            answer["prepare"] = None
        except Problem as problem:
            answer["prepare"] = str(problem)
    except BaseException:
        answer["crash"] = traceback.format_exc()
    signal.alarm(0)
    answer["seconds"] = time.monotonic() - begun
    answer["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(json.dumps(answer), flush=True)
"""


def noise(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16)


def dicom(array):
    """One plane as a DICOM file."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["fuzz"])
    said = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    said.SOPClassUID, said.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    said.SeriesInstanceUID, said.Modality, said.PatientID = generate_uid(entropy_srcs=["series"]), "CT", "p"
    said.Rows, said.Columns = array.shape
    said.BitsAllocated = said.BitsStored = 16
    said.HighBit, said.PixelRepresentation, said.SamplesPerPixel = 15, 1, 1
    said.PhotometricInterpretation = "MONOCHROME2"
    said.PixelSpacing, said.ImageOrientationPatient, said.ImagePositionPatient = [1, 1], [1, 0, 0, 0, 1, 0], [0, 0, 0]
    said.SliceThickness, said.RescaleSlope, said.RescaleIntercept, said.InstanceNumber = 1, 1, 0, 1
    said.PixelData = array.tobytes()
    made = io.BytesIO()
    pydicom.dcmwrite(made, said, enforce_file_format=True)
    return made.getvalue()


def picture(array):
    from PIL import Image

    made = io.BytesIO()
    Image.fromarray(array.astype(np.uint8)).save(made, "PNG")
    return made.getvalue()


def itk(array, folder):
    import SimpleITK

    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array.T), str(folder / "seed.mha"))
    return (folder / "seed.mha").read_bytes()


def seeds(folder):
    """Ending -> valid bytes."""
    pytest.importorskip("pydicom")
    pytest.importorskip("SimpleITK")
    nifti = nibabel.Nifti1Image(noise(), np.diag([1.0, 1, 2, 1])).to_bytes()
    return {
        ".nii": nifti,
        ".nii.gz": gzip.compress(nifti, mtime=0),
        ".png": picture(noise(1, (16, 12)) % 256),
        ".dcm": dicom(noise(2, (16, 12))),
        ".mha": itk(noise(3), folder),
    }


INTERESTING = [0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


def mutated(content, rng):
    """One to four changes of bytes, most of them where headers are."""
    made = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        size = len(made)
        if not size:
            break
        at = rng.randrange(min(size, 400)) if rng.random() < 0.7 else rng.randrange(size)
        kind = rng.randrange(8)
        if kind == 0:
            made[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            made[at] = rng.randrange(256)
        elif kind == 2:
            del made[at:]  # cut short
        elif kind == 3:
            del made[at : at + rng.randrange(1, 64)]
        elif kind == 4:
            made[at:at] = rng.randbytes(rng.randrange(1, 64))
        elif kind == 5:
            form = rng.choice(("<H", ">H", "<I", ">I"))
            value = rng.choice(INTERESTING) & (0xFFFF if form[1] == "H" else 0xFFFFFFFF)
            made[at : at + struct.calcsize(form)] = struct.pack(form, value)
        elif kind == 6:
            made[at : at + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), -1.0, 1e38, 1e-38, 0.0)))
        else:
            span = rng.randrange(1, 32)
            made[at : at + span] = bytes([rng.choice((0, 255))]) * span
    return bytes(made)


def header(ending, rng):
    """A change that keeps the form: dimensions, data type, spacing or scale of NIfTI; the size and the checksum of PNG."""
    if ending == ".png":
        made = bytearray(picture(noise(1, (16, 12)) % 256))
        made[16:24] = struct.pack(">II", *(rng.choice((0, 1, 12, 1 << 15, 1 << 20, (1 << 31) - 1)) for _ in range(2)))
        made[24:26] = bytes([rng.choice((1, 2, 4, 8, 16, 3)), rng.choice((0, 2, 3, 4, 6, 5))])
        made[29:33] = struct.pack(">I", zlib.crc32(bytes(made[12:29])))
        return bytes(made)
    made = bytearray(nibabel.Nifti1Image(noise(), np.diag([1.0, 1, 2, 1])).to_bytes())
    for _ in range(rng.choice((1, 2))):
        kind = rng.randrange(5)
        if kind == 0:
            index = rng.randrange(8)
            made[40 + 2 * index : 42 + 2 * index] = struct.pack("<h", rng.choice((-1, 0, 1, 2, 3, 4, 7, 8, 32767, -32768)))
        elif kind == 1:
            made[70:74] = struct.pack(
                "<hh", rng.choice((0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 1536, 2304, 9)), rng.choice((8, 16, 64))
            )
        elif kind == 2:
            index = rng.randrange(8)
            made[76 + 4 * index : 80 + 4 * index] = struct.pack("<f", rng.choice((0.0, -1.0, float("nan"), 1e30, 1e-30)))
        elif kind == 3:
            made[108:120] = struct.pack("<fff", *(rng.choice((0.0, 352.0, 1e9, float("nan"), -5.0, 1e-30)) for _ in range(3)))
        else:
            made[280:328] = struct.pack("<12f", *(rng.choice((0.0, 1.0, float("inf"), float("nan"), 1e20)) for _ in range(12)))
    return gzip.compress(bytes(made), mtime=0) if ending == ".nii.gz" else bytes(made)


def bomb(claimed):
    """A small gzip file that unpacks to 300 MB, with a header that claims it or not."""
    nifti = bytearray(nibabel.Nifti1Image(noise(), np.eye(4)).to_bytes()[:352])
    if claimed:
        nifti[40:48] = struct.pack("<4h", 3, 30000, 5000, 1)
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = bytes(1 << 20)
    return packer.compress(bytes(nifti)) + b"".join(packer.compress(block) for _ in range(300)) + packer.flush()


def inner(content, rng):
    """A valid gzip stream of a mutated file; with a wrong length or checksum now and then, or twice packed."""
    made = gzip.compress(mutated(gzip.decompress(content), rng), mtime=0)
    kind = rng.randrange(6)
    if kind == 0:
        return made[:-8] + rng.randbytes(8)
    if kind == 1:
        return gzip.compress(made)
    return made + rng.randbytes(16) if kind == 2 else made


def mutations(folder):
    """File name and bytes of each, the same for the same NUMBER."""
    valid = seeds(folder)
    endings = list(valid)
    yield "a.nii.gz", bomb(claimed=False)
    yield "b.nii.gz", bomb(claimed=True)
    for ending in endings:
        yield f"empty{ending}", b""
        yield f"valid{ending}", valid[ending]
    for number in range(NUMBER - 2 - 2 * len(endings)):
        rng = random.Random(number)
        ending = endings[number % len(endings)]
        content = valid[ending]
        how = rng.random()
        if ending in (".nii", ".nii.gz", ".png") and how < 0.35:
            made = header(ending, rng)
        elif ending == ".nii.gz" and how < 0.7:
            made = inner(content, rng)
        elif how > 0.97:
            made = valid[rng.choice(endings)]  # another format under this name
        else:
            made = mutated(content, rng)
        yield f"{number}{ending}", made


class Looker:
    """The process with bounds, started again where one file brings it down."""

    def __init__(self):
        self.process = None

    def ask(self, *paths):
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-c", WORKER, str(MEMORY), str(SECONDS)]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        self.process.stdin.write("\t".join(map(str, paths)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"crash": f"the process died with {self.process.wait()}", "seconds": 0, "peak": 0}

    def end(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def wrong(answer, folder):
    """What breaks the law, if anything does."""
    if "crash" in answer:
        return answer["crash"]
    check, prepare = answer["check"], answer["prepare"]
    for sentence in [*check, *([prepare] if prepare else [])]:
        if "\n" in sentence or not sentence.startswith(str(folder)):
            return f"not one sentence about the file: {sentence!r}"
    if bool(check) != bool(prepare):
        return f"check says {check}, prepare {prepare}"
    return None


@pytest.mark.slow
def test_every_damaged_or_hostile_file_is_refused_in_one_sentence_or_read(tmp_path):
    looker, broken, refused, slowest, peak = Looker(), [], 0, 0.0, 0
    label = tmp_path / "label.nii.gz"
    nibabel.Nifti1Image((noise(5) % 3).astype(np.uint8), np.diag([1.0, 1, 2, 1])).to_filename(label)
    files = list(mutations(tmp_path))
    assert len(files) == NUMBER
    try:
        for turn, (name, content) in enumerate(files):
            folder = tmp_path / str(turn)  # alone: a DICOM file's folder is its series
            folder.mkdir()
            file = folder / name
            file.write_bytes(content)
            as_label = turn % 4 == 3 and name.endswith((".nii", ".nii.gz"))
            image = tmp_path / "image.nii"
            if as_label and not image.exists():
                nibabel.Nifti1Image(noise(), np.diag([1.0, 1, 2, 1])).to_filename(image)
            answer = looker.ask(*((image, file) if as_label else (file, "")), folder / "out.arrow", ("mr", "ct")[turn // 5 % 2])
            if what := wrong(answer, tmp_path):
                broken.append(f"{name}: {what}")
            if name.startswith("valid"):
                assert answer.get("prepare", "") is None or as_label, (name, answer)
            refused += bool(answer.get("prepare"))
            slowest, peak = max(slowest, answer["seconds"]), max(peak, answer["peak"])
    finally:
        looker.end()
    print(f"{NUMBER} files: {refused} refused, {NUMBER - refused - len(broken)} read, {len(broken)} broken; "  # noqa: T201
          f"slowest {slowest:.2f} s, peak {peak >> 20} MB")  # fmt: skip
    if broken and (kept := os.environ.get("MEDSSL_FUZZ_LOG")):
        Path(kept).write_text("\n\n".join(broken))
    assert not broken, "\n".join(broken[:3])
    assert slowest < SECONDS
    assert refused > NUMBER / 3
