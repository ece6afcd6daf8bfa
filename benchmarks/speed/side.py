"""One side of one round, in a process of its own; the last line it prints is what it measured, as JSON.

    python -m benchmarks.speed.side FOLDER --side graft --seed 1 [--graft KEY=VALUE ...]
    python -m benchmarks.speed.side FOLDER --side trainer:bf16:autocast:length --seed 1

FOLDER is what benchmarks.speed.work.write made.
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", required=True, help="graft, or a peer's variant: see benchmarks/speed/peers.py")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--graft", action="append", default=[], metavar="KEY=VALUE", help="goes over Graft's recipe")
    given = parser.parse_args()
    if given.side.startswith("graft"):
        from graft.engine.runtime import prepare_environment

        prepare_environment()  # as the command line does, before torch is loaded
        from benchmarks.speed import ours

        if given.side == "graft:compiled":
            given.graft.append("engine.compile=true")

        measured = ours.run(given.folder, given.seed, given.graft)
    else:
        from benchmarks.speed import peers

        measured = peers.run(given.folder, given.seed, given.side)
    import torch

    measured |= {"side": given.side, "seed": given.seed, "threads": torch.get_num_threads()}
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
