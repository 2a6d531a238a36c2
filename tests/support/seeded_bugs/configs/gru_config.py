# A GRU on texts.
model = dict(type="tests.support.seeded_bugs.models.GruClassifier")
train_dataloader = dict(
    batch_size=2,
    dataset=dict(type="tests.support.seeded_bugs.models.Texts"),
    collate_fn=dict(type="default_collate"),
)
train_cfg = dict(max_iters=100)
optim_wrapper = dict(optimizer=dict(type="Adam", lr=0.01), clip_grad=dict(max_norm=0.05))
param_scheduler = [dict(type="CosineAnnealingLR", by_epoch=False, T_max=10)]
custom_hooks = [dict(type="EMAHook", momentum=0.1)]
randomness = dict(seed=0)
