"""What each rank reads and holds when it loads its layers from a sharded repository of more than 1 GB.

``python benchmarks/loading.py`` makes the repository (random weights, bfloat16) in a scratch folder, evicts it from the
page cache before every rank, loads each rank's stage in a process of its own and prints a Markdown table: bytes of the
rank's parameters, bytes that the kernel read from the disk, peak of the process's own memory beyond what the
libraries take.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RANKS = (1, 2, 4, 8)


def make(folder: Path, layers: int, heads: int) -> None:
    """A transformer in the diffusers layout, in shards of 100 MB."""
    import torch
    from diffusers import WanTransformer3DModel

    torch.set_default_dtype(torch.bfloat16)
    model = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        text_dim=512,
        ffn_dim=heads * 512,
        num_layers=layers,
    )
    model.save_pretrained(folder, max_shard_size="100MB")


def load(folder: Path, first: int, last: int) -> dict[str, int]:
    """Load a stage in this process; what it took, in bytes."""
    import torch

    from videojob_worker import wan

    before_read, before_memory = _read_bytes(), _own_memory()
    stage = wan.load(folder, range(first, last), torch.bfloat16, torch.device("cpu"))
    held = sum(parameter.numel() * parameter.element_size() for parameter in stage.parameters())
    return {"held": held, "read": _read_bytes() - before_read, "memory": _own_memory() - before_memory}


def _read_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes"))
    return int(line.split()[1])


def _own_memory() -> int:
    """Anonymous memory, without the pages of mapped files, which the kernel may drop."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def evict(folder: Path) -> None:
    """Have the kernel forget the files' pages."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(folder: Path, layers: int) -> None:
    """Print the table."""
    from videojob_worker import topology

    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    shards = len(list(folder.glob("*.safetensors")))
    print(f"Repository: {total / 1e6:,.0f} MB in {shards} shards, {layers} layers.\n")
    print("| ranks | rank | layers | parameters, MB | share | read, MB | read / parameters | own memory, MB | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for ranks in RANKS:
        for rank, share in enumerate(topology.shares(layers, ranks)):
            evict(folder)
            begun = time.monotonic()
            command = [sys.executable, __file__, "--folder", str(folder), "--load", f"{share.start}:{share.stop}"]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            took = json.loads(said.splitlines()[-1])
            print(
                f"| {ranks} | {rank} | {share.start}-{share.stop - 1} | {took['held'] / 1e6:,.0f} "
                f"| {took['held'] / total:.1%} | {took['read'] / 1e6:,.0f} | {took['read'] / took['held']:.2f} "
                f"| {took['memory'] / 1e6:,.0f} | {time.monotonic() - begun:.1f} |",
                flush=True,
            )


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="the repository; made if absent (default: a scratch folder)")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--heads", type=int, default=8, help="of 128 each")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        first, last = map(int, options.load.split(":"))
        print(json.dumps(load(options.folder, first, last)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "transformer"
        if not (folder / "config.json").exists():
            make(folder, options.layers, options.heads)
        measure(folder, options.layers)


if __name__ == "__main__":
    main()
