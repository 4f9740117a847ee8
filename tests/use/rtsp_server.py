"""A small RTSP server for tests: one file in MPEG-TS, sent once over the RTSP connection itself (RFC 2326, 10.12)."""

from __future__ import annotations

import socketserver
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SDP = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=test\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:track1\r\n"


class Handler(socketserver.StreamRequestHandler):
    """Answer the requests of a player, and send the file after PLAY. The end of the file ends the connection."""

    def handle(self) -> None:
        while line := self.rfile.readline().decode():
            head = {}
            while (field := self.rfile.readline().decode().strip()) != "":
                name, _, value = field.partition(":")
                head[name.lower()] = value.strip()
            method = line.split()[0]
            extra, body = "", ""
            if method == "OPTIONS":
                extra = "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n"
            elif method == "DESCRIBE":
                extra, body = f"Content-Type: application/sdp\r\nContent-Length: {len(SDP)}\r\n", SDP
            elif method == "SETUP":
                extra = "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n"
            else:
                extra = "Session: 1\r\n"
            self.wfile.write(f"RTSP/1.0 200 OK\r\nCSeq: {head['cseq']}\r\n{extra}\r\n{body}".encode())
            if method == "PLAY":
                self.play()
                return

    def play(self) -> None:
        data = self.server.path.read_bytes()
        size = 7 * 188
        for number, at in enumerate(range(0, len(data), size)):
            part = data[at : at + size]
            packet = struct.pack("!BBHII", 0x80, 33, number % 65536, 0, 1) + part
            self.wfile.write(struct.pack("!cBH", b"$", 0, len(packet)) + packet)


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    path: Path


@contextmanager
def serving(path: Path) -> Iterator[str]:
    """Serve a file in MPEG-TS and yield its address."""
    with Server(("127.0.0.1", 0), Handler) as server:
        server.path = path
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"rtsp://127.0.0.1:{server.server_address[1]}/live"
        server.shutdown()
