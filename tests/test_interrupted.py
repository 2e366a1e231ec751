"""Whatever ends an ingest, the next run finishes it: the same content, and nothing half-written taken for whole."""

import json
import os
import resource
import subprocess
import sys

import nibabel
import numpy as np
import pytest

from medssl.platform import ingest
from medssl.platform.errors import RunError

# Every run is a fork of one process that has imported everything. A run dies of SIGKILL at its n-th touch of the file system
# below `out`, as the interpreter's audit events tell, or in the middle of what it writes there.
PROGRAM = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import isal.isal_zlib, nibabel, pyarrow.parquet, pydantic
from medssl.platform import atomic, ingest
from medssl.platform.store import Store

root, out, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
ingest.PART_BYTES = 15000
pyarrow.array([1])  # imports pandas, where there is one
TOUCHES = ("open", "os.", "shutil.", "tempfile.")

def run(die_at=None, half=None):
    '''How it ended; and the touches of a run that lived, in order.'''
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        touches = []
        def hook(event, arguments):
            if event.startswith(TOUCHES) and arguments and str(out) in str(arguments[0]):
                touches.append(f"{event} {arguments[0]}")
                if len(touches) == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        writes = []
        def write(path, fill, *, durable=True, whole=atomic.write):
            def some(file):
                fill(file)
                writes.append(path)
                if len(writes) == half:
                    file.truncate(file.tell() // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
            whole(path, some, durable=durable)
        atomic.write = write
        sys.addaudithook(hook)
        ingest.prepare(root, out, workers=1)
        os.write(writer, json.dumps([touches, len(writes)]).encode())
        os._exit(0)
    os.close(writer)
    said = b"".join(iter(lambda: os.read(reader, 1 << 16), b""))
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), json.loads(said) if said else None

def state():
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}

ended, (touches, writes) = run()
assert ended == 0
undisturbed, answers, content = state(), [], Store.open(out).content_hash
dealing = next(k for k, touch in enumerate(touches) if "slices" in touch)
moments = random.Random(seed)
chosen = moments.sample(range(1, dealing), 4) + moments.sample(range(dealing, len(touches) + 1), 6)
for how in [{"die_at": at} for at in chosen] + [{"half": k} for k in (*moments.sample(range(1, writes), 3), writes)]:
    shutil.rmtree(out)
    ended, _ = run(**how)
    whole = not (out / "manifest.json").exists() or Store.open(out).content_hash == content
    answers.append([how, ended, whole])
    again, said = run()
    answers[-1] += [again == 0 and state() == undisturbed and not list(out.glob(".[!l]*"))]
shutil.rmtree(out)
deaths = 0
while (ended := run(die_at=moments.randrange(20, 120))[0]) != 0:  # a machine that keeps killing it
    deaths += 1
    assert deaths < 99
answers.append([f"{deaths} deaths", -9 if deaths else 0, True, state() == undisturbed])
print(json.dumps(answers))
"""


def write_scans(root, volumes=6, shape=(24, 20, 8)):
    rng = np.random.default_rng(0)
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for number in range(volumes):
        arrays = {
            "imagesTr": rng.integers(0, 900, shape).astype(np.int16),
            "labelsTr": rng.integers(0, 2, shape).astype(np.uint8),
        }
        for folder, array in arrays.items():
            nibabel.Nifti1Image(array, np.eye(4)).to_filename(root / folder / f"v{number}.nii.gz")
    said = {"name": "toy", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "organ"}}
    (root / "dataset.json").write_text(json.dumps(said))
    return root


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the runs that are killed")
def test_killed_at_random_moments_the_next_run_makes_the_same_store(tmp_path):
    """Among them: while slices are dealt into files, between two of them, and while the manifest is written."""
    words = [sys.executable, "-c", PROGRAM, str(write_scans(tmp_path / "scans")), str(tmp_path / "store"), "0"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert len(answers) == 15
    for how, ended, whole_or_absent, same in answers:
        assert (ended, whole_or_absent, same) == (-9, True, True), how


def test_a_file_that_may_not_grow_ends_in_one_sentence_and_no_store(tmp_path):
    root = write_scans(tmp_path / "scans")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(
            RunError, match=r"larger than a file may be here \(ulimit -f\); raise the limit, or choose"
        ) as caught:
            ingest.prepare(root, tmp_path / "store", workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    left = {file.name for file in (tmp_path / "store").rglob("*") if file.is_file()}
    assert left == {".lock"}, "what was half-written is gone"
    ingest.prepare(root, tmp_path / "store", workers=1)


def test_a_killed_worker_is_told_in_one_sentence():
    """`os._exit` ends a worker without a word, as the kernel does when memory is out."""
    with pytest.raises(
        RunError, match="a worker process was killed, probably for want of memory; prepare again with fewer --work"
    ):
        list(ingest.in_processes(os._exit, [9, 9], 2))
