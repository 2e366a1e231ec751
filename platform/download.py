"""Data sets that lie open: fetched, checked, unpacked; stopped at any moment and typed again, it goes on.

    downloads/<name>/            the unpacked data set; it is there whole or not at all
    downloads/.<name>/           what is on its way: <file>.part with <file>.origin, whole archives, tree/
    downloads/hashes.json        SHA-256 of every archive that was fetched; what is published without a checksum is held to it

Addresses and checksums are facts of the data sets' files, a literal `DOWNLOADS`: name -> ((address, "md5:…" or "sha256:…" or
None where none is published), …). An archive is unpacked with nothing but plain files and folders below its own folder, at most
RATIO times its size. HTTP ranges: RFC 9110, section 14 (https://www.rfc-editor.org/rfc/rfc9110#section-14); `If-Range` lets a
file that has changed on the server begin anew.
"""

import ast
import errno
import hashlib
import http.client
import json
import os
import shutil
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from medssl.platform import atomic, find
from medssl.platform.errors import Problem, RunError, UsageError

CHUNK = 1 << 20
RATIO = 100  # scans and pictures are compressed already: an archive that grows more is none of theirs
SMALL = 64 << 20  # bytes that any archive may unpack to
MOST = 1_000_000  # files in one archive
TRIES = 5  # in a row without a single new byte
TIMEOUT = 60.0  # seconds without a byte

Archives = tuple[tuple[str, str | None], ...]  # address and checksum
Say = Callable[[str], None]


