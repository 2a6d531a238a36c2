# The model of the GPT example, with fewer parameters and generated tokens.
_base_ = ["../../../../examples/gpt/config.py"]

model = dict(tokens=16, length=16, width=16, blocks=2, heads=2)
train_dataloader = dict(
    batch_size=2,
    dataset=dict(_delete_=True, type="tests.support.seeded_bugs.models.Tokens"),
)
optim_wrapper = dict(clip_grad=dict(max_norm=0.5))
param_scheduler = [dict(type="CosineAnnealingLR", by_epoch=False, T_max=10)]
custom_hooks = [dict(type="EMAHook", momentum=0.1)]
val_dataloader, val_cfg, val_evaluator = None, None, None
