"""A small server that speaks the routes of the Hugging Face hub that kd_jax uses, on the loopback address.

The routes are those of huggingface_hub 2.4: information on a repository, the list of its files, files with ETag and
X-Repo-Commit, the owner of a token, and the routes that create a repository and commit files. All files are committed
as regular files, because the client uploads large files with another protocol (Xet).
"""

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse

TOKEN = "hf_of_the_tests"  # the only token that the server knows
REPOSITORY = r"(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"


@dataclasses.dataclass
class Repository:
    """A repository: commits by their hashes, and branches and tags by their names."""

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    gated: bool = False
    visibility: str | None = None

    def commit(self, files, ref="main"):
        """Adds a commit with these files, and moves a branch to it. Returns the commit's hash."""
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[sha], self.refs[ref] = dict(files), sha
        return sha


class Hub(http.server.ThreadingHTTPServer):
    """The server. `requests` has the method and path of each request, and `repositories` the repositories by kind/name."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.requests = {}, []
        self.fails, self.delay = "", 0.0  # a pattern of the paths that fail, and the seconds before a file is sent
        self.url = f"http://127.0.0.1:{self.server_port}"

    def add(self, name, files, kind="models", ref="main", **options):
        """Adds a commit to a repository, which is created if it does not exist. Returns the commit's hash."""
        repository = self.repositories.setdefault(f"{kind}/{name}", Repository(**options))
        return repository.commit(files, ref)

    def downloads(self, file):
        """Returns the number of downloads of a file."""
        return sum(line.startswith("GET") and line.endswith(f"/{file}") for line in self.requests)

    def add_folder(self, name, folder, **options):
        """Adds the files of a local folder."""
        return self.add(name, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}, **options)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers the requests."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        """Prints nothing."""

    def reply(self, status=200, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_one(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path, _, _ = self.path.partition("?")
        self.server.requests.append(f"{self.command} {path}")
        if self.server.fails and re.search(self.server.fails, path):
            self.reply(500, b"broken")
            return
        for pattern, answer in ROUTES.items():
            if match := re.fullmatch(pattern, path):
                parts = {name: urllib.parse.unquote(part) for name, part in match.groupdict().items() if part}
                answer(self, body=body, **parts)
                return
        self.reply(404, {"error": "no such route"})

    do_GET = do_HEAD = do_POST = handle_one

    @property
    def knows_token(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def find(self, kind, name, revision="main", reads=True):
        """Returns a commit of a repository and its files; None after a reply with an error."""
        repository = self.server.repositories.get(f"{kind}/{name}")
        if repository is None:  # the hub does not tell whether a private repository exists
            self.reply(*(404, b"") if self.knows_token else (401, b""), X_Error_Code="RepoNotFound")
            return None
        if reads and repository.gated and not self.knows_token:
            self.reply(401, b"", X_Error_Code="GatedRepo")
            return None
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            self.reply(404, b"", X_Error_Code="RevisionNotFound")
            return None
        return sha, repository.commits[sha]

    def info(self, kind, name, revision="main", body=b""):
        if found := self.find(kind, name, revision, reads=False):
            sha, files = found
            self.reply(content={"id": name, "sha": sha, "siblings": [{"rfilename": file} for file in files]})

    def tree(self, kind, name, revision, body=b""):
        if found := self.find(kind, name, revision, reads=False):
            entry = lambda file, content: {"type": "file", "path": file, "size": len(content), "oid": oid(content)}
            self.reply(content=[entry(*item) for item in found[1].items()])

    def resolve(self, name, revision, file, kind="models", body=b""):
        if not (found := self.find(kind.strip("/"), name, revision)):
            return
        sha, files = found
        if file not in files:
            self.reply(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            return
        if self.command == "GET":
            time.sleep(self.server.delay)
        self.reply(content=files[file], ETag=f'"{oid(files[file])}"', X_Repo_Commit=sha)

    def whoami(self, body=b""):
        self.reply(200, {"name": "tester", "type": "user"}) if self.knows_token else self.reply(401, {"error": "no"})

    def create(self, body):
        fields = json.loads(body)
        name = f"{fields['organization']}/{fields['name']}"
        if not self.knows_token or fields["organization"] == "others":
            self.reply(403 if self.knows_token else 401, {"error": "You don't have the rights"})
            return
        exists = f"models/{name}" in self.server.repositories
        repository = self.server.repositories.setdefault(
            f"models/{name}", Repository(visibility=fields.get("visibility"))
        )
        if not exists:
            repository.commit({".gitattributes": b""})
        self.reply(409 if exists else 200, {"url": f"{self.server.url}/{name}"})

    def preupload(self, kind, name, revision, body):
        if found := self.find(kind, name, revision):
            files = [entry["path"] for entry in json.loads(body)["files"]]
            known = {file: oid(content) for file, content in found[1].items()}
            answer = lambda path: {"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": known.get(path)}
            self.reply(content={"files": [answer(path) for path in files]})

    def commit(self, kind, name, revision, body):
        if not (found := self.find(kind, name, revision)):
            return
        files = dict(found[1])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        sha = self.server.repositories[f"{kind}/{name}"].commit(files, revision)
        self.reply(content={"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha})


def oid(content):
    """Returns the hash that git gives to the content of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


ROUTES = {
    "/api/whoami-v2": Handler.whoami,
    "/api/repos/create": Handler.create,
    "/api/validate-yaml": lambda handler, body: handler.reply(content={"errors": [], "warnings": []}),
    f"/api/{REPOSITORY}(?:/revision/(?P<revision>[^/]+))?": Handler.info,
    f"/api/{REPOSITORY}/tree/(?P<revision>[^/]+)": Handler.tree,
    f"/api/{REPOSITORY}/preupload/(?P<revision>[^/]+)": Handler.preupload,
    f"/api/{REPOSITORY}/commit/(?P<revision>[^/]+)": Handler.commit,
    "/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)": Handler.resolve,
}


@contextlib.contextmanager
def running():
    """Yields a running server."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def environment(hub, cache, token=TOKEN):
    """Returns the environment variables of a process that uses the server and a cache of its own."""
    return {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub"), "HF_TOKEN": token,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0",
    }  # fmt: skip


def use(monkeypatch, hub, cache, token=""):
    """Makes this process use the server, a cache of its own and a token; "" for no token.

    huggingface_hub reads the variables of the environment when it is imported, so its constants are set as well.
    """
    import huggingface_hub.constants as constants

    from kd_jax.storage import hub as hub_names

    for name, value in environment(hub, cache, token).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(cache / "stored_tokens"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    forget(monkeypatch)
    return hub_names


def forget(monkeypatch):
    """Makes the process forget the commits and folders of earlier addresses, as a new process would."""
    from kd_jax.storage import hub as hub_names

    monkeypatch.setattr(hub_names, "_keys", {})
    monkeypatch.setattr(hub_names, "_commits", {})
    monkeypatch.setattr(hub_names, "_folders", {})
