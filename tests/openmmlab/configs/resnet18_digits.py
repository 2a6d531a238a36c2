"""The CIFAR ResNet-18 of mmpretrain on folders of pictures of digits, padded to 32 x 32."""

_base_ = "mmpretrain::resnet/resnet18_8xb16_cifar10.py"

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomCrop", crop_size=32, padding=4),
    dict(type="PackInputs"),
]
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="PackInputs")]
train_dataloader = dict(
    dataset=dict(_delete_=True, type="CustomDataset", data_root="train", pipeline=train_pipeline),
)
val_dataloader = dict(
    dataset=dict(_delete_=True, type="CustomDataset", data_root="val", pipeline=test_pipeline),
)
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=0.1))
