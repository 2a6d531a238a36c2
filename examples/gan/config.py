# A GAN with one optimizer per network, trained on 4,000 real digits. Saves generated images after every epoch.
#   stratagem train examples/gan/config.py                on one device
#   stratagem train examples/gan/config_ddp.py --nproc 2  the same with DDP, in two processes
_base_ = "../mnist/config.py"
custom_imports = dict(imports=["digits", "gan"])

model = dict(_delete_=True, type="DigitGAN")
train_dataloader = dict(batch_size=50)
train_cfg = dict(max_epochs=25)
val_dataloader = val_cfg = val_evaluator = None
test_dataloader = test_cfg = test_evaluator = None

optim_wrapper = dict(
    _delete_=True,
    constructor="MultiOptimWrapperConstructor",
    generator=dict(optimizer=dict(type="Adam", lr=1e-3, betas=(0.5, 0.999))),
    discriminator=dict(optimizer=dict(type="Adam", lr=4e-4, betas=(0.5, 0.999))),
)
param_scheduler = None
custom_hooks = [
    dict(type="EMAHook", momentum=0.01, update_buffers=True),
    dict(type="PictureHook", priority="LOW"),
]
default_hooks = dict(checkpoint=dict(interval=5))

work_dir = "work_dirs/gan"
