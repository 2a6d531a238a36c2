# Five batches of four per epoch; the whole run takes a moment.
custom_imports = dict(imports=["toy_parts"])

model = dict(
    type="SupervisedModel",
    network=[
        dict(type="Linear", in_features=2, out_features=8),
        dict(type="Dropout", p=0.2),
        dict(type="Linear", in_features=8, out_features=4),
    ],
    loss=dict(type="CrossEntropyLoss"),
)
train_dataloader = dict(batch_size=4, dataset=dict(type="CornerSamples"), collate_fn=dict(type="default_collate"))
train_cfg = dict(by_epoch=True, max_epochs=2)
test_dataloader = dict(
    batch_size=4, dataset=dict(type="CornerSamples", length=8), collate_fn=dict(type="default_collate")
)
test_cfg = dict()
test_evaluator = dict(type="Correct")
val_dataloader, val_cfg, val_evaluator = test_dataloader, test_cfg, test_evaluator

optim_wrapper = dict(optimizer=dict(type="AdamW", lr=0.01))
param_scheduler = [dict(type="LinearLR", start_factor=0.5, by_epoch=False, end=5)]
default_hooks = dict(logger=dict(interval=1), runtime_info=None)
custom_hooks = []
randomness = dict(seed=1)
