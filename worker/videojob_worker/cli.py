"""The ``videojob`` command: validate a manifest, render it on this machine, make a tiny model to try with.

Reads and prints; ``local`` does the work. Imports no torch, so that it answers at once.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from videojob_api import names, validation
from videojob_api.plan import cut
from videojob_api.progress import Progress as Record
from videojob_api.progress import Stage
from videojob_api.spec import VideoJob

from . import local, manifest
from .models import Kind

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Render long, continuous videos from VideoJob manifests.",
    epilog="Try: videojob tiny-model tiny && videojob render job.yaml --model tiny --cpu-ranks 4 --output-dir out",
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Manifest = Annotated[Path, typer.Argument(help="A VideoJob in YAML or JSON; - reads standard input.", metavar="FILE")]


@app.command()
def validate(file: Manifest) -> None:
    """Print everything that is wrong with a manifest, or a summary of what it would render."""
    videojob = _read(_load(file), file)
    counts, steps = cut(videojob.spec), videojob.spec.sampling.steps or "the model's default"
    video = videojob.spec.video
    out.print(
        f"{file}: valid. {counts.frames} frames ({counts.frames / video.fps:.1f} s) of {video.width}x{video.height} "
        f"in {counts.blocks} blocks, {steps} steps each, on {videojob.spec.world_size} ranks.",
        soft_wrap=True,
    )


@app.command()
def render(
    file: Manifest,
    model: Annotated[
        Path | None, typer.Option(help="A diffusers model folder, instead of spec.model.source.", file_okay=False)
    ] = None,
    cpu_ranks: Annotated[
        int | None, typer.Option(help="Render on this many CPU processes, instead of spec.gpusPerNode GPUs.", min=1)
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Write into this folder instead of object storage.", file_okay=False)
    ] = None,
    s3_endpoint: Annotated[
        str | None, typer.Option(help="The S3 server's URL, instead of spec.output.s3.endpoint. Keys as for AWS tools.")
    ] = None,
    work_dir: Annotated[
        Path,
        typer.Option(help="Log, scratch files, and the objects of the S3 server that is started if none is named."),
    ] = Path("videojob-out"),
    dump_latents: Annotated[
        Path | None, typer.Option(help="Also write the clean latents to this safetensors file.", dir_okay=False)
    ] = None,
) -> None:
    """Render a manifest on this machine, without a cluster.

    The video goes to spec.output.s3. Where neither it nor --s3-endpoint names an endpoint, an S3 server is started
    whose objects are plain files under the work directory; --output-dir does without S3.
    """
    document = _overridden(_load(file), model=model, cpu_ranks=cpu_ranks, s3_endpoint=s3_endpoint)
    videojob = _read(document, file)
    if videojob.spec.model.source.persistent_volume_claim is not None:
        _fail("spec.model.source names a claim, which this machine does not have: give the folder with --model")
    with ExitStack() as stack:
        server = None
        if output_dir is None and videojob.spec.output.s3.endpoint is None:
            bucket = videojob.spec.output.s3.bucket
            try:
                server = stack.enter_context(local.s3_server(work_dir / "s3", bucket))
            except local.LocalRunError as error:
                _fail(str(error))
            videojob = _read(_overridden(document, s3_endpoint=server.endpoint), file)
        run = local.Run(
            videojob=videojob,
            folder=(work_dir / videojob.metadata.name).resolve(),
            output_dir=output_dir.resolve() if output_dir else None,
            dump_latents=dump_latents.resolve() if dump_latents else None,
            server=server,
        )
        _show(run)
    _say_where(run)


@app.command()
def tiny_model(
    folder: Annotated[Path, typer.Argument(help="Made if it does not exist.", metavar="DIR", file_okay=False)],
    kind: Annotated[Kind, typer.Option(help="Of which model it has the structure.")] = Kind.WAN21,
    layers: Annotated[int, typer.Option(help="Transformer layers: the most ranks that can share it.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.", min=0)] = 0,
) -> None:
    """Make a tiny model with random weights in the diffusers layout; its videos are noise, but all code runs."""
    import transformers

    from . import tiny

    transformers.utils.logging.disable_progress_bar()
    tiny.save(folder, kind=kind, layers=layers, seed=seed)
    out.print(f"{folder}: a {kind} model with {layers} layers and random weights", soft_wrap=True)


def _load(file: Path) -> Any:
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        return manifest.load(text)
    except OSError as error:
        _fail(f"{file} cannot be read: {error.strerror}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        _fail(f"{file} is no YAML: {error}")


def _read(document: Any, file: Path) -> VideoJob:
    try:
        return validation.read(document)
    except validation.InvalidVideoJobError as error:
        count = len(error.problems)
        lines = "\n".join(f"  {problem}" for problem in error.problems)
        _fail(f"{file}: {count} problem{'s' if count > 1 else ''}\n{lines}")


def _overridden(
    document: Any, *, model: Path | None = None, cpu_ranks: int | None = None, s3_endpoint: str | None = None
) -> Any:
    """The manifest with the options put in; what is no manifest stays as it is, for the validation to name."""
    if not isinstance(document, dict) or not isinstance(document.get("spec"), dict):
        return document
    spec = dict(document["spec"])
    if model is not None:
        spec["model"] = {"source": {"localPath": str(model.resolve())}}
    if cpu_ranks is not None:
        spec |= {"nodes": 1, "gpusPerNode": 0, "ranksPerNode": cpu_ranks}
    if s3_endpoint is not None and isinstance(spec.get("output"), dict) and isinstance(spec["output"].get("s3"), dict):
        spec["output"] = {**spec["output"], "s3": {**spec["output"]["s3"], "endpoint": s3_endpoint}}
    return {**document, "spec": spec}


def _show(run: local.Run) -> None:
    counts = cut(run.videojob.spec)
    columns = (
        TextColumn("{task.fields[stage]:<9}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[blocks]}"),
        TextColumn("{task.fields[eta]}"),
        TextColumn("{task.fields[ready]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err) as bar:
        total = counts.frames / run.videojob.spec.video.fps
        task = bar.add_task(
            "render",
            total=100,
            stage="Starting",
            blocks=f"0/{counts.blocks} blocks",
            eta="",
            ready=f"0.0/{total:.1f} s",
        )
        try:
            for record in local.render(run):
                bar.update(task, completed=record.percent, **_columns(record))
        except local.LocalRunError as error:
            bar.stop()
            _fail(str(error))
        done = f"{counts.blocks}/{counts.blocks} blocks"
        ready = f"{total:.1f}/{total:.1f} s ready"
        bar.update(task, completed=100, stage=Stage.SUCCEEDED, blocks=done, eta="", ready=ready)


def _columns(record: Record) -> dict[str, Any]:
    eta = "" if record.eta_seconds is None else f"ETA {record.eta_seconds:.0f} s"
    return {
        "stage": record.stage,
        "blocks": f"{record.blocks_done}/{record.blocks_total} blocks",
        "eta": eta,
        "ready": f"{record.frames_ready / record.fps:.1f}/{record.frames_total / record.fps:.1f} s ready",
    }


def _say_where(run: local.Run) -> None:
    s3 = run.videojob.spec.output.s3
    folder = run.output_dir
    if run.server is not None:
        out.print(f"In object storage: s3://{s3.bucket}/{s3.prefix}", soft_wrap=True)
        folder = run.server.root / s3.bucket / s3.prefix
    if folder is None:
        place = f"s3://{s3.bucket}/{s3.prefix} at {s3.endpoint}"
        out.print(f"Whole video: {names.VIDEO}; playlist: {names.PLAYLIST}; in {place}", soft_wrap=True)
        return
    out.print(f"Whole video:       {folder / names.VIDEO}", soft_wrap=True)
    out.print(f"Playlist (HLS):    {folder / names.PLAYLIST}", soft_wrap=True)
    out.print(f"List of segments:  {folder / names.MANIFEST}", soft_wrap=True)


def _fail(message: str) -> NoReturn:
    err.print(message, style="red", markup=False, soft_wrap=True)
    raise typer.Exit(1)


def main() -> None:
    """The console script."""
    app()
