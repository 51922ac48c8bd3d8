"""Two dumps of `python -m mmdit.run --dump`, tensor by tensor: `python -m benchmarks.compare OURS REFERENCE`.

Errors are the norm of the difference over the norm of the reference. Exit code 1 where names, shapes or whole numbers
differ; another implementation can write a dump of its own under the same names.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.parity import relative_error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ours", type=Path)
    parser.add_argument("reference", type=Path)
    args = parser.parse_args()
    ours, reference = load_file(args.ours), load_file(args.reference)
    different = 0
    for name in sorted(ours.keys() | reference.keys()):
        if name not in ours or name not in reference:
            print(f"{name:24} only in {args.ours if name in ours else args.reference}")
            different += 1
        elif ours[name].shape != reference[name].shape:
            print(f"{name:24} {list(ours[name].shape)} against {list(reference[name].shape)}")
            different += 1
        elif torch.equal(ours[name], reference[name]):
            print(f"{name:24} equal")
        else:
            print(f"{name:24} {relative_error(ours[name], reference[name]):.1e}")
            different += ours[name].dtype == torch.int64
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
