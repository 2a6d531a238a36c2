# A CNN on images.
model = dict(type="tests.support.seeded_bugs.models.SmallCnn")
train_dataloader = dict(
    batch_size=2,
    dataset=dict(type="tests.support.seeded_bugs.models.Images"),
    collate_fn=dict(type="default_collate"),
)
train_cfg = dict(max_iters=100)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.05, momentum=0.9), clip_grad=dict(max_norm=0.5))
param_scheduler = [dict(type="LinearLR", start_factor=0.2, by_epoch=False, end=4)]
custom_hooks = [dict(type="EMAHook", momentum=0.1)]
randomness = dict(seed=0)
