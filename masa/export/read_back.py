"""An exported folder, read by the library that it is for, in a process without masa: are the logits the model's?"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from masa.errors import MasaError

TOLERANCE = 1e-4
"""Of the largest logit: the same weights in the same arithmetic, in another process."""

_PROGRAM = """
import sys
import numpy as np, torch
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "masa":
            raise ImportError("read back without masa")
sys.meta_path.insert(0, Without())
given, found = sys.argv[1:]
torch.set_num_threads(max(1, torch.get_num_threads() // 2))
inputs = torch.from_numpy(np.load(given))
{code}
with torch.no_grad():
    np.save(found, model.eval()(inputs){logits}.float().numpy())
"""


def check(model: Any, kind: Any, folder: Path) -> dict[str, Any]:
    """Compare.

    Args:
        model: what was written.
        kind: module of its kind: ``READ``, Python that makes ``model`` of the current folder, ``LOGITS``, what of its
            output is compared, and ``example``, inputs.
        folder: where it was written.

    Returns:
        ``program`` and ``largest_logit_difference``.

    Raises:
        MasaError: the library cannot read the folder, or other logits come out.
    """
    import numpy as np
    import torch

    print(f"export: {kind.LIBRARY} reads the folder back", file=sys.stderr, flush=True)
    inputs = kind.example(model)
    with torch.no_grad():
        output = model(inputs)
    expected = output.logits if kind.LOGITS else output
    expected_dtype, expected = expected.dtype, expected.float()
    if not torch.isfinite(expected).all():
        said = str(expected_dtype).removeprefix("torch.")
        raise MasaError(f"In {said} the model's own outputs are not finite; export it in another dtype (--dtype).")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".masa-check-") as temporary:
        given, found = Path(temporary) / "inputs.npy", Path(temporary) / "outputs.npy"
        np.save(given, inputs.numpy())
        program = _PROGRAM.format(code=kind.READ, logits=kind.LOGITS)
        command = [sys.executable, "-P", "-c", program, str(given), str(found)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["nothing"]
            raise MasaError(f"{kind.LIBRARY} cannot read what was written. It said: {said[-1]}")
        gap = float((torch.from_numpy(np.load(found)) - expected).abs().max())
    if not gap <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise MasaError(f"Read back by {kind.LIBRARY}, the logits differ by {gap:.3g}: the folder is not the model.")
    return {"program": kind.LIBRARY, "largest_logit_difference": gap}
