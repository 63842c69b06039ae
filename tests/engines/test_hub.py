"""Uploading: what reaches a hub, told by a stand-in for one on the loopback."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from runs import LORA, files_of, leave_out_report, make_options

from dbcore.config import ConfigError, TrainConfig
from dbcore.engines.hub import push
from dbcore.engines.trainer import train

TOKEN = "hf_sentinel_of_the_token"


class Hub(BaseHTTPRequestHandler):
    """The four calls that an upload makes; `server.refuse` is answered to all of them if it is
    set."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        if self.server.refuse:
            return self.answer({"error": "refused"}, self.server.refuse)
        if self.path == "/api/repos/create":
            return self.answer({"url": f"{self.server.address}/me/{json.loads(body)['name']}"})
        if "/preupload/" in self.path:
            return self.answer({"files": [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]]})
        if "/commit/" in self.path:
            url = f"{self.server.address}/me/dog/commit/{'0' * 40}"
            return self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": url})
        return self.answer({"errors": [], "warnings": []})  # /api/validate-yaml, for the card

    def answer(self, content, status=200):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.refuse = [], None
    server.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def committed(hub):
    """{path: bytes} of the files in the one commit."""
    (body,) = [body for path, _, body in hub.asked if "/commit/" in path]
    lines = [json.loads(line) for line in body.splitlines()]
    return {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines
            if line["key"] == "file"}


def test_the_lora_its_card_and_its_pictures_reach_the_hub_and_no_secret(hub, tmp_path, capsys):
    options = make_options(tmp_path, max_train_steps=1, push_to_hub=True, hub_token=TOKEN,
                           hub_model_id="me/dog",
                           validation_prompt=["a red car"], num_validation_images=1)  # fmt: skip
    path = train(TrainConfig(**options, output_dir=tmp_path / "run"))
    files = committed(hub)
    assert set(files) == {LORA, "README.md", "training.gif", "report/on_off.png",
                          "report/loss_by_timestep.png", "report/update_by_layer.png",
                          "validation/step-000001/grid.png"}
    assert all((path.parent / name).read_bytes() == content for name, content in files.items())
    # where it belongs, and nowhere else:
    assert {key for _, key, _ in hub.asked} == {f"Bearer {TOKEN}"}
    assert not any(TOKEN.encode() in content for content in files.values())
    said = capsys.readouterr().out
    assert f"Uploaded to {hub.address}/me/dog" in said
    assert TOKEN not in said


@pytest.fixture
def done(tmp_path):
    """A config whose run is finished and only has to be uploaded."""
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / LORA).write_bytes(b"a LoRA")
    return TrainConfig(push_to_hub=True, hub_token=TOKEN, output_dir=tmp_path / "dog")


def test_without_a_name_it_is_called_as_its_folder(hub, done):
    push(done)
    assert json.loads(hub.asked[0][2])["name"] == "dog"
    assert committed(hub) == {LORA: b"a LoRA"}


def test_a_finished_run_is_uploaded_when_it_is_asked_for_again(hub, tmp_path, monkeypatch):
    leave_out_report(monkeypatch)
    options = make_options(tmp_path, max_train_steps=1, output_dir=tmp_path / "dog")
    train(TrainConfig(**options))
    before = files_of(tmp_path / "dog")
    train(TrainConfig(**options, push_to_hub=True, hub_token=TOKEN,
                      resume_from_checkpoint="latest"))
    assert set(committed(hub)) == {LORA, "README.md"}
    assert files_of(tmp_path / "dog") == before


@pytest.mark.parametrize("refuse", [401, 403, 500])
def test_a_refusal_says_that_the_lora_is_safe_and_what_to_do(refuse, hub, done):
    hub.refuse = refuse
    with pytest.raises(ConfigError, match=r"could not be uploaded .*the LoRA is safe in "
                       ".*hf auth login") as caught:
        push(done)
    assert "--resume_from_checkpoint latest uploads it" in str(caught.value)
    assert str(refuse) in str(caught.value)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("offline", [True, False], ids=["told so", "no answer"])
def test_without_a_network_the_error_is_as_clear(offline, done, monkeypatch):
    # nothing listens there
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    with pytest.raises(ConfigError, match=r"could not be uploaded .*the LoRA is safe in"):
        push(done)
