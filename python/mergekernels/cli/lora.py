"""The group `lora`: options only, each command's work is imported when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import EXIT_CODES, Device, Json, Quiet

__all__ = ["lora"]

lora = typer.Typer(
    name="lora",
    help="LoRA adapters: merged into one.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@lora.command(short_help="Merge adapters into one.", epilog=EXIT_CODES)
def merge(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A method of adapters, see `mergekernels methods`.")],
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="PEFT folders, kohya or diffusers files.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="OUT", help="Folder (kohya: file) to create.")],
    rank: Annotated[
        int | None, typer.Option(metavar="R", help="Most ranks per module. Default: the method's.", show_default=False)
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            metavar="E", help="Instead: the least rank that keeps this share of the squares.", show_default=False
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,...", help="One weight, or one per adapter: 1,-0.5,2.", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="Checkpoint that names and shapes are checked against.", show_default=False),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A parameter of the method, may be repeated: density=0.2; one per adapter: density=0.2,0.5.",
            show_default=False,
        ),
    ] = None,
    dialect: Annotated[str, typer.Option(metavar="NAME", help="Variant of the method.")] = "default",
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of everything random.")] = 0,
    spread: Annotated[
        str, typer.Option(metavar="SIDE", help="Where singular values go: b (as PEFT), sqrt (both) or a.")
    ] = "b",
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of the factors. Default: that of the adapters.", show_default=False),
    ] = None,
    form: Annotated[str, typer.Option(metavar="NAME", help="What to write: peft or kohya.")] = "peft",
    device: Device = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge LoRA adapters of one base into the adapter OUT, which is absent or complete."""
    from .lora_merge import merge_command

    merge_command(
        method,
        adapters,
        out,
        rank=rank,
        energy=energy,
        weights=weights,
        base=base,
        params=param or [],
        dialect=dialect,
        seed=seed,
        spread=spread,
        dtype=dtype,
        form=form,
        device=device,
        overwrite=overwrite,
        as_json=as_json,
        quiet=quiet,
    )
