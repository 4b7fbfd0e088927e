"""The group `lora`: options only, each command's work is imported when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import EXIT_CODES, Backend, Device, Json, Memory, Quiet, ShardSize, Threads

__all__ = ["lora"]

lora = typer.Typer(
    name="lora",
    help="LoRA adapters: merged into one, folded into their base, taken out of a fine-tuned model.",
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


@lora.command(short_help="Fold adapters into their base.", epilog=EXIT_CODES)
def apply(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Checkpoint that the adapters belong to.")],
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="1 to 64 PEFT folders, kohya or diffusers files.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="OUT", help="Folder to create; absent or complete.")],
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,...", help="One weight, or one per adapter: 1,-0.5,2.", show_default=False),
    ] = None,
    out_dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of the result. Default: that of the base.", show_default=False),
    ] = None,
    backend: Backend = None,
    device: Device = "cpu",
    threads: Threads = None,
    memory: Memory = None,
    shard_size: ShardSize = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write BASE with all adapters added as the checkpoint OUT: one pass over the base, one rounding.

    Stopped at any moment, the same command resumes and ends with the same bytes.
    """
    from .lora_apply import apply_command

    apply_command(
        base,
        adapters,
        out,
        weights=weights,
        out_dtype=out_dtype,
        backend=backend,
        device=device,
        threads=threads,
        memory=memory,
        shard_size=shard_size,
        overwrite=overwrite,
        as_json=as_json,
        quiet=quiet,
    )


@lora.command(short_help="Take an adapter out of a fine-tuned checkpoint.", epilog=EXIT_CODES)
def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Checkpoint before the fine-tuning.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Checkpoint after it.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="ADAPTER", help="PEFT folder to create.")],
    rank: Annotated[int | None, typer.Option(metavar="R", help="Ranks per module.", show_default=False)] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            metavar="E", help="Instead: the least rank that keeps this share of the squares.", show_default=False
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Modules that get factors, such as '*.q_proj'; may be repeated. Default: linear layers, convolutions "
            "and embeddings.",
            show_default=False,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Modules that get none; may be repeated.", show_default=False),
    ] = None,
    save_rest: Annotated[
        bool, typer.Option("--save-rest", help="Put other modules that changed (norms) into the adapter whole.")
    ] = False,
    spread: Annotated[
        str, typer.Option(metavar="SIDE", help="Where singular values go: b (as PEFT), sqrt (both) or a.")
    ] = "b",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="Of the factors.")] = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    memory: Memory = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace ADAPTER.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the difference of two checkpoints as a LoRA adapter of the first, matrix by matrix."""
    from .lora_extract import extract_command

    extract_command(
        base,
        tuned,
        out,
        rank=rank,
        energy=energy,
        include=include or [],
        exclude=exclude or [],
        save_rest=save_rest,
        spread=spread,
        dtype=dtype,
        device=device,
        threads=threads,
        memory=memory,
        overwrite=overwrite,
        as_json=as_json,
        quiet=quiet,
    )
