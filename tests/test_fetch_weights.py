"""Downloads against a local server: cut connections, resumption, wrong checksums."""

import hashlib
import http.server
import pathlib
import threading

import pytest

from mros_jax import console, fetch_weights
from mros_jax.files import cache_directory
from mros_jax.training import recipe

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """What was asked for, and what shall go wrong: the next statuses, and where answers end."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str | None] = []
        self.statuses: list[int] = []
        self.cuts: list[int | None] = []
        self.ranges = True
        self.url = f"http://127.0.0.1:{self.server_port}/weights.pth"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server = self.server
        start = self.headers.get("Range")
        server.requests.append(start)
        status = server.statuses.pop(0) if server.statuses else None
        if status:
            self.send_error(status)
            return
        offset = int(start.removeprefix("bytes=").rstrip("-")) if start else 0
        ranged = bool(start) and server.ranges
        body = CONTENT[offset:] if ranged else CONTENT
        if ranged and not body:
            self.send_error(416)
            return
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {offset}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else None
        self.wfile.write(body[:cut])  # then the connection closes, early if cut

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(server, target, sha=SHA[:8], **kwargs):
    fetch_weights.fetch(server.url, target, sha, wait=0.001, progress=False, **kwargs)


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def test_downloads_once(server, tmp_path):
    target = tmp_path / "new" / "weights.pth"
    fetch(server, target)
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert server.requests == [None]
    assert files(target.parent) == ["weights.pth"]


def test_a_cut_connection_is_continued(server, tmp_path):
    server.cuts = [300_000, 200_000]
    fetch(server, tmp_path / "w")
    assert server.requests == [None, "bytes=300000-", "bytes=500000-"]
    assert (tmp_path / "w").read_bytes() == CONTENT


def test_giving_up_keeps_the_part_for_the_next_call(server, tmp_path):
    server.cuts = [1000, 1000]
    with pytest.raises(fetch_weights.FetchError, match=r"2 attempts.*2000 of 1048576.*kept"):
        fetch(server, tmp_path / "w", attempts=2)
    assert files(tmp_path) == ["w.part"]
    fetch(server, tmp_path / "w")
    assert server.requests[-1] == "bytes=2000-"
    assert files(tmp_path) == ["w"]


def test_a_server_without_ranges_starts_again(server, tmp_path):
    server.ranges, server.cuts = False, [5000]
    fetch(server, tmp_path / "w")
    assert (tmp_path / "w").read_bytes() == CONTENT


def test_a_whole_part_is_only_verified(server, tmp_path):
    (tmp_path / "w.part").write_bytes(CONTENT)
    fetch(server, tmp_path / "w")
    assert files(tmp_path) == ["w"]


def test_a_part_of_another_file_is_replaced(server, tmp_path):
    (tmp_path / "w.part").write_bytes(b"x" * 1000)
    fetch(server, tmp_path / "w")
    assert server.requests == ["bytes=1000-", None]
    assert (tmp_path / "w").read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    with pytest.raises(fetch_weights.FetchError, match=f"SHA-256 is {SHA[:16]}.*expected 0123"):
        fetch(server, tmp_path / "w", sha="01234567")
    assert files(tmp_path) == []
    assert len(server.requests) == 1


def test_an_existing_wrong_file_is_not_touched(server, tmp_path):
    (tmp_path / "w").write_bytes(b"mine")
    with pytest.raises(fetch_weights.FetchError, match="move it away"):
        fetch(server, tmp_path / "w")
    assert (tmp_path / "w").read_bytes() == b"mine"


def test_refusals(server, tmp_path):
    server.statuses = [503]
    fetch(server, tmp_path / "w")
    server.statuses = [404]
    with pytest.raises(fetch_weights.FetchError, match="404"):
        fetch(server, tmp_path / "v")
    assert server.requests == [None, None, None]


def test_command_line_lists_the_published_weights(capsys):
    assert fetch_weights.main(["--list"]) == 0
    text = capsys.readouterr().out
    for name, asset in fetch_weights.load_assets().items():
        assert name in text
        assert f"-{asset['sha256_prefix']}.pth" in asset["url"]


def test_command_line_reports_errors(server, tmp_path, capsys, monkeypatch):
    asset = {"url": server.url, "sha256_prefix": "ffff", "description": "", "license": ""}
    monkeypatch.setattr(fetch_weights, "load_assets", lambda: {"tiny": asset})
    command = ["tiny", "--out", str(tmp_path)]
    assert console.run(fetch_weights.main, command) == console.MISUSE
    assert "SHA-256" in capsys.readouterr().err
    asset["sha256_prefix"] = SHA
    assert console.run(fetch_weights.main, command) == 0
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT


def test_training_finds_what_was_fetched_v1_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert recipe.find_weights("resnet50") is None
    names = {n: a["url"].rsplit("/", 1)[-1] for n, a in fetch_weights.load_assets().items()}
    directory = cache_directory("weights")
    directory.mkdir(parents=True)
    (directory / "resnet50-00000000.pth").touch()  # of somebody else
    (directory / f"{names['resnet50_v1']}.part").touch()  # not yet whole
    assert recipe.find_weights("resnet50") is None
    (directory / names["resnet50_v2"]).touch()
    assert recipe.find_weights("resnet50") == directory / names["resnet50_v2"]
    (directory / names["resnet50_v1"]).touch()
    assert recipe.find_weights("resnet50") == directory / names["resnet50_v1"]
    assert recipe.find_weights("tiny") is None
    listed = {name: pathlib.Path(file).stem for name, file in names.items()}
    assert listed == {k: v for files in recipe.IMAGENET_WEIGHTS.values() for k, v in files.items()}
