"""Of a random sample of timm's models, how many get gate sites that close?

No weights are downloaded. Each model is made with random ones, its sites are found, and one pass
with all channels closed must give the same outputs for two different images.

    python -m benchmarks.timm_sites --n 100 --seed 0 --out benchmarks/results/timm_sites.json

goes on where the file ends, so it may be run in slices (``--seconds 300``).
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from nad_attr import SubArchitecture, find_gate_sites
from nad_attr.system.files import write_text

#: Parameters of a model that is run here at most; larger ones are traced on the meta device alone.
MOST = 400e6


def look(name: str) -> dict[str, Any]:
    """Sites of one model, and whether closing all of them cuts the output off from the input."""
    import timm

    with torch.device("meta"):
        size = sum(p.numel() for p in timm.create_model(name).parameters())
    if size > MOST:
        return {"name": name, "parameters": size, "result": "too large to be run here"}
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    shape = model.default_cfg["input_size"]
    for side in (64, 128, shape[-1]):  # small where the model takes it
        images = torch.rand(2, shape[0], side, side)
        try:
            with torch.no_grad():
                model(images)
            break
        except Exception:
            continue
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sites = find_gate_sites(model, images)
    closed = SubArchitecture.from_kept({}, sites)
    with torch.no_grad():
        before = model(images)
        with closed.applied(model):
            outputs = model(images)
        same = torch.equal(model(images), before)
    spread = float((outputs[0] - outputs[1]).abs().max())
    scale = float(outputs.abs().max()) or 1.0
    return {
        "name": name,
        "parameters": size,
        "sites": len(sites),
        "channels": sum(site.n_channels for site in sites),
        "closes": spread <= 1e-5 * scale,
        "unchanged": same,
        "warnings": sorted({str(w.message)[:200] for w in said if "site" in str(w.message)}),
    }


def main() -> None:
    """See this module's description."""
    import timm

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/timm_sites.json"))
    options = parser.parse_args()
    names = random.Random(options.seed).sample(sorted(timm.list_models()), options.n)
    known = json.loads(options.out.read_text())["models"] if options.out.exists() else []
    done = {row["name"] for row in known}
    began = time.monotonic()
    for name in names:
        if name in done or time.monotonic() - began > options.seconds:
            continue
        try:
            row = look(name)
        except Exception as error:  # what does not work is the result
            row = {"name": name, "error": f"{type(error).__name__}: {error}"[:400]}
        known.append(row)
        print(json.dumps(row), flush=True)
        found = {
            "command": f"python -m benchmarks.timm_sites --n {options.n} --seed {options.seed}",
            "timm": timm.__version__,
            "torch": torch.__version__,
            "n_looked_at": len(known),
            "n_that_close": sum(bool(row.get("closes")) for row in known),
            "models": known,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, json.dumps(found, indent=1) + "\n")
        gc.collect()


if __name__ == "__main__":
    main()
