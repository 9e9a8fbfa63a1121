"""Commands that use a trained model: predict, map, export, convert-official."""

from __future__ import annotations

import argparse
from pathlib import Path

from chasm.commands.options import make_parser, show_path
from chasm.errors import ConfigError

MODEL = "folder of a finished run, one of its checkpoints, or an exported folder"


def _backbone_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument(
        "--backbone-weights", default=None, metavar="FILE",
        help="weights of the backbone, if they are no longer where they were",
    )  # fmt: skip


def predict(args: list[str]) -> None:
    """``chasm predict``."""
    parser = make_parser(
        "predict",
        epilog="Images that cannot be used are listed, in the file and at the end; the others are "
        "predicted all the same, and the exit status is 3.",
    )
    parser.add_argument("--model", type=Path, required=True, help=MODEL)
    parser.add_argument(
        "--images", type=Path, required=True,
        help="image file, folder, .zip, .npy, or .hdf5 with imgBrick (NSD's stimuli)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="HDF5 file")
    parser.add_argument("--subject", default=None, help="refuse a model of another subject")
    parser.add_argument(
        "--draws", type=int, default=0, metavar="N", help="also N samples per image (Stage 2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    parser.add_argument("--parcels", action="store_true", help="also the parcels")
    parser.add_argument("--batch-size", type=int, default=32, help="images at once")
    _backbone_options(parser)
    found = parser.parse_args(args)
    from chasm.inference.encoder import Encoder
    from chasm.inference.pictures import pictures_of
    from chasm.inference.response_file import write_responses

    pictures = pictures_of(found.images)
    encoder = Encoder.from_checkpoint(
        found.model,
        found.device,
        subject=found.subject,
        backbone_weights=found.backbone_weights,
    )
    show_path(
        write_responses(
            encoder,
            pictures,
            found.out,
            batch_size=found.batch_size,
            draws=found.draws,
            parcels=found.parcels,
            seed=found.seed,
        )
    )


def draw_map(args: list[str]) -> None:
    """``chasm map``."""
    parser = make_parser("map")
    parser.add_argument("source", type=Path, help=f"{MODEL}; or a file of `chasm predict`")
    parser.add_argument(
        "--what", required=True,
        help="r2 or ceiling (of a tested run), prediction:IMAGE (name in the file, or an image "
        "file), roi:ATLAS",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True,
        help="*.nii.gz: the subject's volume; NAME.func.gii: fsaverage, as lh.NAME.func.gii and "
        "rh.NAME.func.gii",
    )  # fmt: skip
    parser.add_argument("--row", default=None, help="row of the score table (r2)")
    surface = parser.add_mutually_exclusive_group()
    surface.add_argument("--nsd", type=Path, default=None, help="NSD tree with transforms (.gii)")
    surface.add_argument(
        "--transforms", type=Path, default=None, help="the subject's folder of transforms (.gii)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    found = parser.parse_args(args)
    from chasm.inference.maps import make_map, write_map

    brain_map = make_map(found.source, found.what, row=found.row, device=found.device)
    transforms = found.transforms
    if found.nsd is not None:
        transforms = _transforms(found.nsd, brain_map.subject)
    for path in write_map(brain_map, found.out, transforms):
        show_path(path)


def _transforms(tree: Path, subject: str) -> Path:
    from chasm.data.surface import transforms_folder

    number = subject.removeprefix("subj")
    if not number.isdigit():
        raise ConfigError("--nsd", f"{subject!r} is no NSD subject", "Give --transforms FOLDER.")
    return transforms_folder(tree, int(number))


def export(args: list[str]) -> None:
    """``chasm export``."""
    parser = make_parser("export")
    parser.add_argument(
        "run", type=Path, help="folder of a finished run, or one of its checkpoints"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace whatever stands there")
    found = parser.parse_args(args)
    from chasm.inference.encoder import read_trained
    from chasm.inference.export import is_export, write_export

    if is_export(found.run):
        raise ConfigError(found.run, "is exported already", "Copy the folder.")
    show_path(write_export(read_trained(found.run), found.out, overwrite=found.overwrite))


def convert_official(args: list[str]) -> None:
    """``chasm convert-official``."""
    parser = make_parser("convert-official")
    parser.add_argument("checkpoint", type=Path, help="best_model.pth or best_stage1.pth")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--store", type=Path, default=None, help="store of the subject it was trained on"
    )
    parser.add_argument(
        "--backbone", default="vit_base_patch14_dinov2", help="timm model whose tokens it takes"
    )
    parser.add_argument(
        "--image-size", type=int, default=224, help="pixels of the backbone's input"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace whatever stands there")
    found = parser.parse_args(args)
    from chasm.features.backbones import BackboneSpec
    from chasm.inference.official import convert

    show_path(
        convert(
            found.checkpoint,
            found.out,
            store=found.store,
            backbone=BackboneSpec(found.backbone, image_size=found.image_size),
            overwrite=found.overwrite,
        )
    )
