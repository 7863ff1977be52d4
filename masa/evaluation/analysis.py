"""What trained weights look like, as small JSON: effective ranks, spectra and coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masa.errors import MasaError
from masa.runs import run
from masa.runs.files import verify
from masa.sharing import checkpoint
from masa.sharing.projections import bank_of, family_of
from masa.sharing.share import count_parameters
from masa.sharing.spec import ATTENTION
from masa.sharing.weight_sources import Atoms


def effective_rank(weight: Tensor) -> float:
    """exp of the entropy of the normalised singular values of a matrix (Roy and Vetterli 2007)."""
    values = torch.linalg.svdvals(weight.float())
    p = values / values.sum()
    return float(torch.exp(-(p * p.clamp_min(1e-12).log()).sum()))


def check_finite(numbers: Tensor, what: str) -> None:
    """See that what a model gives are numbers: comparisons with NaN are false, so that a broken model would be scored.

    Args:
        what: names them, in the plural.

    Raises:
        MasaError: one is NaN or infinite.
    """
    if not (finite := torch.isfinite(numbers)).all():
        raise MasaError(
            f"{what} are not finite ({int((~finite).sum())} of {finite.numel()}): nothing is scored. Its weights are "
            "broken, or too large for the dtype it runs in."
        )


@torch.no_grad()
def describe_weights(model: nn.Module) -> dict[str, Any]:
    """Effective rank of every attention matrix, mean \\|cos\\| between layers, and MASA's coefficients.

    Returns:
        ``effective_rank``: projection -> L numbers; ``similarity``: projection -> mean absolute cosine between the
        matrices of different layers; ``coefficients``: projection -> (L, S) lists, for MASA.
    """
    family = family_of(model)
    ranks, similarity = {}, {}
    for letter in (p for p in ATTENTION if p in family.paths):
        weights = [family.at(layer, letter).weight for layer in family.layers(letter)]
        ranks[letter] = [round(effective_rank(w), 4) for w in weights]
        flat = nn.functional.normalize(torch.stack([w.flatten().float() for w in weights]), dim=1)
        cosines = (flat @ flat.T).abs()
        count = len(weights)
        similarity[letter] = float((cosines.sum() - cosines.trace()) / max(count * (count - 1), 1))
    coefficients = {}
    shared = bank_of(model)
    if shared is not None:
        for source in shared.values():
            if isinstance(source, Atoms):
                coefficients |= {p: source.coefficients(p).tolist() for p in source.projections}
    return {"effective_rank": ranks, "similarity": similarity, "coefficients": coefficients}


def read_run(run_dir: Path, manifest: Mapping[str, Any], out: Path) -> nn.Module:
    """The model of a finished run as others' programs read its folder (factored), on a GPU where there is one.

    Its scores are therefore those of lm-eval's own command line on that folder. ``weights.json`` is
    written into ``out``.

    Args:
        run_dir: of the run.
        manifest: its ``manifest.json``.
        out: of the evaluation.

    Raises:
        MasaError: a file of the checkpoint is damaged, or it holds another number of attention parameters than the
            manifest says.
    """
    again = "train it again with `masa pretrain` and --restart"
    try:
        expected, sums = manifest["parameters"]["attention"], dict(manifest["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise MasaError(f"{run_dir / 'manifest.json'} is not one of a finished run; {again}.") from error
    verify(run_dir / "model", sums, again)
    model = checkpoint.load(run_dir / "model", runtime="factored")
    found = count_parameters(model).attention
    if found != expected:
        raise MasaError(f"{run_dir / 'model'} holds {found} attention numbers, its manifest says otherwise.")
    for name, parameter in model.named_parameters():
        check_finite(parameter, f"{run_dir / 'model'}: weights of {name}")
    run.write_json(out / "weights.json", describe_weights(model))
    return model.to("cuda" if torch.cuda.is_available() else "cpu")
