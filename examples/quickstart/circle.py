custom_imports = dict(imports=["points"])  # registers the dataset in points.py, next to this file

model = dict(
    type="SupervisedModel",
    network=[
        dict(type="Linear", in_features=2, out_features=32),
        dict(type="ReLU"),
        dict(type="Linear", in_features=32, out_features=2),
    ],
    loss=dict(type="CrossEntropyLoss"),
)

train_dataloader = dict(batch_size=50, dataset=dict(type="Points", count=1000, seed=0))
train_cfg = dict(max_epochs=20)

val_dataloader = dict(batch_size=500, dataset=dict(type="Points", count=1000, seed=1))
val_cfg = dict()
val_evaluator = dict(type="Accuracy", task="multiclass", num_classes=2)

optim_wrapper = dict(optimizer=dict(type="AdamW", lr=0.01))
randomness = dict(seed=0)
