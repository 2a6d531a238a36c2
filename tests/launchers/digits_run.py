# The main example for 16 iterations, without dropout and other random layers, because each rank draws different
# numbers.
_base_ = ["../../examples/mnist/config.py"]
custom_imports = dict(imports=["digits", "recorder"])
model = dict(
    network=[
        dict(type="Conv2d", in_channels=1, out_channels=16, kernel_size=5, padding=2),
        dict(type="ReLU"),
        dict(type="MaxPool2d", kernel_size=4),
        dict(type="Flatten"),
        dict(type="Linear", in_features=16 * 7 * 7, out_features=10),
    ],
)
train_dataloader = dict(batch_size=16)
train_cfg = dict(_delete_=True, by_epoch=False, max_iters=16, val_interval=100)
param_scheduler = []
custom_hooks = [dict(type="Recorder")]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=100))
