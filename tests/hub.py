"""A server on loopback that speaks as much of the Hub's API as an upload needs, faults included."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_" + "abcDEF123456" * 3
SHA = "b" * 40


class Hub:
    """Keeps repositories and large files; answers with what a test puts into ``faults``.

    ``faults`` maps a pattern of ``METHOD path`` to a list: of each request that fits, the first
    element is taken: a status, ``None`` for no fault, or ``cut``, which ends the connection before
    the answer.
    """

    def __init__(self):
        self.repos = {}
        self.blobs = {}
        self.requests = []
        self.faults = {}
        self.cards = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do(self):
                outer._handle(self)

            do_GET = do_POST = do_PUT = do_HEAD = do

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def sent(self, pattern):
        """The requests that fit, in order."""
        return [request for request in self.requests if re.fullmatch(pattern, request)]

    def _handle(self, http):
        request = f"{http.command} {http.path.partition('?')[0]}"
        fault = next((f.pop(0) for p, f in self.faults.items() if f and re.match(p, request)), None)
        self.requests.append(request)
        if fault == "cut":
            http.rfile.read(100)
            http.close_connection = True
            http.connection.close()
            return
        body = self._body(http)
        if fault is None and http.headers["Authorization"] != f"Bearer {TOKEN}":
            fault = 401 if "/lfs/" not in request else None
        status, answer = (fault, {"error": "so"}) if fault else self._answer(http, request, body)
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        http.send_response(status)
        http.send_header("Content-Length", str(len(content)))
        http.send_header("X-Repo-Commit", SHA)
        http.send_header("ETag", '"e"')
        http.end_headers()
        if http.command != "HEAD":
            http.wfile.write(content)

    def _body(self, http):
        if "chunked" not in http.headers.get("Transfer-Encoding", ""):
            return http.rfile.read(int(http.headers.get("Content-Length", 0)))
        body = b""
        while size := int(http.rfile.readline(), 16):
            body += http.rfile.read(size)
            http.rfile.readline()
        http.rfile.readline()
        return body

    def _answer(self, http, request, body):
        if request == "POST /api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if request == "POST /api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.repos:
                return 409, {"error": "You already created this model repo"}
            private = asked.get("private") or asked.get("visibility") == "private"
            self.repos[name] = {"private": bool(private), "files": {}}
            return 200, {"url": f"{self.url}/{name}"}
        if found := re.fullmatch(r"GET /api/models/(\w+/\w+)(?:/revision/main)?", request):
            repo, about = self.repos.get(found[1]), {"id": found[1], "sha": SHA, "siblings": []}
            if found[1] in self.cards:
                return 200, {**about, "private": False, "cardData": self.cards[found[1]]}
            if repo is None:
                return 404, {"error": "not there"}
            return 200, {**about, "private": repo["private"]}
        if re.fullmatch(r"POST /api/models/\w+/\w+/preupload/main", request):
            files = json.loads(body)["files"]
            kinds = {f["path"]: f["path"].endswith((".safetensors", ".png")) for f in files}
            return 200, {
                "files": [
                    {"path": p, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
                    for p, large in kinds.items()
                ]
            }
        if re.fullmatch(r"POST /\w+/\w+\.git/info/lfs/objects/batch", request):
            return 200, {
                "transfer": "basic",
                "objects": [*map(self._upload, json.loads(body)["objects"])],
            }
        if found := re.fullmatch(r"PUT /lfs/(\w+)", request):
            self.blobs[found[1]] = body
            return 200, {}
        if found := re.fullmatch(r"POST /api/models/(\w+/\w+)/commit/main", request):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    content = base64.b64decode(value["content"])
                    self.repos[found[1]]["files"][value["path"]] = content
                elif line["key"] == "lfsFile":
                    self.repos[found[1]]["files"][value["path"]] = self.blobs[value["oid"]]
            return 200, {"commitUrl": f"{self.url}/{found[1]}/commit/{SHA}", "commitOid": SHA}
        return 404, {"error": f"not known here: {request}"}

    def _upload(self, asked):
        known = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] in self.blobs:
            return known
        return {**known, "actions": {"upload": {"href": f"{self.url}/lfs/{asked['oid']}"}}}
