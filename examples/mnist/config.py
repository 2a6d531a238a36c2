# A small convolutional network trained on 4,000 real digits; reaches about 98 % accuracy on 1,000 held-out digits.
#   stratagem train examples/mnist/config.py            on one device
#   stratagem train examples/mnist/config.py --nproc 2  the same with DDP, in two processes
custom_imports = dict(imports=["digits"])

model = dict(
    type="SupervisedModel",
    network=[
        dict(type="RandomAffine"),
        dict(type="Conv2d", in_channels=1, out_channels=16, kernel_size=5, padding=2),
        dict(type="ReLU"),
        dict(type="MaxPool2d", kernel_size=2),
        dict(type="Conv2d", in_channels=16, out_channels=32, kernel_size=5, padding=2),
        dict(type="ReLU"),
        dict(type="MaxPool2d", kernel_size=2),
        dict(type="Flatten"),
        dict(type="Dropout", p=0.25),
        dict(type="Linear", in_features=32 * 7 * 7, out_features=10),
    ],
    loss=dict(type="CrossEntropyLoss"),
)

train_dataloader = dict(
    batch_size=32,
    dataset=dict(type="Digits", held_out=False),
)
train_cfg = dict(by_epoch=True, max_epochs=12)

val_dataloader = dict(
    batch_size=250,
    dataset=dict(type="Digits", held_out=True),
)
val_cfg = dict()
val_evaluator = dict(type="Accuracy", task="multiclass", num_classes=10)

test_dataloader, test_cfg, test_evaluator = val_dataloader, val_cfg, val_evaluator

optim_wrapper = dict(optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.01))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=50),
]
default_hooks = dict(logger=dict(interval=50))

randomness = dict(seed=0)
work_dir = "work_dirs/mnist"
