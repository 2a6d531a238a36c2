"""The trainings that the tests of this folder run: what each trains, and how it differs from the shipped configuration."""

from __future__ import annotations

from tests.openmmlab.image_data import PHOTOS, write_digits, write_photos, write_segmented_photos
from tests.openmmlab.trainings import Training

# Log every iteration, unsmoothed, so that the losses can be compared; seed; no data workers, which cost seconds to start.
_LOG = ("default_hooks.logger.interval=1", "log_processor.window_size=1", "randomness.seed=1")


def _no_workers(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}_dataloader.{key}" for name in names for key in ("num_workers=0", "persistent_workers=False"))


def _folders(*names: str) -> tuple[str, ...]:
    """Return the options with which the class ImageNet reads other folders."""
    datasets = [f"{name}_dataloader.dataset" for name in names]
    classes = ",".join(PHOTOS)
    return tuple(
        option
        for dataset in datasets
        for option in (f"{dataset}.data_root={{data}}", f"{dataset}.metainfo.classes={classes}")
    )


RESNET = Training(
    package="mmpretrain",
    config="resnet18_digits.py",
    data=write_digits,
    options=(
        *_LOG,
        *_no_workers("train", "val", "test"),
        "train_dataloader.dataset.data_root={data}/train",
        "val_dataloader.dataset.data_root={data}/val",
        "test_dataloader.dataset.data_root={data}/val",
        "model.backbone.base_channels=16",
        "model.head.in_channels=128",
        "default_hooks.checkpoint.save_best=auto",
        "train_cfg.max_epochs=2",
    ),
)

DEIT = Training(
    package="mmpretrain",
    config="deit/deit-tiny_4xb256_in1k.py",
    data=write_photos,
    options=(
        *_LOG,
        *_no_workers("train", "val", "test"),
        *_folders("train", "val", "test"),
        "train_dataloader.batch_size=8",
        "train_dataloader.dataset.pipeline.1.scale=64",
        "val_dataloader.dataset.pipeline.1.scale=72",
        "val_dataloader.dataset.pipeline.2.crop_size=64",
        "test_dataloader.dataset.pipeline.1.scale=72",
        "test_dataloader.dataset.pipeline.2.crop_size=64",
        "model.backbone.img_size=64",
        "model.head.num_classes=6",
        "data_preprocessor.num_classes=6",
        "train_cfg.max_epochs=2",
        "param_scheduler.0.end=1",
        "param_scheduler.1.begin=1",
        "default_hooks.checkpoint.save_best=auto",
    ),
)

SIMSIAM = Training(
    package="mmpretrain",
    config="simsiam/simsiam_resnet50_8xb32-coslr-100e_in1k.py",
    data=write_photos,
    options=(
        *_LOG,
        *_no_workers("train"),
        *_folders("train"),
        "train_dataloader.batch_size=8",
        "train_dataloader.dataset.pipeline.1.transforms.0.0.scale=64",
        # mmcv 2.1 cannot change the hue with NumPy 2.
        "train_dataloader.dataset.pipeline.1.transforms.0.1.transforms.0.hue=0.0",
        "model.backbone.depth=18",
        "model.backbone.base_channels=16",
        "model.backbone.norm_cfg.type=BN",
        "model.neck.in_channels=128",
        "model.neck.hid_channels=128",
        "model.neck.out_channels=128",
        "model.head.predictor.in_channels=128",
        "model.head.predictor.hid_channels=32",
        "model.head.predictor.out_channels=128",
        "train_cfg.max_epochs=2",
        "default_hooks.checkpoint.interval=1",
    ),
)

FCN = Training(
    package="mmseg",
    config="fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py",
    data=write_segmented_photos,
    options=(
        *_LOG,
        *_no_workers("train", "val", "test"),
        *(
            option
            for name, split in (("train", "train"), ("val", "val"), ("test", "val"))
            for option in (
                f"{name}_dataloader.dataset.type=BaseSegDataset",
                f"{name}_dataloader.dataset.data_root={{data}}",
                f"{name}_dataloader.dataset.data_prefix.img_path=images/{split}",
                f"{name}_dataloader.dataset.data_prefix.seg_map_path=labels/{split}",
                f"{name}_dataloader.dataset.img_suffix=.png",
                f"{name}_dataloader.dataset.seg_map_suffix=.png",
                f"{name}_dataloader.dataset.metainfo.classes=dark,bright",
            )
        ),
        "train_dataloader.dataset.pipeline.2.scale=(96,96)",
        "train_dataloader.dataset.pipeline.3.crop_size=(64,64)",
        "val_dataloader.dataset.pipeline.1.scale=(96,96)",
        "test_dataloader.dataset.pipeline.1.scale=(96,96)",
        "model.data_preprocessor.size=(64,64)",
        "model.pretrained=None",
        "model.backbone.depth=18",
        "model.backbone.base_channels=16",
        "model.decode_head.in_channels=128",
        "model.decode_head.channels=32",
        "model.decode_head.num_classes=2",
        "model.auxiliary_head.in_channels=64",
        "model.auxiliary_head.channels=32",
        "model.auxiliary_head.num_classes=2",
        "train_cfg.max_iters=20",
        "train_cfg.val_interval=10",
        "default_hooks.checkpoint.interval=10",
        "default_hooks.checkpoint.save_best=mIoU",
    ),
)

ALL = dict(resnet=RESNET, deit=DEIT, simsiam=SIMSIAM, fcn=FCN)
