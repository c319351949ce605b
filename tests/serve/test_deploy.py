"""What deploy/ tells others: a proxy that is run, a unit and manifests that are checked by the schemas of their own."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cvx_deploy.serve.settings import Limits
from tests.command import cvx
from tests.conftest import ROOT
from tests.serve.conftest import PROMPT, Server, until
from tests.serve.test_refusals import picture

DEPLOY = ROOT / "deploy"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
CLUSTER = "1.37.0"
FEW: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 4, "seed": 7}


def serve_words(text: str) -> Iterator[list[str]]:
    """Yield the words after ``serve`` of every command that a file runs, whatever its form."""
    yaml = pytest.importorskip("yaml")
    for found in re.findall(r"^ExecStart=\S+cvx-deploy serve (.*)$", text, re.MULTILINE):
        yield found.split()
    if entry := re.search(r'^ENTRYPOINT \["cvx-deploy", "serve", (.*)\]$', text, re.MULTILINE):
        rest = re.search(r"^CMD (\[.*\])$", text, re.MULTILINE)
        assert rest is not None
        yield [*json.loads(f"[{entry[1]}]"), *json.loads(rest[1])]
    if "apiVersion" in text:
        for one in yaml.safe_load_all(text):
            spec = one["spec"].get("template", {}).get("spec") or one["spec"].get("predictor") or {"containers": []}
            for container in spec["containers"]:
                yield container["args"]


@pytest.mark.parametrize("name", [file.name for file in DEPLOY.iterdir() if "nginx" not in file.name])
def test_every_server_that_is_started_is_started_with_options_that_there_are(name: str) -> None:
    for words in serve_words((DEPLOY / name).read_text(encoding="utf-8")):
        assert "--model" in " ".join(words)
        assert cvx("serve", *words, "--help").code == 0
        assert cvx("serve", *words, "--none").code == 2, "the twin"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    def verified(text: str) -> str:
        unit = tmp_path / "cvx-deploy.service"
        unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE))
        return subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True).stderr

    text = (DEPLOY / "cvx-deploy.service").read_text(encoding="utf-8")
    assert "cvx-deploy.service" not in verified(text)
    assert "soon" in verified(text.replace("=60", "=soon")), "the twin"


def checked(kind: dict[str, Any]) -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    schemas.validate(kind, CLUSTER, strict=True)


def test_the_manifests_are_ones_by_the_schemas_of_kubernetes() -> None:
    yaml = pytest.importorskip("yaml")
    schemas = pytest.importorskip("kubernetes_validate")
    manifests = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))
    *known, monitor = manifests
    assert [one["kind"] for one in manifests][-3:] == ["Deployment", "Service", "ServiceMonitor"]
    for one in known:
        checked(one)
    [container] = known[2]["spec"]["template"]["spec"]["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert monitor["spec"]["endpoints"][0]["path"] == "/metrics"
    assert monitor["spec"]["endpoints"][0]["port"] in {one["name"] for one in known[3]["spec"]["ports"]}
    container["readinesProbe"] = container.pop("readinessProbe")
    with pytest.raises(schemas.ValidationError):
        checked(known[2])


def test_kserves_predictor_is_a_pod_by_the_schemas_of_kubernetes() -> None:
    yaml = pytest.importorskip("yaml")
    service = yaml.safe_load((DEPLOY / "kserve.yaml").read_text(encoding="utf-8"))
    pod = service["spec"]["predictor"]
    assert (pod.pop("minReplicas"), pod.pop("maxReplicas")) == (1, 1), "one server has the queue"
    assert pod.pop("deploymentStrategy") == {"type": "Recreate"}
    checked({"apiVersion": "v1", "kind": "Pod", "metadata": service["metadata"], "spec": pod})


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@contextlib.contextmanager
def proxied(server: Server, folder: Path) -> Iterator[httpx.Client]:
    """Run nginx with the file as it is, but for the name, the ports and a certificate, in front of a server."""
    port, key, certificate = free_port(), folder / "video.key", folder / "video.pem"
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")
    words = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, "-keyout", key, "-out", certificate)
    subprocess.run(["openssl", *words], check=True, capture_output=True)
    text = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
    for there, here in (
        ("video.example.org", "localhost"),
        ("443", str(port)),
        ("/etc/ssl/", f"{folder}/"),
        ("http://127.0.0.1:8000", server.url),
    ):
        assert there in text
        text = text.replace(there, here)
    places = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    around = f"daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}"
    (folder / "nginx.conf").write_text(f"{around} http {{ access_log off; {places} {text} }}")
    assert NGINX is not None
    process = subprocess.Popen(
        [NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", f"{folder}/error.log"]
    )
    try:
        with httpx.Client(base_url=f"https://localhost:{port}", verify=False, timeout=60) as client:
            until(lambda: answers(client))
            yield client
    finally:
        process.terminate()
        process.wait()


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/healthz").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.nightly
@pytest.mark.skipif(NGINX is None, reason="there is no nginx here")
def test_behind_nginx_everything_is_as_it_was(server: Server, tmp_path: Path) -> None:
    with proxied(server, tmp_path) as client:
        image = {"input_reference": ("first.png", picture(1500, 1500) + b"\0" * (8 << 20), "image/png")}
        sent = client.post("/v1/videos", data={**FEW, "model": "mini-i2v"}, files=image)
        assert sent.status_code == 200, sent.text
        long = client.post("/v1/videos", json={**FEW, "num_inference_steps": 60}).json()["id"]
        with client.stream("GET", f"/v1/videos/{long}/events") as events:
            lines = events.iter_lines()
            assert any(line.startswith("event: step") for line in lines)
            status = client.get(f"/v1/videos/{long}").json()["status"]
            seen = [line for line in lines if line.startswith("event: ")]
        assert status == "in_progress", "the first step came while the others were made"
        assert seen[-1] == "event: completed"
        whole = client.get(f"/v1/videos/{long}/content")
        part = client.get(f"/v1/videos/{long}/content", headers={"Range": "bytes=100-199"})
        assert (part.status_code, part.content) == (206, whole.content[100:200])
        assert whole.headers["content-security-policy"]
        limit = Limits().body
        over = client.post("/v1/videos", content=b"x" * (limit + 1), headers={"Content-Type": "application/json"})
        assert over.status_code == 413
        under = client.post("/v1/videos", content=b"x" * limit, headers={"Content-Type": "application/json"})
        assert under.status_code == 400, "the twin: what the server takes, it gets"
        page = client.get("/", headers={"Host": "evil.example"})
        assert page.status_code == 403, "Host is passed on, and looked at"
