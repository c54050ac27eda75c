"""A web server on this machine that serves, breaks and counts downloads."""
import http.server
import threading


class Mirror:
    """Serves files (a dict of name to bytes) until the with block ends.

    break_after[name] = N: the next download of name breaks off after N bytes.
    ranges: whether it can continue a download.
    requests: what was asked for, as (name, first byte).
    """

    def __init__(self, files, ranges=True):
        self.files, self.ranges = dict(files), ranges
        self.break_after, self.requests = {}, []

    def __enter__(self):
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                mirror.answer(self)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), Handler)
        self.url = "http://127.0.0.1:%d" % self.server.server_port
        threading.Thread(target=self.server.serve_forever,
                         daemon=True).start()
        return self

    def __exit__(self, *unused):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request):
        name = request.path.rpartition("/")[2]
        wanted = request.headers.get("Range")
        first = 0
        if wanted and self.ranges:
            first = int(wanted[len("bytes="):].rstrip("-"))
        self.requests.append((name, first))
        if name not in self.files:
            request.send_error(404)
            return
        data = self.files[name]
        if first and first >= len(data):
            request.send_error(416)
            return
        request.send_response(206 if first else 200)
        request.send_header("Content-Length", str(len(data) - first))
        if first:
            request.send_header("Content-Range", "bytes %d-%d/%d" % (
                first, len(data) - 1, len(data)))
        request.end_headers()
        stop = self.break_after.pop(name, None)
        request.wfile.write(data[first:stop])
