"""Where a model comes from, and what is said where it cannot be had.

The hub is a real HTTP server on this machine that answers as the hub does; huggingface_hub talks to it in a process of
its own (it reads its environment once, at import), so its real exceptions are what is turned into ours.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from luthier.errors import FileError, ModelError
from luthier.model.locate import locate_config, locate_model, pinned_to, weight_files
from tests import tiny

TERMS = {
    name: f"the text of {name}".encode()
    for name in ("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "README.md", "merges.txt")
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server holds, and what it was asked for."""

    models: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    port: int = 0


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            hub.asked.append(f"{self.command} {path}")
            api = path.startswith("api/models/")
            parts = path.removeprefix("api/models/").split("/")
            name, rest = "/".join(parts[:2]), parts[2:]
            files = hub.models.get(name)
            if files is None:
                # as the hub: without a token it does not say whether the model exists
                self.answer(401, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            elif api and rest[:1] == ["tree"]:
                tree = [{"type": "file", "path": p, "size": len(b), "oid": sha(b)} for p, b in files.items()]
                self.answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
            elif api:
                info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
                self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            elif name in hub.gated:
                headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."}
                self.answer(401, b"", headers)
            else:
                body = files["/".join(rest[2:])]
                self.answer(200, body, {"ETag": f'"{sha(body)}"', "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET  # noqa: N815  (the name is http.server's)

    return Handler


def sha(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()  # noqa: S324  (git's object ids)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    good = files_of(tiny.make_model(tmp_path_factory.mktemp("hub") / "good"))
    pickled = {name: body for name, body in good.items() if not name.endswith(".safetensors")}
    mamba = json.dumps({**json.loads(good["config.json"]), "model_type": "mamba"}).encode()
    hub = Hub(
        {
            "maker/good": {**good, **TERMS, "pytorch_model.bin": b"pickle", "original/consolidated.00.pth": b"pickle"},
            "maker/pickled": {**pickled, "pytorch_model.bin": b"pickle"},
            "maker/mamba": {**good, "config.json": mamba},
            "maker/gated": good,
            "maker/bare": {"README.md": b"nothing yet"},
        },
        gated={"maker/gated"},
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


LOCATE = """
import json, sys
from luthier.errors import ModelError
from luthier.model import locate
try:
    print(json.dumps({"folder": str(getattr(locate, sys.argv[2])(sys.argv[1]))}))
except ModelError as error:
    print(json.dumps({"message": error.message, "remedy": error.remedy, "cause": type(error.__cause__).__name__}))
"""


def locate(name: str, home: Path, port: int, what: str = "locate_model", **environment: str) -> dict[str, str]:
    """locate_model (or `what`) in a fresh process with its own cache, its hub being the server on `port`."""
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy") and key[:3] != "HF_"}
    ours = {"HF_HOME": str(home), "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", LOCATE, name, what]
    out = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**kept, **ours}, cwd=home, timeout=120
    )
    answer: dict[str, str] = json.loads(out.stdout.splitlines()[-1])
    return answer


def test_a_hub_id_is_fetched_without_pickles_and_then_had_offline(hub: Hub, tmp_path: Path) -> None:
    hub.asked.clear()
    folder = Path(locate("maker/good", tmp_path, hub.port)["folder"])
    assert (folder / "model.safetensors").read_bytes() == hub.models["maker/good"]["model.safetensors"]
    assert (folder / "tokenizer.json").is_file()
    assert {name: (folder / name).read_bytes() for name in TERMS} == TERMS, "they go into models made of it"
    assert not any(line.endswith((".bin", ".pth")) for line in hub.asked)
    again = locate("maker/good", tmp_path, hub.port, HF_HUB_OFFLINE="1")
    assert Path(again["folder"]) == folder


def test_of_a_hub_id_only_what_a_plan_reads_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.asked.clear()
    folder = Path(locate("maker/good", tmp_path, hub.port, "locate_config")["folder"])
    expected = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt"}
    found = {path.name for path in folder.iterdir()}
    assert found == expected | ({"chat_template.jinja"} & set(hub.models["maker/good"]))
    fetched = [line for line in hub.asked if line.startswith("GET maker/good/resolve/")]
    assert {line.rpartition("/")[2] for line in fetched} == found
    again = locate("maker/good", tmp_path, hub.port, "locate_config", HF_HUB_OFFLINE="1")
    assert Path(again["folder"]) == folder
    no_weights = locate("maker/good", tmp_path, hub.port, HF_HUB_OFFLINE="1")
    assert (
        "has only a part of the model maker/good (a plan fetches no weights), and HF_HUB_OFFLINE is set"
        in no_weights["message"]
    )
    with socket.socket() as free:  # a port that nobody listens on
        free.bind(("127.0.0.1", 0))
        no_weights = locate("maker/good", tmp_path, free.getsockname()[1])
    assert (
        "has only a part of the model maker/good (a plan fetches no weights), and the hub cannot be reached"
        in no_weights["message"]
    )
    assert "Connect once" in no_weights["remedy"]
    whole = locate("maker/good", tmp_path, hub.port)
    assert (Path(whole["folder"]) / "model.safetensors").is_file(), "training fetches the rest"


@pytest.mark.parametrize("what", ["locate_model", "locate_config"])
def test_a_hub_id_without_a_config(hub: Hub, tmp_path: Path, what: str) -> None:
    answer = locate("maker/bare", tmp_path, hub.port, what)
    assert "maker/bare on the hub has no config.json" in answer["message"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("maker/gated", "maker/gated is gated"),
        ("maker/nothing", "no folder maker/nothing, and no model of this name"),
        ("maker/mamba", "'mamba' is not supported"),
    ],
)
def test_a_plan_is_refused_the_same(hub: Hub, tmp_path: Path, name: str, said: str) -> None:
    assert said in locate(name, tmp_path, hub.port, "locate_config")["message"]


def test_a_plan_while_offline_or_out_of_reach(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        out_of_reach = locate("maker/good", tmp_path, port, "locate_config")
        offline = locate("maker/good", tmp_path, port, "locate_config", HF_HUB_OFFLINE="1")
    assert "the hub cannot be reached" in out_of_reach["message"]
    assert "HF_HUB_OFFLINE is set" in offline["message"]


def test_a_gated_model_without_a_token(hub: Hub, tmp_path: Path) -> None:
    answer = locate("maker/gated", tmp_path, hub.port)
    assert answer["cause"] == "GatedRepoError"
    assert "maker/gated is gated" in answer["message"]
    assert f"http://127.0.0.1:{hub.port}/maker/gated" in answer["remedy"]
    assert "hf auth login" in answer["remedy"]


def test_a_gated_model_with_a_token_that_was_not_granted(hub: Hub, tmp_path: Path) -> None:
    answer = locate("maker/gated", tmp_path, hub.port, HF_TOKEN="hf_not_a_real_one")
    assert answer["cause"] == "GatedRepoError"
    assert "account that has access" in answer["remedy"]


def test_an_id_that_does_not_exist(hub: Hub, tmp_path: Path) -> None:
    answer = locate("maker/nothing", tmp_path, hub.port)
    assert answer["cause"] == "RepositoryNotFoundError"
    assert "no folder maker/nothing, and no model of this name" in answer["message"]


def test_a_model_on_the_hub_with_pickled_weights_only(hub: Hub, tmp_path: Path) -> None:
    hub.asked.clear()
    answer = locate("maker/pickled", tmp_path, hub.port)
    assert "has no safetensors weights" in answer["message"]
    assert "save_pretrained" in answer["remedy"]
    assert not any(line.endswith(".bin") for line in hub.asked)


def test_an_unsupported_family_is_said_before_its_weights_are_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.asked.clear()
    answer = locate("maker/mamba", tmp_path, hub.port)
    assert "'mamba' is not supported" in answer["message"]
    assert "qwen3" in answer["remedy"]
    assert not any(line.endswith(".safetensors") for line in hub.asked)


def test_an_id_while_offline(hub: Hub, tmp_path: Path) -> None:
    hub.asked.clear()
    answer = locate("maker/good", tmp_path, hub.port, HF_HUB_OFFLINE="1")
    assert "maker/good is neither a folder nor in the hub's cache" in answer["message"]
    assert "HF_HUB_OFFLINE is set" in answer["message"]
    assert "sprig" in answer["remedy"]
    assert hub.asked == []


def test_an_id_while_the_hub_cannot_be_reached(tmp_path: Path) -> None:
    with socket.socket() as free:  # a port that nobody listens on
        free.bind(("127.0.0.1", 0))
        answer = locate("maker/good", tmp_path, free.getsockname()[1])
    assert "the hub cannot be reached" in answer["message"]
    assert "Connect once" in answer["remedy"]


def test_a_folder_is_itself(tiny_llama: Path) -> None:
    assert locate_model(str(tiny_llama)) == tiny_llama
    assert weight_files(tiny_llama) == (tiny_llama / "model.safetensors",)


@pytest.mark.parametrize("name", ["./models/llama", "~/nowhere", "a/b/c", "/nowhere/at/all", "no such name"])
def test_a_missing_folder(name: str) -> None:
    for find in (locate_model, locate_config):
        with pytest.raises(ModelError, match="there is no folder") as caught:
            find(name)
        assert caught.value.remedy is not None
        assert caught.value.exit_code == 2


def test_a_file_in_place_of_a_folder(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        locate_model(str(tiny_llama / "model.safetensors"))


def test_a_folder_with_pickled_weights_only(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model\.bin\)") as caught:
        locate_model(str(folder))
    assert caught.value.remedy is not None
    assert "save_pretrained" in caught.value.remedy


def test_a_folder_of_an_unsupported_family(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ModelError, match="'gpt2' is not supported"):
        locate_model(str(folder))


def test_a_folder_without_weights_or_without_a_config(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        locate_model(str(folder))
    assert locate_config(str(folder)) == folder
    for find in (locate_model, locate_config):
        with pytest.raises(ModelError, match=r"has no config\.json"):
            find(str(tmp_path))


def test_a_lost_shard_is_named(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path, max_shard_size="70KB")
    lost = sorted(folder.glob("*.safetensors"))[2]
    lost.unlink()
    with pytest.raises(ModelError, match=lost.name):
        locate_model(str(folder))


def test_a_shard_outside_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileError, match="leads out of its folder"):
        locate_model(str(folder))


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "~nobody-of-this-name"])
def test_the_home_of_nobody(name: str) -> None:
    assert pinned_to(name, COMMIT) == name
    for find in (locate_model, locate_config):
        with pytest.raises(ModelError, match=f"there is no folder {name}"):
            find(name)
