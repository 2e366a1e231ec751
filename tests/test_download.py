"""Laws of `data download`: what arrives is what was published, whatever the network and the archive do on the way."""

import contextlib
import hashlib
import io
import json
import os
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from medssl.platform import download, find
from medssl.platform.errors import Problem, RunError, UsageError


class Server:
    """Serves bytes by path, with ranges; `cuts` are how many bytes it sends before each of its first deaths."""

    def __init__(self, ranges=True):
        self.files, self.cuts, self.asked, self.tag, self.ranges, self.status = {}, [], [], '"1"', ranges, None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                outer.answer(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, path):
        return f"http://127.0.0.1:{self.http.server_port}/{path}"

    def answer(self, request):
        content, wanted = self.files.get(request.path[1:]), request.headers.get("Range")
        self.asked.append(wanted)
        if content is None or self.status:
            request.send_error(self.status or 404)
            return
        start = 0
        if wanted and self.ranges and request.headers.get("If-Range") == self.tag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(content)}")
                request.end_headers()
                return
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            request.send_response(200)
        request.send_header("Content-Length", str(len(content) - start))
        request.send_header("ETag", self.tag)
        request.end_headers()
        body = content[start:]
        with contextlib.suppress(OSError):
            request.wfile.write(body[: self.cuts.pop(0)] if self.cuts else body)


@pytest.fixture
def server():
    served = Server()
    yield served
    served.http.shutdown()
    served.http.server_close()


def tarred(files, name="set"):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for path, content in files.items():
            info = tarfile.TarInfo(f"{name}/{path}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


FILES = {"imagesTr/a.nii.gz": os.urandom(300_000), "labelsTr/a.nii.gz": os.urandom(5_000), "dataset.json": b"{}"}
TAR = tarred(FILES)
MD5 = "md5:" + hashlib.md5(TAR).hexdigest()


def get(server, folder, checksum=MD5, path="set.tar", said=None):
    sources = {"set": ((server.url(path), checksum),)}
    return download.download("set", folder, (said if said is not None else []).append, sources=sources, pause=0)


def content(home):
    return {str(file.relative_to(home)): file.read_bytes() for file in home.rglob("*") if file.is_file()}


def test_a_data_set_is_fetched_checked_unpacked_and_not_fetched_again(server, tmp_path):
    server.files["set.tar"] = TAR
    said = []
    assert get(server, tmp_path, said=said) == tmp_path / "set"
    assert content(tmp_path / "set") == FILES
    assert "set.tar: 0 of 0 MB" in said[0]
    assert not (tmp_path / ".set").exists()
    assert get(server, tmp_path, said=said) == tmp_path / "set"
    assert (len(server.asked), said[-1]) == (1, f"{tmp_path / 'set'} is there already")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_dies_again_and_again_is_taken_up_where_it_broke(server, tmp_path, ranges):
    server.files["set.tar"], server.ranges = TAR, ranges
    server.cuts = [1000, 50_000, 0, 70_000, 1]
    get(server, tmp_path)
    assert content(tmp_path / "set") == FILES
    broken = [1000, 51_000, 51_000, 121_000, 121_001] if ranges else [1000, 50_000, 0, 70_000, 1]
    assert server.asked == [None] + [f"bytes={have}-" if have else None for have in broken]


def test_what_came_is_kept_when_nothing_more_comes_and_the_next_command_goes_on(server, tmp_path):
    server.files["set.tar"], server.cuts = TAR, [4096] + [0] * 50
    with pytest.raises(RunError, match=r"5 times; 4096 bytes are kept: type the command again to go on"):
        get(server, tmp_path)
    assert not (tmp_path / "set").exists()
    server.cuts, server.asked = [], []
    get(server, tmp_path)
    assert server.asked == ["bytes=4096-"]
    assert content(tmp_path / "set") == FILES


def test_a_file_that_changed_on_the_server_begins_anew(server, tmp_path):
    server.files["set.tar"], server.cuts = os.urandom(len(TAR)), [4096] + [0] * 50
    with pytest.raises(RunError):
        get(server, tmp_path)
    server.files["set.tar"], server.cuts, server.tag = TAR, [], '"2"'
    get(server, tmp_path)
    assert content(tmp_path / "set") == FILES


def test_a_part_that_is_whole_already_is_kept(server, tmp_path):
    server.files["set.tar"] = TAR
    (tmp_path / ".set").mkdir()
    (tmp_path / ".set" / "set.tar.part").write_bytes(TAR)
    (tmp_path / ".set" / "set.tar.origin").write_text(server.tag)
    get(server, tmp_path)
    assert (server.asked, content(tmp_path / "set")) == ([f"bytes={len(TAR)}-"], FILES)


def test_a_wrong_checksum_is_refused_and_the_file_goes(server, tmp_path):
    server.files["set.tar"] = TAR
    with pytest.raises(RunError, match=r"its md5 is \w{32}, published is 0{32}; it is removed"):
        get(server, tmp_path, "md5:" + "0" * 32)
    assert not (tmp_path / "set").exists()
    assert not list((tmp_path / ".set").glob("set.tar*"))


def test_an_unknown_checksum_is_said_and_the_next_download_held_to_the_first(server, tmp_path):
    server.files["set.tar"], said = TAR, []
    get(server, tmp_path, None, said=said)
    assert "checksum unknown, none is published" in said[1]
    assert json.loads((tmp_path / "hashes.json").read_text()) == {server.url("set.tar"): hashlib.sha256(TAR).hexdigest()}
    (tmp_path / "set").rename(tmp_path / "elsewhere")
    server.files["set.tar"] = tarred({"other": b"x"})
    with pytest.raises(RunError, match="at the first download it was"):
        get(server, tmp_path, None)


def test_a_server_that_says_no_is_told_at_once_and_one_that_is_ill_after_five_times(server, tmp_path):
    with pytest.raises(RunError, match=r"the server says 404 Not Found; is the address still right\?"):
        get(server, tmp_path)
    server.status, server.asked = 503, []
    with pytest.raises(RunError, match=r"503 Service Unavailable, 5 times"):
        get(server, tmp_path)
    assert len(server.asked) == 5
    with pytest.raises(UsageError, match="expected an address of http or https"):
        download.fetch("file:///etc/passwd", tmp_path / "x", print)


def test_a_full_disk_is_told_before_it_is_full(server, tmp_path, monkeypatch):
    server.files["set.tar"] = TAR
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunError, match=r"0\.0 GB are to be written and 0\.0 GB are free; free some, or set"):
        get(server, tmp_path)
    assert server.asked == [None]


