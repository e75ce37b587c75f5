"""What the Hub of the tests answers to each request."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import yaml

if TYPE_CHECKING:
    from tests.helpers.hub_server import Hub

DATE = "2026-01-02T03:04:05.000Z"
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".model", ".gguf", ".msgpack", ".zip")
"""Endings of the files that lie on the second host."""


@dataclass(frozen=True)
class Token:
    """Whose token it is, and what it may do.

    Args:
        user: The user.
        write: Whether it may write; or the only repositories to which it may.
        expired: Whether it has expired.
        orgs: Organizations that the user may write to.
    """

    user: str
    write: bool | tuple[str, ...] = True
    expired: bool = False
    orgs: tuple[str, ...] = ()


@dataclass
class Commit:
    oid: str
    parent: Commit | None
    title: str
    # Maps each path to the id of its content.
    files: dict[str, str]


@dataclass
class Repo:
    id: str
    type: str
    private: bool
    sdk: str | None = None
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """Commit of a branch, a tag, a pull request or an id."""
        for name in (revision, revision.removeprefix("refs/heads/")):
            if commit := self.branches.get(name) or self.tags.get(name):
                return commit
        heads: list[Commit | None] = [*self.branches.values(), *self.tags.values()]
        for head in heads:
            while head is not None:
                if head.oid == revision:
                    return head
                head = head.parent
        return None


class Refusal(Exception):
    """An error as the Hub answers it."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any) -> None:
        self.status, self.message, self.code, self.more = status, message, code, more


Answer = tuple[int, dict[str, str], bytes]
ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Any]]] = []
REPO = r"(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"


