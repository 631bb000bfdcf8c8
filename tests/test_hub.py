"""What goes to the Hub and comes from it, against a local stand-in of its API, over HTTP."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import runpy
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from export_runs import convert, write_run
from huggingface_hub import constants
from launch import repository
from PIL import Image

from megaregion.export import ExportOptions, export_checkpoint
from megaregion.schemas.evaluation import Column, Estimate, Evaluation, Table, write_evaluation

COMMIT = "1" * 40
DATASET, RESOLVED = "/api/datasets/somebody/photos", f"/datasets/somebody/photos/resolve/{COMMIT}/"


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """Takes models from whoever has the token, and keeps what commits say."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.made: list[dict[str, object]] = []
        self.stored: dict[str, bytes] = {}
        self.commits: list[dict[str, bytes]] = []
        self.dataset: dict[str, bytes] = {}
        self.fetched: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_GET(self) -> None:
        path, files = self.path.split("?")[0], self.server.dataset
        if path == f"{DATASET}/revision/main" and files:
            self.answer({"id": "somebody/photos", "sha": COMMIT})
        elif path == f"{DATASET}/tree/{COMMIT}":
            told = [
                {"type": "file", "path": name, "size": len(files[name]), "oid": _oid(files[name])}
                for name in files
            ]
            self.answer(told)
        elif path.startswith(RESOLVED) and path.removeprefix(RESOLVED) in files:
            content = files[path.removeprefix(RESOLVED)]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{_oid(content)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.server.fetched.append(path.removeprefix(RESOLVED))
                self.wfile.write(content)
        else:
            self.answer({"error": "not found"}, 404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.server.stored[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        body, path, hub = self.body(), self.path.split("?")[0], self.server
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer({"error": "Invalid user token"}, 401)
        elif path == "/api/repos/create":
            hub.made.append(json.loads(body))
            self.answer({"url": f"{hub.address}/somebody/photos"})
        elif path == "/api/validate-yaml":
            head = json.loads(body)["content"].split("---")[1]
            assert yaml.safe_load(head)["license"]
            self.answer({"errors": [], "warnings": []})
        elif path == "/api/models/somebody/photos/preupload/main":
            told = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            self.answer({"files": told})
        elif path == "/somebody/photos.git/info/lfs/objects/batch":
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub.address}/store/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self.answer({"objects": objects, "transfer": "basic"})
        else:
            assert path == "/api/models/somebody/photos/commit/main", path
            files = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.stored[value["oid"]]
                    assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]
            hub.commits.append(files)
            url = f"{hub.address}/somebody/photos/commit/{'0' * 40}"
            self.answer({"commitUrl": url, "commitOid": "0" * 40, "success": True})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with regions and an evaluation, and what a person's tools leave in it."""
    folder = tmp_path_factory.mktemp("push")
    write_run(folder / "run")
    columns = (Column("region_knn", "test", 0.1, "Region 5-NN"), Column("unknown", "test"))
    knows, no = Estimate(0.26, 0.2, 0.3, (0.26,)), None
    rows = {"pixels": {"region_knn": Estimate(0.1, 0.1, 0.1, ()), "unknown": no}}
    rows["trained"] = {"region_knn": knows, "unknown": no}
    tables = (
        Table("summary", "Test beside train", "Ten objects.", columns, rows),
        Table("coco/region", "Regions", "Twelve boxes.", columns, rows),
    )
    write_evaluation(
        folder / "run" / "evaluation.json", Evaluation("little", 12, "test", tables, 1, 1, 1, 1, 1, 2)
    )
    export_checkpoint(folder / "run", folder / "photos", ExportOptions(regions=True, license="mit"))
    (folder / "photos" / ".git").mkdir()
    (folder / "photos" / ".git" / "config").touch()
    (folder / "photos" / "__pycache__").mkdir()
    (folder / "photos" / "__pycache__" / "x.pyc").touch()
    return folder / "photos"


def test_a_push_brings_every_file_of_an_export_in_one_commit(
    hub: Hub, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert("push", exported, "somebody/photos", "--private") == 0
    [made], [commit] = hub.made, hub.commits
    assert (made["name"], made["organization"]) == ("photos", "somebody")
    assert made.get("private") is True or made.get("visibility") == "private"
    assert commit == {
        name: (exported / name).read_bytes()
        for name in (
            "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
            "modeling_megaregion.py", "image_processing_megaregion.py", "aspect/preprocessor_config.json",
        )
    }  # fmt: skip
    out = capsys.readouterr().out
    assert "7 files" in out
    assert f"{hub.address}/somebody/photos/commit/" in out


def test_a_dry_run_tells_the_files_and_sends_nothing(
    hub: Hub, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert("push", exported, "somebody/photos", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "aspect/preprocessor_config.json" in out
    assert "nothing was sent" in out
    assert (hub.made, hub.commits) == ([], [])


def test_the_cards_head_tells_what_the_trained_encoder_reached(exported: Path) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard.load(exported / "README.md").data
    found = {(each.dataset_type, each.metric_type): each.metric_value for each in data.eval_results}
    assert found == {("scenes", "region_knn"): 26.0, ("coco", "region_knn"): 26.0}
    assert {each.dataset_split for each in data.eval_results} == {"test"}
    assert (data.license, data.pipeline_tag) == ("mit", "image-feature-extraction")


def test_mistakes_of_a_push_end_in_one_line_before_anything_is_committed(
    hub: Hub,
    exported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (empty := tmp_path / "empty").mkdir()
    shutil.copytree(exported, cut := tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes()[:-5])
    for folder, repo, token, told in (
        (
            empty,
            "somebody/photos",
            "hf_right",
            "has no config.json; write it with tools/convert_checkpoint.py",
        ),
        (cut, "somebody/photos", "hf_right", "the weights are not whole"),
        (exported, "a/b/c", "hf_right", "must be OWNER/NAME, as somebody/photos-vit, got a/b/c"),
        (exported, "somebody/photos", "hf_wrong", "log in with `hf auth login` or set HF_TOKEN"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        assert convert("push", folder, repo) == 2
        assert len((said := capsys.readouterr().err).splitlines()) == 1, said
        assert told in said
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert convert("push", exported, "somebody/photos") == 2
    assert re.fullmatch(r"megaregion: somebody/photos cannot be pushed .*\n", capsys.readouterr().err)
    assert hub.commits == []


def curate(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["curate.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(repository() / "tools" / "curate.py"), run_name="__main__")
    return int(ended.value.code or 0)


def test_a_dataset_of_the_hub_is_copied_once_beside_the_run_and_read_like_any_folder(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(image, "PNG")
    hub.dataset = {"train/a.png": image.getvalue(), "train/load.py": b"exit()", "test/b.png": b"not this one"}
    where = ("--images", "hf://datasets/somebody/photos/train", "--out", tmp_path / "run")
    for _ in range(2):
        assert curate(monkeypatch, *where, "--stage", "list", "--workers", 0) == 0
        assert hub.fetched == ["train/a.png"]
    assert (tmp_path / "run-hub" / "train" / "a.png").read_bytes() == image.getvalue()
    told = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (told["files"], told["left_out"]) == (1, {})
    # Later stages and shares of them ask nobody.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert curate(monkeypatch, *where, "--stage", "ocr", "--ocr", "none", "--workers", 0) == 0
    assert "cannot be fetched" not in capsys.readouterr().err
    # A list does ask, and takes no copy of which nobody knows whether it is whole.
    assert curate(monkeypatch, *where, "--stage", "list", "--workers", 0) == 2
    assert "cannot be fetched" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("hf://somebody/photos", "must be a folder or hf://datasets/OWNER/NAME, got hf://somebody/photos"),
        ("s3://bucket/photos", "must be a folder or hf://datasets/OWNER/NAME, got s3://bucket/photos"),
        ("hf://datasets/nobody/photos", "hf://datasets/nobody/photos cannot be fetched"),
        ("", "--images must not be empty"),
    ],
)
def test_images_that_are_nowhere_are_one_line(
    hub: Hub,
    tmp_path: Path,
    address: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert curate(monkeypatch, "--images", address, "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert told in said
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