def odd(kind, name="x", target="/etc/passwd"):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        tar.addfile(info, io.BytesIO())
    return made.getvalue()


def zipped(**files):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in files.items():
            file.writestr(name, text)
    return made.getvalue()


def linked():
    made, info = io.BytesIO(), zipfile.ZipInfo("x")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(made, "w") as file:
        file.writestr(info, "/etc/passwd")
    return made.getvalue()


def damaged():
    whole = bytearray(zipped(x=os.urandom(5000)))
    whole[1000] ^= 1
    return bytes(whole)


HOSTILE = {
    "a.tar, a path upwards": (odd(tarfile.REGTYPE, "a/../../x"), "would be written outside its folder"),
    "b.tar, an absolute path": (odd(tarfile.REGTYPE, "/tmp/x"), "would be written outside"),
    "c.tar, a symbolic link": (odd(tarfile.SYMTYPE), "is a link or a device"),
    "d.tar, a hard link": (odd(tarfile.LNKTYPE), "is a link or a device"),
    "e.tar, a device": (odd(tarfile.CHRTYPE), "is a link or a device"),
    "f.tar, cut short": (TAR[:200_000], "cannot be unpacked|cut short"),
    "g.tar, no tar": (b"<html>please log in</html>" * 100, "cannot be unpacked"),
    "h.zip, a path upwards": (zipped(**{"../x": b"1"}), "would be written outside"),
    "i.zip, a drive": (zipped(**{"C:/x": b"1"}), "would be written outside"),
    "j.zip, a link": (linked(), "is a link or a device"),
    "k.zip, a bomb": (zipped(x=bytes(80 << 20)), "is it a bomb"),
    "l.zip, cut short": (zipped(x=os.urandom(5000))[:4000], "cannot be unpacked"),
    "m.zip, damaged": (damaged(), "cannot be unpacked"),
    "n.tar, a name twice": (tarred({"a": b"1"})[:1024] + tarred({"a": b"2"}), "twice"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_or_broken_archive_is_refused_and_writes_nothing_elsewhere(server, tmp_path, what):
    archive, message = HOSTILE[what]
    name = what.partition(",")[0]
    server.files[name] = archive
    data = tmp_path / "data"
    with pytest.raises(Problem, match=message):
        get(server, data, None, name)
    assert {path.name for path in tmp_path.iterdir()} == {"data"}
    assert not (data / "set").exists()


def test_several_zips_are_one_data_set(server, tmp_path):
    server.files |= {"a.zip": zipped(**{"images/1.jpg": b"1"}), "b.zip": zipped(**{"masks/1.png": b"2", "empty/": b""})}
    sources = {"set": ((server.url("a.zip"), None), (server.url("b.zip"), None))}
    home = download.download("set", tmp_path, print, sources=sources, pause=0)
    assert content(home) == {"images/1.jpg": b"1", "masks/1.png": b"2"}


def test_a_stopped_unpacking_leaves_nothing_that_counts_and_fetches_nothing_again(server, tmp_path, monkeypatch):
    server.files["set.tar"] = TAR
    copy = download.shutil.copyfileobj
    monkeypatch.setattr(download.shutil, "copyfileobj", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        get(server, tmp_path)
    assert not (tmp_path / "set").exists()
    monkeypatch.setattr(download.shutil, "copyfileobj", copy)
    get(server, tmp_path)
    assert (len(server.asked), content(tmp_path / "set")) == (1, FILES)


def test_every_known_source_is_a_secure_address_with_a_checksum_or_none():
    known = download.known()
    assert len([name for name in known if name.startswith("Task")]) == 10
    assert {"isic2016", "isic2017"} <= known.keys()
    for archives in known.values():
        for url, checksum in archives:
            assert url.startswith("https://")
            assert url.endswith((".tar", ".zip"))
            kind, _, value = (checksum or "md5:" + "0" * 32).partition(":")
            assert len(bytes.fromhex(value)) == hashlib.new(kind).digest_size


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Task04_Hipocampus", r"did you mean Task04_Hippocampus\?"),
        ("phantom", "phantom is generated, not downloaded: medssl data prepare phantom"),
        ("decathlon", "decathlon is ten data sets; download one by its name: Task01_BrainTumour"),
        *(
            (name, f"{name} has no open, direct source: get it at http")
            for name in find.names("dataset")
            if find.constant("dataset", name, "OBTAIN") and name not in ("decathlon", *download.known())
        ),
    ],
)
def test_what_cannot_be_downloaded_says_where_it_is(tmp_path, name, message):
    with pytest.raises(UsageError, match=message):
        download.download(name, tmp_path, print)
    assert not list(tmp_path.iterdir())
