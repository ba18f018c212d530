"""Serve torchvision's pretrained AlexNet over HTTP, as an ONNX model that was compared with its weights.

    curl -O https://download.pytorch.org/models/alexnet-owt-7be5be79.pth
    python docs/examples/serve_torchvision.py alexnet-owt-7be5be79.pth IMAGENET
    curl --data-binary @cat.jpg http://127.0.0.1:8000/

IMAGENET is a folder with train/ and val/ (docs/data.md). The export is compared with the weights on its
validation images. To serve an export that exists, call `serve` with its folder.
"""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec

from alexnet import Predictor
from data_pipeline.loader import ImageSource

MAX_BYTES = 20_000_000


def make_bundle(weights: Path, data: Path, runs: Path) -> Path:
    """Make a run of a file of weights and export it; returns the bundle's folder."""
    # Imported here: only this step needs torch. A server that has a bundle needs neither it nor the trainer.
    from data_pipeline.datasets.open import open_dataset
    from infer.export.pipeline import export_models
    from train.weights import import_weights

    # A state dict has no class names. torchvision numbers classes as we do, in the order of their folders.
    classes = open_dataset(data, "val").classes
    # The file is read without executing anything in it. torchvision's `alexnet` is our network `owt`.
    checkpoint = import_weights(weights, runs, classes)
    return export_models(checkpoint, ("onnx",), data=data)["onnx"].folder


def serve(bundle: Path, port: int) -> None:
    """Answer each POSTed image with its row as JSON, on this machine only."""
    # One Predictor for all requests, since loading verifies and optimises the model. It serves one thread
    # at a time, as HTTPServer does; ONNX Runtime uses all cores for a request.
    with Predictor(bundle) as predictor:

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                if length > MAX_BYTES:
                    self.send_error(413)
                    return
                body = self.rfile.read(length)
                # Bytes are treated as a file is: the same decoder, EXIF orientation, limits and errors.
                [row] = predictor(ImageSource(Path("request"), lambda max_bytes: body))
                self.send_response(200 if row.status == "ok" else 400)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(msgspec.json.encode(row))

        with HTTPServer(("127.0.0.1", port), Handler) as server:
            print(f"http://127.0.0.1:{server.server_port}/ serves {bundle}", flush=True)
            server.serve_forever()


if __name__ == "__main__":
    weights, data = Path(sys.argv[1]), Path(sys.argv[2])
    serve(make_bundle(weights, data, Path("runs")), port=int(sys.argv[3]) if sys.argv[3:] else 8000)
