"""Peak memory of every rank against the length of the video.

``python benchmarks/memory.py`` renders videos of 16, 64 and 256 blocks of a tiny model on 2 CPU ranks into a scratch
folder and prints a Markdown table of each rank's resident memory, anonymous pages only (``RssAnon``), at its highest
after the first eighth of the render.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

from videojob_api import validation
from videojob_worker import local, tiny

BLOCKS = (16, 64, 256)


def document(model: Path, blocks: int, ranks: int) -> dict[str, object]:
    """A VideoJob of so many blocks of 4 latents with 3 of context."""
    latents = 3 + 4 * blocks
    return {
        "apiVersion": "videojob.dev/v1alpha1",
        "kind": "VideoJob",
        "metadata": {"name": f"blocks-{blocks}"},
        "spec": {
            "prompt": "a paper boat",
            "video": {"frames": 1 + 4 * (latents - 1), "width": 128, "height": 96},
            "model": {"source": {"localPath": str(model)}},
            "sampling": {"steps": 4},
            "dualParallel": {"blockLatents": 4, "contextLatents": 3},
            "gpusPerNode": 0,
            "ranksPerNode": ranks,
            "output": {"s3": {"bucket": "videos"}},
        },
    }


class Watch(threading.Thread):
    """Samples the ranks of one render: their anonymous memory in kB by percent of progress."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.percent = 0
        self.ended = threading.Event()
        self.samples: dict[int, list[tuple[int, int]]] = {}

    def run(self) -> None:
        """Sample until the render has ended."""
        while not self.ended.wait(0.2):
            for rank, kilobytes in _ranks().items():
                self.samples.setdefault(rank, []).append((self.percent, kilobytes))

    def peak(self, rank: int) -> int:
        """The highest after the first eighth, in kB."""
        return max(kilobytes for percent, kilobytes in self.samples[rank] if percent >= 12)


def _ranks() -> dict[int, int]:
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes()
            if b"videojob_worker\0" in command and b"launch" not in command:
                rank = int(next(each for each in environment if each.startswith(b"RANK="))[5:])
                status = (process / "status").read_text().splitlines()
                found[rank] = int(next(line for line in status if line.startswith("RssAnon")).split()[1])
        except (OSError, StopIteration):
            continue
    return found


def render(model: Path, folder: Path, blocks: int, ranks: int) -> tuple[Watch, float]:
    """Render, watched; and how long it took in seconds."""
    begun, watch = time.monotonic(), Watch()
    run = local.Run(validation.read(document(model, blocks, ranks)), folder, output_dir=folder / "out")
    watch.start()
    for record in local.render(run):
        watch.percent = record.percent
    watch.ended.set()
    watch.join()
    return watch, time.monotonic() - begun


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS)
    options = parser.parse_args()
    print("| blocks | " + " | ".join(f"rank {rank}, MB" for rank in range(options.ranks)) + " | s |")
    print("|---" * (options.ranks + 2) + "|")
    with tempfile.TemporaryDirectory() as scratch:
        tiny.save(Path(scratch) / "model")
        for blocks in options.blocks:
            watch, seconds = render(Path(scratch) / "model", Path(scratch) / str(blocks), blocks, options.ranks)
            cells = " | ".join(f"{watch.peak(rank) / 1000:,.1f}" for rank in range(options.ranks))
            print(f"| {blocks} | {cells} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