def known() -> dict[str, Archives]:
    """What can be downloaded, by name, read from the files of datasets/ without importing them."""
    found: dict[str, Archives] = {}
    for file in sorted((find.ROOT / find.FOLDERS["dataset"]).glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == ["DOWNLOADS"]:
                found |= ast.literal_eval(node.value)
    return found


def download(name: str, folder: Path, say: Say, *, sources: Mapping[str, Archives] | None = None, pause: float = 1.0) -> Path:
    """Fetch and unpack a data set into `folder`/`name`, unless it is there. Returns that path.

    sources    what can be downloaded; None: `known()`
    pause      seconds before the first repeat; each further one waits twice as long
    Raises UsageError for a name without a direct source, telling the page that has it; RunError when the network, the disk or
    a checksum fails.
    """
    sources = known() if sources is None else sources
    if name not in sources:
        raise UsageError(_elsewhere(name, sources))
    home, work = folder / name, folder / f".{name}"
    if home.is_dir():
        say(f"{home} is there already")
        return home
    with atomic.owned(work) as mine:
        if not mine:
            raise RunError(f"{work}: another process is downloading it; wait until it is done")
        shutil.rmtree(work / "tree", ignore_errors=True)
        archives = []
        for url, checksum in sources[name]:
            archive = work / url.rpartition("/")[2]
            if not archive.is_file():
                fetch(url, archive, say, pause)
            verify(url, archive, checksum, folder / "hashes.json", say)
            archives.append(archive)
        for archive in archives:
            unpack(archive, work / "tree", say)
        tree = work / "tree"
        if [file.name for file in tree.iterdir()] == [name] and (tree / name).is_dir():
            tree = tree / name  # an archive that holds the folder itself
        os.replace(tree, home)
    shutil.rmtree(work)
    return home


def _elsewhere(name: str, sources: Mapping[str, Archives]) -> str:
    """Why a name cannot be downloaded, and what to do instead."""
    names = find.names("dataset")
    if name not in names:
        return f'no data set "{name}" to download; {find.nearest(name, {*sources, *names})}'
    page = find.constant("dataset", name, "OBTAIN", "")
    open_ones = ", ".join(sorted(sources))
    if "\ndef generate(" in find.path("dataset", name).read_text():
        return f"{name} is generated, not downloaded: medssl data prepare {name}"
    if name == "decathlon":
        return f"decathlon is ten data sets; download one by its name: {open_ones}"
    where = f"get it at {page}, where its terms are agreed to" if page else "its file names no page"
    return f"{name} has no open, direct source: {where}; then medssl data prepare FOLDER"


# ------------------------------------------------------------------------------------------------------------------ fetching


def fetch(url: str, target: Path, say: Say, pause: float = 1.0) -> None:
    """Get one file, going on from what `target`.part holds; after TRIES in a row without a new byte, RunError."""
    if not url.startswith(("https://", "http://")):
        raise UsageError(f"{url}: expected an address of http or https")
    part, failed, tell = target.with_name(f"{target.name}.part"), 0, _telling(target.name, say)
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _continue(url, part, tell):
                os.replace(part, target)
                _origin(part).unlink(missing_ok=True)
                return
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            if 400 <= error.code < 500 and error.code not in (408, 416, 429):
                raise RunError(f"{url}: the server says {error.code} {error.reason}; is the address still right?") from error
            reason = f"{error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise RunError(f"{part}: {error.strerror}; free some space, or set MEDSSL_DATA to another disk") from error
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        got = part.stat().st_size if part.exists() else 0
        failed = 0 if got > before else failed + 1
        if failed == TRIES:
            raise RunError(f"{url}: {reason}, {TRIES} times; {got} bytes are kept: type the command again to go on")
        time.sleep(pause * 2**failed)


def _origin(part: Path) -> Path:
    """Which version on the server a part is of."""
    return part.with_suffix(".origin")


def _continue(url: str, part: Path, tell: Callable[[int, int | None], None]) -> bool:
    """Append what is missing; whether all is there then."""
    have = part.stat().st_size if part.exists() else 0
    mark = _origin(part).read_text() if have and _origin(part).exists() else ""
    headers = {"Range": f"bytes={have}-", "If-Range": mark} if have and mark else {}
    request = urllib.request.Request(url, headers={"User-Agent": "medssl", "Accept-Encoding": "identity", **headers})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # beyond its end: the part is whole, or of something else
            if error.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
                return True
            part.unlink()
        raise
    with answer:
        length = answer.headers.get("Content-Length", "")
        if answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            length = answer.headers["Content-Range"].rpartition("/")[2]
        else:
            have = 0
        total = int(length) if length.isdecimal() else None  # "*": the server does not know
        _room_for(part, (total or 0) - have)
        atomic.write_text(_origin(part), answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")
        with open(part, "ab" if have else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                tell(have, total)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and have > total:
        part.unlink()
        raise http.client.HTTPException(f"{have} bytes came where {total} were announced")
    return total is None or have == total


def _room_for(path: Path, more: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if more > free:
        raise RunError(
            f"{path.parent}: {more / 1e9:.1f} GB are to be written and {free / 1e9:.1f} GB are free; free some, or set "
            "MEDSSL_DATA to another disk"
        )


def _telling(what: str, say: Say) -> Callable[[int, int | None], None]:
    """A line with the time that is left, every ten seconds and at the end."""
    begun = told = time.monotonic()
    first: int | None = None

    def tell(done: int, total: int | None) -> None:
        nonlocal told, first
        now = time.monotonic()
        first = done if first is None else first
        if done == total or now - told >= 10:
            told = now
            pace = (done - first) / (now - begun) if now > begun else 0
            left = f", about {(total - done) / pace:.0f} s left" if total and pace and done < total else ""
            say(f"{what}: {done / 1e6:.0f} of {'?' if total is None else f'{total / 1e6:.0f}'} MB{left}")

    return tell


def verify(url: str, archive: Path, checksum: str | None, hashes: Path, say: Say) -> None:
    """Hold an archive to its published checksum, or to the hash of its first download; remove it where it differs.

    Raises RunError.
    """
    kind, _, wanted = (checksum or "").partition(":")
    with open(archive, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    before = json.loads(hashes.read_text()) if hashes.exists() else {}
    if checksum:
        with open(archive, "rb") as file:
            actual = hashlib.file_digest(file, kind).hexdigest()
        if actual != wanted:
            archive.unlink()
            raise RunError(f"{url}: its {kind} is {actual}, published is {wanted}; it is removed: type the command again")
    elif url in before and before[url] != found:
        archive.unlink()
        raise RunError(
            f"{url}: its sha256 is {found}, at the first download it was {before[url]}; no checksum is published. The file "
            f"changed or broke; it is removed. Where the change is meant, take the line out of {hashes}"
        )
    else:
        say(f"{archive.name}: checksum unknown, none is published; its sha256 {found} is kept in {hashes.name}")
    if before.get(url) != found:
        atomic.write_json(hashes, before | {url: found})


# ----------------------------------------------------------------------------------------------------------------- unpacking


def unpack(archive: Path, folder: Path, say: Say) -> None:
    """Write the files of a tar or zip archive below `folder`. Raises Problem on anything that is not a plain file or folder,
    leads out of it, comes twice, or is too much; then `folder` is to be thrown away."""
    folder.mkdir(parents=True, exist_ok=True)
    say(f"unpacking {archive.name}")
    try:
        with _members(archive) as members:
            total = count = 0
            for name, size, opened in members:
                path = _inside(archive, folder, name)
                if opened is None:
                    path.mkdir(parents=True, exist_ok=True)
                    continue
                total, count = total + size, count + 1
                if total > max(SMALL, RATIO * archive.stat().st_size) or count > MOST:
                    raise Problem(archive, f"unpacks to more than {total - size} bytes in {count} files; is it a bomb?")
                _room_for(folder, size)
                path.parent.mkdir(parents=True, exist_ok=True)
                with opened() as source, open(path, "xb") as target:
                    shutil.copyfileobj(source, target, CHUNK)
                if path.stat().st_size != size:
                    raise Problem(archive, f"{name} is cut short; download it again")
    except FileExistsError as error:
        raise Problem(archive, f"holds {error.filename} twice; it is not what its publisher meant") from error
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise Problem(archive, f"cannot be unpacked ({error}); remove it and download it again") from error


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[tuple[str, int, Callable[[], IO[bytes]] | None]]]:
    """Name, size and opener of each member; no opener for a folder."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as file:
            yield (_zipped(archive, file, info) for info in file.infolist())
    else:
        with tarfile.open(archive) as tar:
            yield (_tarred(archive, tar, info) for info in tar)


def _zipped(archive: Path, file: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[str, int, Any]:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise Problem(archive, f"{info.filename} is a link or a device; only files and folders are unpacked")
    return info.filename, info.file_size, None if info.is_dir() else lambda: file.open(info)


def _tarred(archive: Path, tar: tarfile.TarFile, info: tarfile.TarInfo) -> tuple[str, int, Any]:
    if not (info.isreg() or info.isdir()):
        raise Problem(archive, f"{info.name} is a link or a device; only files and folders are unpacked")
    return info.name, info.size, None if info.isdir() else lambda: tar.extractfile(info)


def _inside(archive: Path, folder: Path, name: str) -> Path:
    """Where a member goes. Raises Problem when that is not below the folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in name or "\0" in name:
        raise Problem(archive, f"{name!r} would be written outside its folder; it is not what its publisher meant")
    return folder / path
