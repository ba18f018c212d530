"""The Python interface and the command built on it: arrays, Pillow images, shards, ten crops, going on."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import tarfile
import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image

from alexnet import main
from data_pipeline.errors import UserError
from data_pipeline.index import load_image_folder
from data_pipeline.loader import eval_batches
from infer import Predictor, find_inputs
from infer.backends import BackendName, OnnxBackend, probe_machine, why_no_engine
from infer.bundle import Bundle
from infer.images import DecoderName, open_decoder, run_valid, valid_images