def route(method: str, path: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        ROUTES.append((method, re.compile(path + "$"), handler))
        return handler

    return register


def refuse(refusal: Refusal) -> Answer:
    headers = {"Content-Type": "application/json", "X-Error-Message": refusal.message, "X-Request-Id": "request-1"}
    if refusal.code:
        headers["X-Error-Code"] = refusal.code
    return refusal.status, headers, json.dumps({"error": refusal.message} | refusal.more).encode()


@dataclass
class Call:
    """One request, as its handler sees it."""

    hub: Hub
    method: str
    query: dict[str, str]
    token: str | None
    body: bytes
    headers: Any

    @property
    def user(self) -> Token | None:
        return self.hub.tokens.get(self.token or "")

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def may_write(self, repo_id: str) -> bool:
        user = self.user
        if user is None or repo_id.split("/")[0] not in (user.user, *user.orgs):
            return False
        return user.write if isinstance(user.write, bool) else repo_id in user.write

    def repo(self, kind: str, id: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get((kind.removesuffix("s"), id))
        user = self.user
        is_member = user is not None and id.split("/")[0] in (user.user, *user.orgs)
        if repo is None or (repo.private and not is_member):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise Refusal(401, "Invalid username or password.")
        if write and not self.may_write(id) and self.query.get("create_pr") != "1":
            raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def revision(self, kind: str, id: str, rev: str, write: bool = False) -> tuple[Repo, Commit]:
        repo = self.repo(kind, id, write)
        commit = repo.find(rev)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return repo, commit


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Any:
    user = call.user
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    access: dict[str, Any] = {"displayName": "token", "createdAt": DATE, "role": "write" if user.write else "read"}
    if isinstance(user.write, tuple):
        scoped = [{"entity": {"type": "model", "name": name}, "permissions": ["repo.write"]} for name in user.write]
        access |= {"role": "fineGrained", "fineGrained": {"global": [], "scoped": scoped}}
    orgs = [{"type": "org", "name": name, "fullname": name, "roleInOrg": "admin"} for name in user.orgs]
    auth = {"type": "access_token", "accessToken": access}
    return {"type": "user", "id": "1", "name": user.user, "fullname": user.user, "orgs": orgs, "auth": auth}


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Any:
    content = call.json["content"]
    header = re.match(r"---\r?\n(.*?)\n---", content, re.DOTALL)
    try:
        data = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError as error:
        problems = {"errors": [{"message": str(error)}], "warnings": []}
        return 400, {"Content-Type": "application/json"}, json.dumps(problems).encode()
    return {"errors": [], "warnings": [] if data else [{"message": "empty or missing yaml metadata in repo card"}]}


@route("POST", "/api/repos/create")
def create_repo(call: Call) -> Any:
    options, user = call.json, call.user
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    kind, repo_id = options.get("type", "model"), f"{options.get('organization') or user.user}/{options['name']}"
    if kind == "space" and not call.hub.spaces:
        raise Refusal(404, "Not Found")
    url = f"{call.hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
    if user.write is not True or not call.may_write(repo_id):
        space = repo_id.split("/")[0]
        raise Refusal(403, f'You don\'t have the rights to create a {kind} under the namespace "{space}"')
    if (kind, repo_id) in call.hub.repos:
        raise Refusal(409, f"You already created this {kind} repo", url=url, name=repo_id)
    call.hub.create(
        kind, repo_id, options.get("visibility") == "private" or bool(options.get("private")), options.get("sdk")
    )
    return {"url": url, "name": repo_id, "id": "1"}


@route("DELETE", "/api/repos/delete")
def delete_repo(call: Call) -> Any:
    options = call.json
    owner = options.get("organization") or (call.user and call.user.user)
    repo = call.repo(options.get("type", "model") + "s", f"{owner}/{options['name']}", write=True)
    del call.hub.repos[repo.type, repo.id]
    return {}


@route("PUT", f"/api/{REPO}/settings")
def settings(call: Call, kind: str, id: str) -> Any:
    repo, options = call.repo(kind, id, write=True), call.json
    repo.private = options.get(
        "private", options.get("visibility", "private" if repo.private else "public") == "private"
    )
    return {"private": repo.private}


@route("GET", f"/api/{REPO}/auth-check(?P<write>/write)?")
def auth_check(call: Call, kind: str, id: str, write: str = "") -> Any:
    call.repo(kind, id, write=bool(write))
    return {}


@route("GET", f"/api/{REPO}/refs")
def refs(call: Call, kind: str, id: str) -> Any:
    repo = call.repo(kind, id)

    def entries(commits: dict[str, Commit], prefix: str) -> list[dict[str, str]]:
        return [
            {"name": name, "ref": name if name.startswith("refs/") else prefix + name, "targetCommit": commit.oid}
            for name, commit in commits.items()
        ]

    heads = entries({k: v for k, v in repo.branches.items() if not k.startswith("refs/")}, "refs/heads/")
    pulls = entries({k: v for k, v in repo.branches.items() if k.startswith("refs/pr/")}, "")
    return {"branches": heads, "converts": [], "tags": entries(repo.tags, "refs/tags/"), "pullRequests": pulls}


@route("POST", f"/api/{REPO}/branch/(?P<name>[^/]+)")
def create_branch(call: Call, kind: str, id: str, name: str) -> Any:
    repo, start = call.revision(kind, id, call.json.get("startingPoint") or "main", write=True)
    if name in repo.branches:
        raise Refusal(409, f"Reference already exists: refs/heads/{name}")
    repo.branches[name] = start
    return {}


@route("DELETE", f"/api/{REPO}/branch/(?P<name>[^/]+)")
def delete_branch(call: Call, kind: str, id: str, name: str) -> Any:
    repo, _ = call.revision(kind, id, name, write=True)
    del repo.branches[name]
    return {}


@route("POST", f"/api/{REPO}/tag/(?P<rev>[^/]+)")
def create_tag(call: Call, kind: str, id: str, rev: str) -> Any:
    repo, commit = call.revision(kind, id, rev, write=True)
    name = call.json["tag"]
    if name in repo.tags:
        raise Refusal(409, f"Reference already exists: refs/tags/{name}")
    repo.tags[name] = commit
    return {}


@route("DELETE", f"/api/{REPO}/tag/(?P<rev>[^/]+)")
def delete_tag(call: Call, kind: str, id: str, rev: str) -> Any:
    repo, _ = call.revision(kind, id, rev, write=True)
    del repo.tags[rev]
    return {}


@route("GET", f"/api/{REPO}/commits/(?P<rev>[^/]+)")
def commits(call: Call, kind: str, id: str, rev: str) -> Any:
    commit: Commit | None = call.revision(kind, id, rev)[1]
    entries = []
    while commit is not None:
        entries.append({"id": commit.oid, "title": commit.title, "message": "", "date": DATE, "authors": []})
        commit = commit.parent
    return entries


@route("GET", f"/api/{REPO}(/revision/(?P<rev>[^/]+))?")
def info(call: Call, kind: str, id: str, rev: str = "main") -> Any:
    repo, commit = call.revision(kind, id, rev)
    answer: dict[str, Any] = {"_id": "1", "id": id, "author": id.split("/")[0], "sha": commit.oid, "tags": []}
    answer |= {"private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
    answer |= {"lastModified": DATE, "createdAt": DATE, "sdk": repo.sdk}
    answer["siblings"] = [{"rfilename": path} for path in sorted(commit.files)]
    card = call.hub.blobs.get(commit.files.get("README.md", ""), b"").decode()
    if match := re.match(r"---\r?\n(.*?)\n---", card, re.DOTALL):
        answer["cardData"] = yaml.safe_load(match[1])
    return answer


def entry(call: Call, commit: Commit, path: str) -> dict[str, Any]:
    """A file as listings name it."""
    oid = commit.files[path]
    content = call.hub.blobs[oid]
    answer: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": oid}
    if len(oid) == 64:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n".encode()
        answer["oid"] = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
        answer["lfs"] = {"oid": oid, "size": len(content), "pointerSize": len(pointer)}
    if call.query.get("expand", "").lower() in ("true", "1"):
        answer["lastCommit"] = {"id": commit.oid, "title": commit.title, "date": DATE}
    return answer


def folder(commit: Commit, path: str) -> dict[str, Any]:
    oid = hashlib.sha1(f"{commit.oid}{path}".encode()).hexdigest()
    return {"type": "directory", "path": path, "size": 0, "oid": oid}


@route("GET", f"/api/{REPO}/tree/(?P<rev>[^/]+)(/(?P<under>.+))?")
def tree(call: Call, kind: str, id: str, rev: str, under: str = "") -> Any:
    _, commit = call.revision(kind, id, rev)
    prefix = f"{under.rstrip('/')}/" if under else ""
    inside = [path for path in sorted(commit.files) if path.startswith(prefix)]
    if prefix and not inside:
        raise Refusal(404, f'"{under}" does not exist on "{rev}"', "EntryNotFound")
    is_deep = call.query.get("recursive", "").lower() in ("true", "1")
    entries = {}
    for path in inside:
        names = path[len(prefix) :].split("/")
        for depth in range(1, len(names)) if is_deep else range(1, min(2, len(names))):
            parent = prefix + "/".join(names[:depth])
            entries[parent] = folder(commit, parent)
        if is_deep or len(names) == 1:
            entries[path] = entry(call, commit, path)
    return list(entries.values())


@route("POST", f"/api/{REPO}/paths-info/(?P<rev>[^/]+)")
def paths_info(call: Call, kind: str, id: str, rev: str) -> Any:
    _, commit = call.revision(kind, id, rev)
    is_json = "json" in (call.headers.get("Content-Type") or "")
    entries = []
    for path in call.json["paths"] if is_json else parse_qs(call.body.decode()).get("paths", []):
        if path in commit.files:
            entries.append(entry(call, commit, path))
        elif any(other.startswith(f"{path}/") for other in commit.files):
            entries.append(folder(commit, path))
    return entries


@route("POST", f"/api/{REPO}/preupload/(?P<rev>[^/]+)")
def preupload(call: Call, kind: str, id: str, rev: str) -> Any:
    _, commit = call.revision(kind, id, rev, write=True)
    modes = []
    for file in call.json["files"]:
        is_large = (
            file["path"].endswith(LARGE) or b"\0" in base64.b64decode(file["sample"]) or file["size"] > 10_000_000
        )
        modes.append(
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large else "regular",
                "shouldIgnore": False,
                "oid": commit.files.get(file["path"]),
            }
        )
    return {"files": modes}


@route("POST", "/((?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)[.]git/info/lfs/objects/batch")
def lfs_batch(call: Call, id: str, kind: str = "models") -> Any:
    hub = call.hub
    call.repo(kind, id, write=True)
    objects = []
    for requested in call.json["objects"]:
        oid, size = requested["oid"], requested["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
        if oid not in hub.blobs:
            upload: dict[str, Any] = {"href": f"{hub.storage}/upload/{oid}", "header": {}}
            if hub.part and size > hub.part:
                count = -(-size // hub.part)
                parts = {f"{n:05d}": f"{hub.storage}/upload/{oid}/{n}" for n in range(1, count + 1)}
                upload = {"href": f"{hub.storage}/complete/{oid}", "header": {"chunk_size": str(hub.part), **parts}}
            answer["actions"] = {
                "upload": upload,
                "verify": {"href": f"{hub.url}/{id}.git/info/lfs/verify", "header": {}},
            }
        objects.append(answer)
    return {"transfer": "multipart" if hub.part else "basic", "objects": objects}


@route("PUT", "/upload/(?P<oid>[0-9a-f]{64})(/(?P<part>[0-9]+))?")
def upload(call: Call, oid: str, part: str | None = None) -> Any:
    if part is not None:
        call.hub.parts[f"{oid}/{part}"] = call.body
    elif hashlib.sha256(call.body).hexdigest() != oid:
        raise Refusal(400, "The content does not match its SHA-256")
    else:
        call.hub.blobs[oid] = call.body
    return 200, {"ETag": f'"{oid[:8]}-{part}"'}, b""


@route("POST", "/complete/(?P<oid>[0-9a-f]{64})")
def complete(call: Call, oid: str) -> Any:
    content = b"".join(call.hub.parts[f"{oid}/{part['partNumber']}"] for part in call.json["parts"])
    if hashlib.sha256(content).hexdigest() != oid:
        raise Refusal(400, "The content does not match its SHA-256")
    call.hub.blobs[oid] = content
    return {}


@route("POST", "/(?P<id>[^/]+/[^/]+)[.]git/info/lfs/verify")
def verify(call: Call, id: str) -> Any:
    if len(call.hub.blobs.get(call.json["oid"], b"")) != call.json["size"]:
        raise Refusal(404, "Object does not exist")
    return {}


@route("POST", f"/api/{REPO}/commit/(?P<rev>[^/]+)")
def commit(call: Call, kind: str, id: str, rev: str) -> Any:
    hub = call.hub
    repo, parent = call.revision(kind, id, rev, write=True)
    header, *operations = [json.loads(line) for line in call.body.splitlines() if line]
    expected = header["value"].get("parentCommit")
    if expected is not None and expected != parent.oid:
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(parent.files)
    for operation in operations:
        key, value = operation["key"], operation["value"]
        path = value["path"]
        if key == "file":
            files[path] = hub.store(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in hub.blobs:
                raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = value["oid"]
        elif key == "deletedFile":
            if path not in files:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            del files[path]
        else:
            files = {other: oid for other, oid in files.items() if not other.startswith(path.rstrip("/") + "/")}
    is_pull = call.query.get("create_pr") == "1"
    branch = f"refs/pr/{sum(name.startswith('refs/pr/') for name in repo.branches) + 1}" if is_pull else rev
    new_commit = hub.commit(repo, branch, header["value"]["summary"], files, parent)
    url = f"{hub.url}/{'' if kind == 'models' else kind + '/'}{id}"
    answer = {
        "success": True,
        "commitOid": new_commit.oid,
        "commitUrl": f"{url}/commit/{new_commit.oid}",
        "hookOutput": "",
    }
    return answer | ({"pullRequestUrl": f"{url}/discussions/{branch.rsplit('/', 1)[1]}"} if is_pull else {})


@route("GET", f"/api/{REPO}/discussions")
def discussions(call: Call, kind: str, id: str) -> Any:
    repo = call.repo(kind, id)
    about = {"createdAt": DATE, "status": "open", "repo": {"name": id, "type": repo.type}, "isPullRequest": True}
    pulls = {name: head for name, head in repo.branches.items() if name.startswith("refs/pr/")}
    listed = [{"num": int(name[8:]), "title": head.title, **about} for name, head in pulls.items()]
    return {"discussions": listed, "count": len(listed), "start": 0}


def content_of(call: Call, content: bytes, headers: dict[str, str]) -> Answer:
    """A file, or the part of it that the request names."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    if match := re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range") or ""):
        first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
        if first >= len(content):
            raise Refusal(416, "Range not satisfiable")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return 206, headers, content[first : last + 1]
    return 200, headers, content


@route(
    "GET", "/((?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)/(resolve|raw)/(?P<rev>refs/pr/[0-9]+|[^/]+)/(?P<path>.+)"
)
def resolve(call: Call, id: str, rev: str, path: str, kind: str = "models") -> Any:
    _, commit = call.revision(kind, id, rev)
    if path not in commit.files:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    oid = commit.files[path]
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{oid}"'}
    if len(oid) == 40:
        return content_of(call, call.hub.blobs[oid], headers)
    linked = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(call.hub.blobs[oid]))}
    return 302, headers | linked | {"Location": f"{call.hub.storage}/download/{oid}?signature=1"}, b""


@route("GET", "/download/(?P<oid>[0-9a-f]{64})")
def download(call: Call, oid: str) -> Any:
    return content_of(call, call.hub.blobs[oid], {"ETag": f'"{oid}"'})


@route("(GET|POST)", "/api/collections(/(?P<slug>[^/]+/[^/]+))?(?P<items>/items)?")
def collections(call: Call, slug: str = "", items: str = "") -> Any:
    hub = call.hub
    if not hub.has_collections:
        raise Refusal(404, "Not Found")
    if slug and slug not in hub.collections:
        raise Refusal(404, "Collection not found")
    if call.method == "GET":
        if slug:
            return hub.collections[slug]
        owner = call.query.get("owner")
        listed = [item for item in hub.collections.values() if owner in (None, item["owner"]["name"])]
        return [{name: value for name, value in item.items() if name != "position"} for item in listed]
    options = call.json
    owner = slug.split("/")[0] or options["namespace"]
    if not call.may_write(f"{owner}/collection"):
        raise Refusal(403, f'You don\'t have the rights to create a collection under the namespace "{owner}"')
    if not slug:
        title = options["title"]
        slug = f"{owner}/{re.sub('[^a-z0-9]+', '-', title.lower())}-{hashlib.md5(title.encode()).hexdigest()[:24]}"
        if slug in hub.collections:
            raise Refusal(409, "Collection already exists", slug=slug)
        hub.collections[slug] = {"slug": slug, "title": title, "description": options.get("description"), "items": []}
        hub.collections[slug] |= {"owner": {"name": owner, "type": "user"}, "lastUpdated": DATE, "position": 0}
        hub.collections[slug] |= {"private": options.get("private", False), "theme": "orange", "upvotes": 0}
    elif items:
        item = options["item"]
        if (item["type"].removesuffix("s"), item["id"]) not in hub.repos:
            raise Refusal(404, "Item not found")
        listed = hub.collections[slug]["items"]
        if any((other["type"], other["id"]) == (item["type"], item["id"]) for other in listed):
            raise Refusal(409, "Item already exists")
        note = {"text": options["note"]} if options.get("note") else None
        listed.append({"_id": f"{len(listed):024x}", "position": len(listed), "note": note, **item})
    return hub.collections[slug]
