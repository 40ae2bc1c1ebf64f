"""What a calibration has done so far, in files: an interrupted run goes on where it was.

A folder by what is being computed (model, texts, settings), in it a file a finished piece, each written whole or not at
all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


class CalibrationState:
    """Finished pieces of one calibration.

    Args:
        root: folder of all states; made when the first piece is.
        inputs: everything that the results depend on, JSON.
    """

    def __init__(self, root: Path, inputs: Mapping[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = root / key

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The finished piece `name`, or None; a file that cannot be read counts as unfinished."""
        try:
            found: dict[str, Tensor] = load_file(self._file(name))
        except (OSError, SafetensorError):
            return None
        return found

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps a finished piece.

        Raises:
            OSError: it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # Another calibration of the same model and texts, with another budget, may be at the same piece.
        scratch = self._file(f".{name}-{uuid.uuid4().hex}")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, scratch)
        scratch.replace(self._file(name))

    def discard(self) -> None:
        """Deletes all pieces: the result is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
