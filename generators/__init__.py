"""Image generators behind one protocol: treated cells drawn from control cells, from a user's own checkpoints.

    generator = generators.load("cellflux", "checkpoint.pth", embeddings="emb_fp.csv")
    images = generator.sample(control, ["taxol"] * 8, steps=50, generator=torch.Generator().manual_seed(0))

This package may import `biorewards`; never the other way round. A new generator is one file with a function
`load(checkpoint, **options)` and one line in `LOADERS`.
"""

from __future__ import annotations

import difflib
import inspect
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from generators.base import Capabilities, FlowGenerator, Generator

#: name -> module with `load(checkpoint, **options) -> Generator`, imported when it is called for.
LOADERS = {
    "cellflux": "generators.cellflux",
    "impa": "generators.impa",
    "mit": "generators.mit",
    "phendiff": "generators.phendiff",
}

#: A CellFlux of 1.7 million parameters, trained on the phantom (48 px crops): `load("cellflux", MINI_CELLFLUX)`.
MINI_CELLFLUX = Path(__file__).parent / "assets" / "mini_cellflux.safetensors"

__all__ = ["LOADERS", "MINI_CELLFLUX", "Capabilities", "FlowGenerator", "Generator", "load"]


def load(name: str, checkpoint: str | os.PathLike[str], **options: Any) -> Generator:
    """A generator from a checkpoint: a local path or `hf://owner/repo/path@revision`.

    name: a key of `LOADERS`, or `module:function` of your own. options: of that generator's `load`; None means its
    default. Raises ValueError for an unknown name or option, and for a file that is not such a checkpoint.
    """
    module, _, attribute = (name if ":" in name else LOADERS.get(name, "")).partition(":")
    if not module:
        near = difflib.get_close_matches(name, LOADERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(LOADERS)}"
        raise ValueError(f"no generator is called {name!r}; {hint} (your own: module:function)")
    loader = getattr(import_module(module), attribute or "load")
    given = {key: value for key, value in options.items() if value is not None}
    takes = list(inspect.signature(loader).parameters.values())[1:]
    known = [p.name for p in takes]
    anything = any(p.kind is p.VAR_KEYWORD for p in takes)
    if not anything and (unknown := sorted(set(given) - set(known))):
        raise ValueError(f"{name} has no option {unknown[0]!r}; it has: {', '.join(known)}")
    try:
        generator: Generator = loader(checkpoint, **given)
    except TypeError as error:
        values = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise ValueError(f"{name}: an option has a value of the wrong kind ({values}): {error}") from error
    return generator
